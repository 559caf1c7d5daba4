"""What ``connectomics status`` says of a RUN folder, for the screen and as JSON; ``status.py`` finds it out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from connectomics.execution.lease import REVOKED

SHOWN = 10  # blocks or processes of a kind that are named
MINUTE_S, HOUR_S = 60, 3600
HERE, SILENT, ENDED = "here", "silent", "ended"


@dataclass(frozen=True, slots=True)
class TroubledBlock:
    """A block that is not done: how many processes ended that had it in hand, and why it failed in this attempt."""

    block: str
    deaths: int
    failed: str

    def lines(self) -> Iterator[str]:
        """Return the text for the screen."""
        if self.failed:
            yield f"failed in this attempt: {self.block}, {self.failed}"
        if self.deaths:
            who = "a process" if self.deaths == 1 else f"{self.deaths} processes"
            yield f"{self.block} was in hand when {who} ended"


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
    troubled: tuple[TroubledBlock, ...] = ()

    @property
    def left_s(self) -> float | None:
        """Estimate of the time that the rest takes, or None."""
        left = self.planned - self.done
        return left / self.blocks_per_s if left and self.blocks_per_s else None

    def lines(self, wide: int, in_hand: int) -> Iterator[str]:
        """Return the text for the screen."""
        line = f"{self.stage:{wide}} {self.done}/{self.planned} blocks ({self.done / self.planned:.1%})"
        line += f", {in_hand} in hand" if in_hand else ""
        line += f", {len(self.quarantined)} quarantined" if self.quarantined else ""
        if self.left_s is not None:
            line += f", {self.blocks_per_s:.3g} blocks/s, about {_duration(self.left_s)} left"
        if self.last_block_s_ago is not None:
            line += f", last block {_duration(self.last_block_s_ago)} ago"
        yield line
        yield from (f"{'':{wide}} quarantined: {key}" for key in self.quarantined[:SHOWN])
        yield from (f"{'':{wide}} {text}" for each in self.troubled[:SHOWN] for text in each.lines())


@dataclass(frozen=True, slots=True)
class InHand:
    """A lease that a process holds since some time: on a block of a stage, or the single writer's on no block."""

    stage: str
    block: str
    since: int

    def __str__(self) -> str:
        """Return the text for the screen."""
        return f"{f'{self.stage} {self.block}'.rstrip()} for {_duration(max(0.0, time.time() - self.since))}"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A process that takes part, or that took part and did not end in an orderly way.

    ``state`` is here, silent (its record stands still), ended (it is no more, and no other has noticed yet) or revoked.
    ``unchanged_s`` tells how long ago its record changed, ``limit_s`` after how long of silence others take over.
    """

    host: str
    pid: int
    since: int
    state: str
    unchanged_s: float
    limit_s: float
    in_hand: tuple[InHand, ...]

    @property
    def present(self) -> bool:
        """Whether nothing says that it ended."""
        return self.state in (HERE, SILENT)

    def line(self) -> str:
        """Return the text for the screen."""
        text, ago = (
            f"{self.host or 'unknown host'}, process {self.pid}, since {_date(self.since)}",
            _duration(self.unchanged_s),
        )
        if self.state == SILENT:
            text += f"; no sign of life for {ago}, others take over after {_duration(self.limit_s)}"
        elif self.state == REVOKED:
            text += f"; counts as gone since {ago}"
        elif self.state == ENDED:
            text += f"; ended without a word, its last sign of life {ago} ago"
        held = [str(each) for each in self.in_hand[:SHOWN]]
        held += [f"{len(self.in_hand) - SHOWN} more"] if len(self.in_hand) > SHOWN else []
        return text + (f"; {'has' if self.present else 'had'} in hand: {', '.join(held)}" if held else "")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What stands in a RUN folder; times in seconds. ``gone`` are processes that did not end in an orderly way."""

    run: Path
    surveyed: bool
    stages: tuple[StageStatus, ...]
    workers: tuple[WorkerStatus, ...]
    gone: tuple[WorkerStatus, ...]
    finished: tuple[str, ...]
    last_error: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self) | {"run": str(self.run)}
        for stage, plain in zip(self.stages, values["stages"], strict=True):
            ago, troubled = plain.pop("last_block_s_ago"), plain.pop("troubled")
            plain |= {"left_s": stage.left_s, "last_block_s_ago": ago, "troubled": troubled}
        return values

    def lines(self) -> list[str]:
        """Return the text for the screen."""
        wide = max([12, *(len(s.stage) for s in self.stages)])
        lines = [f"{'survey':{wide}} {'done' if self.surveyed else 'not kept'}"]
        if not self.stages:
            lines.append(f"{'blocks':{wide}} none was begun")
        held = [each.stage for worker in self.workers for each in worker.in_hand]
        for stage in self.stages:
            lines += stage.lines(wide, held.count(stage.stage))
        lines += [f"{'worker':{wide}} {worker.line()}" for worker in self.workers]
        if not self.workers:
            lines.append(f"{'workers':{wide}} none")
        lines += [f"{'gone':{wide}} {worker.line()}" for worker in self.gone[-SHOWN:]]
        lines += [f"{'finished':{wide}} {name}" for name in self.finished]
        if self.last_error:
            lines.append(f"{'last error':{wide}} {self.last_error}")
        return lines


def _duration(seconds: float) -> str:
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
