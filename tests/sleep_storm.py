"""Processes that are stopped and go on: jobs, moments, and what must be true when all have ended.

A *moment* is a place in the program where a process stops itself. Several are tried side by side, since most of the
time passes with waiting for the limit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import ForkServer, Running

from small_jobs import finals

LIMIT_S = 2.0
DEADLINE_S = 120.0
POLL_S = 0.02
KEPT_LAST = re.compile(r"/ledger_(labels|probabilities|objects|filter)\.")
"""Ledgers of what is built in a staging folder: kept when all is published, so that who did it stays known, or lost."""
Steps = Iterator[None]
"""A trial that goes on whenever it is its turn."""


@dataclass(frozen=True)
class Moment:
    """A call of a function at which a process stops itself, see ``sleep_hooks.stop_at``."""

    name: str
    at: str
    number: int = 1
    text: str = ""
    after: bool = False

    @property
    def stop(self) -> dict[str, Any]:
        """What the child is told."""
        return {"at": self.at, "number": self.number, "text": self.text, "after": self.after}


@dataclass
class Job:
    """One command and its undisturbed result.

    ``words`` gives the command for an output folder, ``prepared`` goes to ``sleep_hooks.prepare`` in all its processes.
    """

    server: ForkServer
    folder: Path
    words: Callable[[Path], list[str]]
    reference: dict[str, bytes] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    prepared: dict[str, Any] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _started: list[Running] = field(default_factory=list)

    def run_undisturbed(self) -> None:
        """Find out what the job makes and leaves."""
        output = self.folder / "undisturbed"
        child = self.start(output)
        side_by_side([("the undisturbed process", wait(child))])
        require_ended(child)
        self.reference, self.left = finals(output), left_in(output)

    def start(self, output: Path, **more: Any) -> Running:
        """Start a process of the command; ``prepared`` goes to ``sleep_hooks.prepare``."""
        given = self.prepared | more.pop("prepared", {})
        name = f"{output.name}_{next(self._numbers)}_"
        words = [*self.words(output), f"system.stale_after_s={LIMIT_S}"]
        child = self.server.start(words, name, prepared=("sleep_hooks", given), watched=output, **more)
        self._started.append(child)
        return child

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """No process outlives this."""
        try:
            yield
        finally:
            for child in self._started:
                child.send(signal.SIGKILL)


def left_in(output: Path) -> set[str]:
    """All that a job leaves beside the voxels; names of processes do not count."""
    paths = (path.relative_to(output) for path in output.rglob("*"))
    kept = (path for path in paths if path.parts[0].endswith((".run", ".claims")) or len(path.parts) == 1)
    of_processes = {".jsonl": "any.jsonl", ".json": "any.json"}

    def called(path: Path) -> Path:
        own = path.suffix == ".jsonl" or path.parent.name == "reports"
        return path.parent / of_processes.get(path.suffix, path.name) if own else path

    return {called(path).as_posix() for path in kept}


def wait(child: Running, *states: str, deadline_s: float = DEADLINE_S) -> Steps:
    """Go on when a child has ended or is in one of these states; a child that does neither is an error."""
    deadline = time.monotonic() + deadline_s
    while isinstance(state := child.state, str) and state not in states:
        assert time.monotonic() < deadline, f"still {state} after {deadline_s} s: {child.printed()[-3000:]}"
        yield


def require_ended(child: Running, code: int = 0, who: str = "the process") -> None:
    """It ended by itself, with this exit code and without a traceback."""
    told = child.printed() + child.printed("stdout")
    assert child.state == code, f"{who} ended with {child.state}: {told[-3000:]}"
    assert "Traceback" not in told and "quarantined" not in told, f"{who}: {told[-3000:]}"


def require_settled(job: Job, output: Path, when: str, *, reported: bool = True) -> None:
    """All final outputs are those of one undisturbed process, and nothing else is left than what that left."""
    require_same(job, output, when)
    left = left_in(output)
    lacking = {path for path in job.left - left if not KEPT_LAST.search(path)}
    lacking = lacking if reported else {path for path in lacking if not path.endswith("report.json")}
    assert left <= job.left and not lacking, (
        f"{when}: {sorted(left - job.left)[:9]} too much, {sorted(lacking)[:9]} few"
    )


def require_same(job: Job, output: Path, when: str) -> None:
    """All final outputs are there with the bytes of one undisturbed process; the records of them are whole."""
    found = finals(output)
    bad = [name for name in sorted(found.keys() | job.reference) if found.get(name) != job.reference.get(name)]
    assert not bad, f"{when}: {len(bad)} of {len(job.reference)} files differ, {bad[:5]}"
    for report in output.glob("*.run/report.json"):
        json.loads(report.read_text())
    for record in output.glob("*.run/checksums/*"):
        checked = subprocess.run(
            ["sha256sum", "--check", "--quiet", "--strict", record], cwd=output, capture_output=True, text=True
        )
        assert checked.returncode == 0, f"{when}: {record.name}: {checked.stdout[:500]}{checked.stderr[:500]}"


def sleeping(job: Job, moment: Moment, *, early: bool = False, prepared: dict[str, Any] | None = None) -> Steps:
    """One process stops at a moment; another of the same command ends meanwhile; then the first goes on.

    With ``early`` the other one has begun together with it. ``prepared`` stands for the moment where it is another
    kind of one.
    """
    output = job.folder / moment.name.replace(" ", "_")
    sleeper = job.start(output, prepared=prepared or {"stops": [moment.stop]})
    other = job.start(output) if early else sleeper
    yield from wait(sleeper, "stopped")
    if sleeper.state == 0 and early:  # the other one has done what it would have stopped at
        yield from wait(other)
        require_ended(other, who="the other process")
        yield from require_finished(job, output)
        return
    assert sleeper.state == "stopped", f"the moment is never reached: {sleeper.state}, {sleeper.printed()[-3000:]}"
    other = other if early else job.start(output)
    yield from wait(other)
    require_ended(other, who="the other process")
    require_same(job, output, "when the other process had ended")
    sleeper.send(signal.SIGCONT)
    yield from wait(sleeper)
    require_ended(sleeper, who="the sleeper")
    yield from require_finished(job, output)


def overtaking(job: Job, moments: tuple[Moment, Moment], name: str, hold_s: float) -> Steps:
    """One process stops; another takes over and stops in the middle of it; the first goes on, and later the other."""
    output = job.folder / name
    first = job.start(output, prepared={"stops": [moments[0].stop]})
    yield from wait(first, "stopped")
    second = job.start(output, prepared={"stops": [moments[1].stop]})
    yield from wait(second, "stopped")
    first.send(signal.SIGCONT)
    yield from pause(hold_s)
    second.send(signal.SIGCONT)
    for who, child in (("the first process", first), ("the second process", second)):
        yield from wait(child)
        require_ended(child, who=who)
    yield from require_finished(job, output)


def asleep_together(job: Job, moment: Moment, name: str, count: int) -> Steps:
    """Several processes stop when the first is at a moment, as if the machine slept, and go on at once."""
    output = job.folder / name
    children = [job.start(output, prepared={"stops": [moment.stop]}), *(job.start(output) for _ in range(count - 1))]
    yield from wait(children[0], "stopped")
    for child in children:
        child.send(signal.SIGSTOP)
    yield from pause(1.3 * LIMIT_S)
    for child in children:
        child.send(signal.SIGCONT)
    for number, child in enumerate(children):
        yield from wait(child)
        require_ended(child, who=f"process {number} of {count}")
    yield from require_finished(job, output)


def pause(seconds: float) -> Steps:
    """Go on after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def require_finished(job: Job, output: Path, *, tidied: bool = True) -> Steps:
    """What is left is right, and running once more says that all is finished and changes nothing.

    Where the last ones were killed nothing can be tidied until somebody looks again, and no report may be left.
    """
    if tidied:
        require_settled(job, output, "when all had ended")
    again = job.start(output)
    yield from wait(again)
    require_ended(again, who="the process that looks again")
    assert "Skipped 1/1" in again.printed(), again.printed()[-3000:]
    require_settled(job, output, "after looking again", reported=tidied)


def side_by_side(trials: Iterable[tuple[str, Steps]], at_once: int = 4) -> list[str]:
    """Try all, several at the same time; what went wrong, each with its name."""
    waiting, running, wrong = iter(trials), dict[str, Steps](), list[str]()
    while True:
        for name, trial in itertools.islice(waiting, max(0, at_once - len(running))):
            running[name] = trial
        if not running:
            return wrong
        for name, trial in list(running.items()):
            try:
                next(trial)
            except StopIteration:
                del running[name]
            except AssertionError as error:
                del running[name]
                wrong.append(f"{name}: {error}")
        time.sleep(POLL_S)
