"""``connectomics verify-run``: read what a run wrote again, compare checksums, mark what is damaged as undone.

Of an unfinished run the blocks are read, of a finished one the final outputs; the next run mends what is marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from connectomics.commands.salvage import salvage
from connectomics.core.files import discard
from connectomics.execution.lease import Worker
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import (
    CHECKSUMS,
    LEDGER,
    SINGLE_WRITER,
    SURVEY,
    WORKERS,
    ledger_folders,
    stage_of,
    work_folders,
)
from connectomics.execution.runner import is_kept
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.stages.survey.mask import MASK
from connectomics.volumes.digests import SUFFIX, digests, is_intact

SHOWN = 10


@dataclass(frozen=True, slots=True)
class DamageReport:
    """What was looked at, how much of it was read, what was damaged, and what was done about it."""

    subject: str
    read: int
    damaged: tuple[str, ...]
    mend: str = ""

    def lines(self) -> Iterator[str]:
        """For the screen."""
        yield f"{self.subject}: {self.read} read, {len(self.damaged)} damaged"
        yield from (f"  damaged: {name}" for name in self.damaged[:SHOWN])
        if len(self.damaged) > SHOWN:
            yield f"  … and {len(self.damaged) - SHOWN} more"
        if self.damaged:
            yield f"  {self.mend}"


def verify_run(run: Path, sample: int | None = None) -> list[DamageReport]:
    """Read the blocks and final outputs of a RUN folder again.

    Parameters
    ----------
    run
        ``NAME_labels.run``.
    sample
        How many blocks of a stage and files of an output are read, spread evenly; None for all.

    Raises
    ------
    ConfigError
        If it is not a RUN folder.
    """
    works = work_folders(run)
    found = [finding for work in works for finding in _verify_blocks(work, sample)]
    for record in sorted((run / CHECKSUMS).glob("*" + SUFFIX)):
        found.append(_verify_output(run, works, record, sample))
    return found


def _verify_blocks(work: Path, sample: int | None) -> Iterator[DamageReport]:
    stores = {path.name for path in work.iterdir() if path.is_dir()}
    suspect: list[str] = []  # stages with damaged blocks
    with Worker(work / WORKERS) as worker, worker.alone(SINGLE_WRITER):
        for folder in ledger_folders(work):
            ledger = Ledger.existing(folder)
            stride = 1 if sample is None else max(1, ledger.finished // sample)
            read, damaged = 0, []
            for i, (name, record) in enumerate(ledger.named_records()):
                kept = {path.partition("/")[0] for path in record.checksums} & stores
                if kept and i % stride == 0:
                    read += 1
                    if not is_kept(work, record, kept, compared=True):
                        damaged.append(record.block)
                        ledger.void(name, record.block)
            ledger.close()
            suspect += [stage_of(folder)] if damaged else []
            if read:
                yield DamageReport(
                    f"{work.name}, blocks of {stage_of(folder)}", read, tuple(damaged), "the next run mends them"
                )
        for stage in suspect:
            _forget_derived(work, stage)


def _forget_derived(work: Path, stage: str) -> None:
    """Remove what may have been made of damaged blocks: of predicted ones the filtered labels and pyramids.

    Of the mask everything is made, and decoding begins anew, which costs little.
    """
    predicted = (work / LEDGER).exists() and not stage.startswith(MASK)
    kept: tuple[str, ...] = (WORKERS,)
    if predicted:
        kept += (LEDGER, f"{LABELS}.zarr", f"{PROBABILITIES}.zarr")
    else:
        discard(work / SURVEY)
    of_mask = (MASK, f"{LEDGER}_{MASK}")
    for path in list(work.iterdir()):
        if path.is_dir() and path.name not in kept and not (predicted and path.name.startswith(of_mask)):
            discard(path)


def _verify_output(run: Path, works: list[Path], record: Path, sample: int | None) -> DamageReport:
    name = record.name.removesuffix(SUFFIX)
    output = run.parent / name
    count = sum(1 for _ in digests(record))
    stride = 1 if sample is None else max(1, count // sample)
    read, damaged = 0, list[str]()
    for file, checksum in islice(digests(record), 0, None, stride):
        read += 1
        if not is_intact(run.parent, file, checksum):
            damaged.append(file)
    mend = ""
    if damaged and not output.exists():
        mend = "it is not there; the next run makes it again"
    elif damaged:
        lost = salvage(output, run, works)
        aside = output.with_name(output.name + ".damaged")
        discard(aside)
        output.rename(aside)
        record.unlink()
        mend = f"it was renamed {aside.name}; the next run makes it again"
        if lost is not None:
            mend += f", computing {lost} of its blocks; all others were kept in {run.name}"
    return DamageReport(f"{name}, files", read, tuple(damaged), mend)
