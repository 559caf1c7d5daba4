"""``connectomics status``: how far a run has come, who works on it, how long it will take; changes nothing."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from connectomics.execution.append_log import whole_lines
from connectomics.execution.block_claims import QUARANTINE
from connectomics.execution.lease import Presence
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import (
    CHECKSUMS,
    COORDINATION,
    LOG,
    SURVEY,
    begun_folders,
    ledger_folders,
    stage_of,
    work_folders,
)
from connectomics.execution.worker import living
from connectomics.volumes.digests import SUFFIX

SHOWN = 10  # quarantined blocks that are named
RECENT = 64  # records of each worker that its rate is taken from
LOG_BYTES = 1 << 16  # of the end of run.log, where the last error is looked for
MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Blocks of one stage; ``blocks_per_s`` is that of the workers alive, 0 where there are none."""

    work: str
    stage: str
    planned: int
    done: int
    quarantined: tuple[str, ...]
    blocks_per_s: float
    last_block_s_ago: float | None

    @property
    def left_s(self) -> float | None:
        """Estimate of the time that the rest takes, or None."""
        left = self.planned - self.done
        return left / self.blocks_per_s if left and self.blocks_per_s else None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What stands in a RUN folder; times in seconds."""

    run: Path
    surveyed: bool
    stages: tuple[StageStatus, ...]
    workers: tuple[dict[str, Any], ...]
    finished: tuple[str, ...]
    last_error: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self) | {"run": str(self.run)}
        for stage, plain in zip(self.stages, values["stages"], strict=True):
            ago = plain.pop("last_block_s_ago")
            plain |= {"left_s": stage.left_s, "last_block_s_ago": ago}
        return values

    def lines(self) -> list[str]:
        """Return the text for the screen."""
        wide = max([12, *(len(s.stage) for s in self.stages)])
        lines = [f"{'survey':{wide}} {'done' if self.surveyed else 'not kept'}"]
        if not self.stages:
            lines.append(f"{'blocks':{wide}} none was begun")
        for s in self.stages:
            line = f"{s.stage:{wide}} {s.done}/{s.planned} blocks ({s.done / s.planned:.1%})"
            line += f", {len(s.quarantined)} quarantined" if s.quarantined else ""
            if s.left_s is not None:
                line += f", {s.blocks_per_s:.3g} blocks/s, about {_duration(s.left_s)} left"
            if s.last_block_s_ago is not None:
                line += f", last block {_duration(s.last_block_s_ago)} ago"
            lines.append(line)
            lines += [f"{'':{wide}} quarantined: {key}" for key in s.quarantined[:SHOWN]]
        lines += [f"{'worker':{wide}} {w['host']}, process {w['pid']}, since {_date(w['since'])}" for w in self.workers]
        if not self.workers:
            lines.append(f"{'workers':{wide}} none")
        lines += [f"{'finished':{wide}} {name}" for name in self.finished]
        if self.last_error:
            lines.append(f"{'last error':{wide}} {self.last_error}")
        return lines


def status_of(run: Path) -> RunStatus:
    """Look at a RUN folder, also of a run that failed before its first block; a ConfigError if it is none."""
    stages, workers = [], []
    works = begun_folders(run) if (run / LOG).is_file() else work_folders(run)
    for work in works:
        alive = living(work / COORDINATION)
        workers += [{"host": each.host, "pid": each.pid, "since": each.since} for each in alive]
        stages += [_stage(work, folder, alive) for folder in ledger_folders(work)]
    finished = (path.name.removesuffix(SUFFIX) for path in sorted((run / CHECKSUMS).glob("*" + SUFFIX)))
    return RunStatus(
        run,
        any((work / SURVEY).exists() for work in works),
        tuple(stages),
        tuple(workers),
        finished=tuple(name for name in finished if (run.parent / name).exists()),
        last_error=_last_error(run / LOG),
    )


def _stage(work: Path, folder: Path, alive: list[Presence]) -> StageStatus:
    ledger = Ledger.existing(folder)
    processes = {_process(each.mark) for each in alive}
    rate, last = 0.0, None
    for path in folder.glob("*.jsonl"):
        recent = [fields for line, _ in deque(whole_lines(path, 0), RECENT) if "at" in (fields := _fields(line))]
        if recent:
            last = max(last or 0, recent[-1]["at"])
            seconds = sum(fields["seconds"] for fields in recent)
            if _process(path.stem) in processes and seconds > 0:
                rate += len(recent) / seconds
    quarantined = (path.stem for path in sorted((folder / QUARANTINE).glob("*.txt")))
    ago = None if last is None else max(0.0, time.time() - last)
    return StageStatus(
        work.name,
        stage_of(folder),
        ledger.planned,
        ledger.finished,
        quarantined=tuple(quarantined),
        blocks_per_s=rate,
        last_block_s_ago=ago,
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


def _last_error(log: Path) -> str | None:
    """The last line of the log that tells of an error or of why the run stopped."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if " ERROR " in line or " stopped: " in line), None)


def _duration(seconds: float) -> str:
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
