"""``report.json``: what all processes did of a volume, however many took part, were killed or came later.

Who did which block stands in the ledgers. When a process ends it leaves a file of its own beside them, which says when
it worked, and makes ``report.json`` of all that is there; ``runs.volume`` and ``runs.decoding_run`` see to it.
Their own files go when the run is finished; of a later run of the same work the ledgers still tell who did what.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from connectomics.core.errors import ConnectomicsError, LedgerError
from connectomics.core.files import make_folder, write_text
from connectomics.execution.block_claims import quarantined
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import COORDINATION, REPORT, REPORTS
from connectomics.execution.task import RunReport
from connectomics.execution.worker import Worker

log = logging.getLogger(__name__)
JSON = ".json"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report tells of.

    Parameters
    ----------
    run_folder, work
        RUN and the work folder in it.
    ledgers
        Gives the ledgers that count, as they are now.
    voxels
        Of the volume.
    predicted_s
        What one process was predicted to take for all blocks, or None.
    """

    run_folder: Path
    work: Path
    ledgers: Callable[[], Iterable[Path]]
    voxels: int
    predicted_s: float | None = None


@dataclass(slots=True)
class _Share:
    """What one process did; times in seconds, ``until`` and ``spent_s`` only where it has ended in an orderly way.

    ``last`` is when it recorded its last block.
    """

    who: Mapping[str, Any]
    blocks: int = 0
    windows: int = 0
    last: float = 0.0
    until: float | None = None
    spent_s: float | None = None

    @property
    def since(self) -> float:
        """When it began."""
        return float(self.who["since"])

    @property
    def end(self) -> float:
        """When it ended, or was last heard of."""
        return max(self.since, self.last) if self.until is None else self.until

    @property
    def seconds(self) -> float:
        """How long it worked, as far as is known."""
        return self.end - self.since if self.spent_s is None else self.spent_s

    def facts(self) -> dict[str, Any]:
        """What ``report.json`` says of it."""
        who = {key: self.who[key] for key in ("host", "pid", "since")}
        done = {"until": self.until, "blocks": self.blocks, "windows": self.windows}
        return who | done | {"seconds": round(self.seconds, 3)}


@dataclass(slots=True)
class _Sum:
    """What the ledgers say, added up; each block counts for one process."""

    planned: int = 0
    finished: int = 0
    failed: int = 0
    repeated: int = 0


class Accounting:
    """Makes the report when a process ends, in whichever way; a context manager around all that it does.

    Parameters
    ----------
    subject
        What is told of.
    worker
        This process. It gives back what it holds first, since telling takes a while and nobody should wait for it.
    idle
        Whether this process has found all done by others, and has nothing to add.
    """

    def __init__(self, subject: Subject, worker: Worker, *, idle: bool) -> None:
        self._subject = subject
        self._worker = worker
        self._silent = idle and (subject.run_folder / REPORT).exists()
        self._began = time.perf_counter()
        self._since = time.time()

    def __enter__(self) -> Accounting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.give_back()
        if self._silent or not (self._subject.work / COORDINATION).is_dir():
            return  # others have finished and tidied while this process stood still
        try:
            self._tell(self._worker.signature)
        except (ConnectomicsError, OSError) as cause:
            log.warning("%s could not be written: %s", self._subject.run_folder / REPORT, cause)

    def _tell(self, signature: Mapping[str, Any]) -> None:
        if not any(True for _ in self._subject.ledgers()):
            return  # it ended before there was a block
        folder = self._subject.work / REPORTS
        make_folder(folder)
        own = dict(signature) | {
            "since": round(self._since, 3),
            "until": round(time.time(), 3),
            "seconds": round(time.perf_counter() - self._began, 3),
            "predicted_s": self._subject.predicted_s,
        }
        write_text(folder / f"{signature['worker']}{JSON}", json.dumps(own) + "\n")
        seen: list[str] | None = None
        while seen != (there := _names(folder)):  # whoever ends at the same time may have known less, and write later
            seen = there
            left = [found for name in there if (found := _own_file(folder / name)) is not None]
            content = report_of(self._subject, left)
            write_text(self._subject.run_folder / REPORT, json.dumps(content, indent=1) + "\n")


def report_of(subject: Subject, ended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``report.json`` says: of the last attempt, and of all processes that did something.

    ``ended`` are the processes' own files, of one at least; the ledgers tell of all others.
    """
    attempt = max(ended, key=lambda own: float(own["since"]))["attempt"]
    shares = {str(own["worker"]): _Share(own, until=own["until"], spent_s=own["seconds"]) for own in ended}
    total = _Sum()
    for folder in subject.ledgers():
        _add(folder, total, shares, attempt)
    present = [share for share in shares.values() if share.who["attempt"] == attempt]
    done = sum(share.blocks for share in present)
    seconds = round(sum(share.seconds for share in present), 3)
    predictions = (own["predicted_s"] for own in (*ended, {"predicted_s": subject.predicted_s}))
    predicted = next((each for each in predictions if each is not None), None)
    if predicted is not None:
        predicted = round(predicted * done / max(1, total.planned), 3)
    report = RunReport(
        total.planned,
        total.finished - done,
        done,
        total.failed,
        windows=sum(share.windows for share in present),
        voxels=subject.voxels,
        seconds=seconds,
        predicted_s=predicted,
        ratio=round(seconds / predicted, 3) if predicted else None,
    )
    told = sorted(shares.values(), key=lambda share: share.since)
    return asdict(report) | {
        "wall_s": round(max(share.end for share in present) - min(share.since for share in present), 3),
        "repeated": total.repeated,
        "workers": [share.facts() for share in told if share.blocks or share in present],
    }


def _add(folder: Path, total: _Sum, shares: dict[str, _Share], attempt: object) -> None:
    """Add what the ledger in a folder says to the sum and to the shares of those who signed it."""
    try:
        ledger = Ledger.existing(folder)
    except LedgerError:
        return  # what was made in a staging folder has just been put in place
    total.planned += ledger.planned
    total.finished += ledger.finished
    total.failed += len(quarantined(ledger))
    counted = bytearray(len(ledger.grid))
    for file in sorted(ledger.files(), key=lambda file: (file.signature.get("attempt") == attempt, file.name)):
        share = None
        if "worker" in file.signature:  # else nobody did blocks there, or a program of before
            share = shares.setdefault(str(file.signature["worker"]), _Share(file.signature))
            share.last = max(share.last, file.last)
        for _, record in ledger.named_records(file.name):
            number = ledger.grid.number(ledger.block(record.block).index)
            total.repeated += counted[number]
            if share is not None and not counted[number]:
                share.blocks += 1
                share.windows += record.windows
            counted[number] = 1


def _names(folder: Path) -> list[str]:
    """The processes' own files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix == JSON and not path.name.startswith("."))


def _own_file(path: Path) -> Mapping[str, Any] | None:
    """What a process left, None where it is damaged."""
    try:
        own = json.loads(path.read_bytes())
        return own if {"worker", "attempt", "since", "until", "seconds", "predicted_s"} <= set(own) else None
    except (OSError, ValueError, TypeError):
        return None
