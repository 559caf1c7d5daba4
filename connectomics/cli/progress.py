"""Progress with an estimate of the remaining time, drawn on stderr by rich; plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from connectomics.core.text import visible
from connectomics.jobs.outcome import VolumeOutcome

PLAIN_EVERY_S = 30.0  # seconds between lines where there is no terminal
ESTIMATED_OVER_S = 86_400.0  # blocks take minutes each, and rich looks back over half a minute only


class ProgressBar:
    """Draws volumes and the blocks of the current volume; a context manager and an ``Observer``."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=ESTIMATED_OVER_S,
            disable=not self._console.is_terminal,
        )
        self._volumes: TaskID | None = None
        self._blocks: TaskID | None = None
        self._began = self._said = time.monotonic()
        self._count = self._total = 0
        self._first: tuple[int, float] | None = None  # blocks of this volume that were finished before, and when

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def listed(self, total: int, finished: int) -> None:
        """Say how many volumes are skipped and how many come."""
        self._total = total - finished
        self._console.print(f"Skipped {finished}/{total} finished, processing {self._total}")
        self._volumes = self._bars.add_task("volumes", total=self._total)
        self._blocks = self._bars.add_task("", total=None, visible=False)

    def began(self, name: str) -> None:
        """A volume begins."""
        self._first = None
        if self._blocks is not None:
            self._bars.reset(self._blocks, description=visible(name)[-40:], total=None, visible=False)

    def block(self, finished: int, planned: int) -> None:
        """A block of the current volume is on disk."""
        if self._blocks is not None:
            self._bars.update(self._blocks, completed=finished, total=planned, visible=planned > 1)
        self._say(f"block {finished}/{planned}", self._left_of_volume(finished, planned))

    def ended(self, outcome: VolumeOutcome) -> None:
        """A volume has ended."""
        if outcome.state == "skipped":
            return
        self._count += 1
        if self._volumes is not None:
            self._bars.advance(self._volumes)
        if outcome.state == "failed":
            self._console.print(visible(f"failed: {outcome.name}: {outcome.reason}"), style="red", soft_wrap=True)
        left = (time.monotonic() - self._began) / self._count * (self._total - self._count)
        self._say(f"volume {self._count}/{self._total}", f", {left:.0f} s left")

    def _left_of_volume(self, finished: int, planned: int) -> str:
        """How long the blocks that are left will take, judged by those computed since the volume began."""
        now = time.monotonic()
        if self._first is None or finished < self._first[0]:  # a stage begins, or blocks were undone
            self._first = (finished, now)
        before, since = self._first
        if finished == before:
            return ""
        return f", {(now - since) / (finished - before) * (planned - finished):.0f} s left in this volume"

    def _say(self, text: str, left: str) -> None:
        """Where nothing is drawn, a line now and then."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < PLAIN_EVERY_S:
            return
        self._said = now
        self._console.print(f"{text}, {now - self._began:.0f} s{left}")
