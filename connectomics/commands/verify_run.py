"""``connectomics verify-run``: read what a run wrote again, compare checksums, mark what is damaged as undone.

Of an unfinished run the blocks are read, of a finished one the final outputs; the next run mends what is marked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from connectomics.core.errors import VolumeError
from connectomics.core.files import discard
from connectomics.execution.block_plan import HEADER, plan_of, read_header
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import (
    CHECKSUMS,
    COORDINATION,
    LEDGER,
    PROVENANCE,
    SINGLE_WRITER,
    SURVEY,
    begun_folders,
    ledger_folders,
    stage_of,
    work_folders,
)
from connectomics.execution.runner import is_kept, write_block
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.execution.worker import Worker
from connectomics.stages.output.export import read_stamp
from connectomics.stages.survey.mask import MASK
from connectomics.volumes.digests import SUFFIX, digests, is_intact
from connectomics.volumes.opening import open_volume
from connectomics.volumes.source import READ_ERRORS
from connectomics.volumes.store import create_store
from connectomics.volumes.volume import VolumeReader

SHOWN = 10


@dataclass(frozen=True, slots=True)
class DamageReport:
    """What was looked at, how much of it was read, what was damaged, and what was done about it."""

    subject: str
    read: int
    damaged: tuple[str, ...]
    mend: str = ""

    def lines(self) -> Iterator[str]:
        """Return the text for the screen."""
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
    records = sorted((run / CHECKSUMS).glob("*" + SUFFIX))
    works = begun_folders(run) if records else work_folders(run)  # what was made in memory has no ledger
    found = [finding for work in works for finding in _verify_blocks(work, sample)]
    for record in records:
        found.append(_verify_output(run, works, record, sample))
    return found


def _verify_blocks(work: Path, sample: int | None) -> Iterator[DamageReport]:
    suspect: list[str] = []  # stages with damaged blocks
    with Worker.of(work / COORDINATION) as worker, worker.alone(SINGLE_WRITER):
        for folder in ledger_folders(work):
            place, ledger = folder.parent, Ledger.existing(folder)
            stores = {path.name for path in place.iterdir() if path.is_dir()}
            stride = 1 if sample is None else max(1, ledger.finished // sample)
            read, damaged = 0, []
            for i, (name, record) in enumerate(ledger.named_records()):
                kept = {path.partition("/")[0] for path in record.checksums} & stores
                if kept and i % stride == 0:
                    read += 1
                    if not is_kept(place, record, kept, compared=True):
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
    kept: tuple[str, ...] = (COORDINATION,)
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


def salvage(output: Path, run: Path, works: list[Path]) -> int | None:
    """Copy the intact blocks of a damaged Zarr output into a working store, and undo the records of all others.

    The output is only read; the provenance of its RUN folder names it.

    Returns
    -------
    lost
        How many blocks have to be computed again; None where blocks alone do not make the output, nothing is known of
        them any more, or it cannot be opened.

    Raises
    ------
    OutputError
        If the disk refuses; the output is as it was.
    """
    stamp = read_stamp(output, "zarr")
    if stamp is None or stamp.get("filtered") is not False:
        return None  # the ledger tells of blocks before they were filtered
    name = _name_of(stamp.get("result_key"), run)
    begun = [work / LEDGER for work in works if (work / LEDGER / HEADER).exists()]
    folder = next((f for f in begun if read_header(f)["run_key"] == stamp.get("run_key")), None)
    if name is None or folder is None:
        return None
    try:
        reader = open_volume(str(output))
    except VolumeError:
        return None
    with contextlib.closing(reader), Worker.of(folder.parent / COORDINATION) as worker, worker.alone(SINGLE_WRITER):
        return _copy_back(reader, folder, folder.parent / f"{name}.zarr")


def _name_of(result_key: object, run: Path) -> str | None:
    """The working store's name of the output with a result key."""
    try:
        keys: dict[str, object] = json.loads((run / PROVENANCE).read_text())["result_keys"]
        return next((name for name, key in keys.items() if key == result_key), None)
    except READ_ERRORS:
        return None


def _copy_back(reader: VolumeReader, folder: Path, path: Path) -> int:
    plan = plan_of(folder)
    assert plan is not None, "its header was read"
    discard(path)  # half of it, of another call
    info = dataclasses.replace(reader.info, chunk_shape=plan.chunk_shape)
    store = create_store(path, info, shard_shape=plan.block_shape, attributes={})
    lost: set[str] = set()
    with contextlib.closing(store), contextlib.closing(Ledger.existing(folder)) as ledger:
        for place, record in ledger.named_records():
            block = ledger.block(record.block)
            try:
                shard, checksum = write_block(store, block, reader.read(block.core))
            except VolumeError:
                intact = False
            else:
                intact = record.checksums.get(shard) == checksum
            if not intact:
                ledger.void(place, record.block)
                lost.add(record.block)
    return len(lost)
