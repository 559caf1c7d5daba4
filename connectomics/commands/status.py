"""``connectomics status``: how far a run has come, who has what in hand, how long it will take; changes nothing.

What is told of time comes from the clocks of this machine and of the disk: it is for people, and decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from connectomics.commands.run_status import (
    ENDED,
    HERE,
    SILENT,
    InHand,
    RunStatus,
    StageStatus,
    TroubledBlock,
    WorkerStatus,
)
from connectomics.core.errors import LedgerError
from connectomics.core.process import is_dead
from connectomics.execution.append_log import whole_lines
from connectomics.execution.block_claims import quarantined
from connectomics.execution.block_plan import HEADER
from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import Version, content_of
from connectomics.execution.lease import (
    HELD,
    LEFT,
    LIMIT_S,
    REVOKED,
    SESSION,
    Lease,
    Presence,
    lease_of,
    presence_of,
)
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import (
    CHECKSUMS,
    COORDINATION,
    LEDGER,
    LOG,
    PREPARATION,
    PROVENANCE,
    REPORT,
    SINGLE_WRITER,
    SURVEY,
    begun_folders,
    ledger_folders,
    stage_of,
    work_folders,
)
from connectomics.execution.worker import ATTEMPT
from connectomics.volumes.digests import SUFFIX

RECENT = 64  # records of each worker that its rate is taken from
LOG_BYTES = 1 << 16  # of the end of run.log, where the last error is looked for
WROTE = re.compile(r" INFO \S+: wrote ")


class _Records:
    """What processes agree on, in a coordination folder that may vanish at any time; it is only read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._highest: dict[str, int] = {}
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                name, _, number = path.name.rpartition(".")
                if name and number.isdecimal():
                    self._highest[name] = max(int(number), self._highest.get(name, 0))

    def names(self, prefix: str) -> list[str]:
        """Names of the records that begin so."""
        return sorted(name for name in self._highest if name.startswith(prefix))

    def read(self, name: str) -> Version | None:
        """The record as it was when this was made."""
        try:
            return Version(self._highest[name], content_of(self._path(name)))
        except (KeyError, OSError):
            return None

    def lease(self, name: str) -> Lease | None:
        """The lease that a record tells of."""
        seen = self.read(name)
        return None if seen is None else lease_of(seen)

    def changed(self, name: str, changes: int = 0) -> float:
        """When the record was changed last, or so many changes before that, by the clock of the disk."""
        try:
            return self._path(name, changes).lstat().st_mtime
        except OSError:
            return time.time()

    def _path(self, name: str, changes: int = 0) -> Path:
        return self._folder / f"{name}.{self._highest[name] - changes}"


def status_of(run: Path) -> RunStatus:
    """Look at a RUN folder, also of a run that failed before its first block; a ConfigError if it is none."""
    stages, workers = list[StageStatus](), list[WorkerStatus]()
    works = begun_folders(run) if (run / LOG).is_file() else work_folders(run)
    for work in sorted({*works, *(path.parent for path in run.glob(f"*/{COORDINATION}"))}):
        records = _Records(work / COORDINATION)
        ledgers = [ledger for folder in ledger_folders(work) if (ledger := _existing(folder)) is not None]
        found = list(_workers(records, ledgers))
        here = {_process(mark) for mark, worker in found if worker.state == HERE}
        stages += [_stage(work, ledger, records, here) for ledger in ledgers]
        workers += [worker for _, worker in found]
    recorded = (path.name.removesuffix(SUFFIX) for path in sorted((run / CHECKSUMS).glob("*" + SUFFIX)))
    finished = tuple(name for name in recorded if (run.parent / name).exists())
    outputs = _outputs(run)
    complete = outputs is not None and outputs <= set(finished) and not any(stage.quarantined for stage in stages)
    at_once = list(_made_at_once(run)) if complete and not works else []
    return RunStatus(
        run,
        bool(at_once) or any((work / SURVEY).exists() for work in works),
        tuple(stages or at_once),
        tuple(worker for worker in workers if worker.present),
        gone=tuple(worker for worker in workers if not worker.present),
        finished=finished,
        last_error=_last_error(run / LOG, complete=complete),
    )


def _made_at_once(run: Path) -> Iterator[StageStatus]:
    """The one block of a volume that was made in memory, as its report tells of it: such a volume has no ledger."""
    try:
        told = json.loads((run / REPORT).read_bytes())
        ago = max(0.0, time.time() - max(worker["until"] for worker in told["workers"]))
        done = int(told["skipped"]) + int(told["done"])
        stage, planned = stage_of(Path(LEDGER)), int(told["planned"])
        yield StageStatus("", stage, planned, done, quarantined=(), blocks_per_s=0.0, last_block_s_ago=ago)
    except (OSError, ValueError, KeyError, TypeError):
        return


def _existing(folder: Path) -> Ledger | None:
    """The ledger in a folder, None where it has just been moved away."""
    try:
        return Ledger.existing(folder)
    except LedgerError:
        if (folder / HEADER).exists():
            raise
        return None


def _workers(records: _Records, ledgers: list[Ledger]) -> Iterator[tuple[str, WorkerStatus]]:
    """Yield the mark and the status of each process that did not leave, those that came first before the others."""
    held = _in_hand(records, ledgers)
    found = list[tuple[str, WorkerStatus]]()
    for name in records.names(SESSION):
        mark, seen = name.removeprefix(SESSION), records.read(name)
        told = (None if seen is None else presence_of(seen)) or Presence(mark, host="", pid=0, since=0, limit_s=LIMIT_S)
        if told.state == LEFT:
            continue
        silent_s = max(0.0, time.time() - records.changed(name))
        state = REVOKED if told.state == REVOKED else ENDED if is_dead(mark) else HERE
        if state == HERE and silent_s > told.limit_s / 2:
            state = SILENT
        found.append(
            (
                mark,
                WorkerStatus(
                    told.host,
                    told.pid,
                    told.since,
                    state,
                    unchanged_s=round(silent_s, 1),
                    limit_s=told.limit_s,
                    in_hand=tuple(held.get(mark, ())),
                ),
            )
        )
    yield from sorted(found, key=lambda each: each[1].since)


def _in_hand(records: _Records, ledgers: list[Ledger]) -> dict[str, list[InHand]]:
    """What each session holds, by its mark."""
    held = defaultdict[str, list[InHand]](list)
    for name in (PREPARATION, SINGLE_WRITER):
        single = records.lease(name)
        if single is not None and single.state == HELD:
            since = int(records.changed(name, single.counter))
            held[single.holder].append(InHand(name.replace("_", " "), "", since))
    for ledger in ledgers:
        for name, lease in _leases(records, Shards.of(ledger.folder, len(ledger.grid))):
            if lease.state == HELD and lease.blocks is not None:
                keys = (ledger.grid.numbered(n).key for n in lease.blocks.begun if not _is_done(ledger, n))
                held[lease.holder] += [InHand(stage_of(ledger.folder), key, int(records.changed(name))) for key in keys]
    return held


def _is_done(ledger: Ledger, number: int) -> bool:
    return ledger.is_done(ledger.grid.numbered(number))


def _leases(records: _Records, shards: Shards) -> Iterator[tuple[str, Lease]]:
    """Yield the leases on shards of blocks, each with the name of its record."""
    for name in records.names(shards.prefix):
        lease = records.lease(name) if name.removeprefix(shards.prefix).isdecimal() else None
        if lease is not None:
            yield name, lease


def _troubled(records: _Records, ledger: Ledger) -> Iterator[TroubledBlock]:
    """Yield the blocks of a stage that failed in this attempt or that processes ended with."""
    attempt, shards = records.lease(ATTEMPT), Shards.of(ledger.folder, len(ledger.grid))
    deaths, failed = Counter[int](), dict[int, str]()
    for _, each in _leases(records, shards):
        deaths.update(each.blocks.deaths if each.blocks is not None else {})
    prefix = shards.failed_prefix
    for name in records.names(prefix):
        lease = records.lease(name)
        count, _, why = ("" if lease is None else lease.note).partition(" ")
        if attempt is not None and count == str(attempt.epoch):
            failed[int(name.removeprefix(prefix))] = why
    for number in sorted({*deaths, *failed}):
        if not _is_done(ledger, number):
            yield TroubledBlock(ledger.grid.numbered(number).key, deaths[number], failed.get(number, ""))


def _stage(work: Path, ledger: Ledger, records: _Records, here: set[str]) -> StageStatus:
    rate, last = 0.0, None
    for path in ledger.folder.glob("*.jsonl"):
        recent = [fields for line, _ in deque(whole_lines(path, 0), RECENT) if "at" in (fields := _fields(line))]
        if recent:
            last = max(last or 0, recent[-1]["at"])
            seconds = sum(fields["seconds"] for fields in recent)
            if _process(path.stem) in here and seconds > 0:
                rate += len(recent) / seconds
    return StageStatus(
        work.name,
        stage_of(ledger.folder),
        ledger.planned,
        ledger.finished,
        quarantined=quarantined(ledger),
        blocks_per_s=rate,
        last_block_s_ago=None if last is None else max(0.0, time.time() - last),
        troubled=tuple(_troubled(records, ledger)),
    )


def _process(mark: str) -> str:
    """Host, process and its start: the part of a mark that all of a process's marks share."""
    return mark.rpartition("-")[0]


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _outputs(run: Path) -> set[str] | None:
    """Names of the outputs that were made last, None where that is not known."""
    try:
        return set(json.loads((run / PROVENANCE).read_bytes())["outputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_error(log: Path, *, complete: bool) -> str | None:
    """The last line of the log that tells of an error or of why the run stopped.

    None where all is ``complete`` and was so after that, or nothing has been begun since.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    errors = [i for i, line in enumerate(lines) if " ERROR " in line or " stopped: " in line]
    if not errors:
        return None
    if complete:
        settled = not any(log.parent.glob(f"*/{COORDINATION}"))
        if settled or any(WROTE.search(line) for line in lines[errors[-1] :]):
            return None
    return lines[errors[-1]]
