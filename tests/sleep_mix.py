"""Kills, stops, continues and full disks in random order on runs with several processes; always the same bytes.

As a command: ``python tests/sleep_mix.py EVENTS SEED``, which tells what it did and found.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import Running, end
from sleep_storm import LIMIT_S, Job, Steps, pause, require_ended, require_finished, require_same, side_by_side, wait
from storm_jobs import EVERYTHING, decoding, labelling

MOST = 3
PAUSE_S = (0.02, 0.6)
KINDS = ("kill", "stop", "stop long", "continue", "start", "start on a full disk")
WEIGHTS = (2, 3, 2, 4, 4, 1)
FULL_BYTES = (3_000, 20_000)
"""How large files may grow for a process whose disk is full; what it says goes into a file, too."""


@dataclass
class Mix:
    """What is done to the processes of one run after the other, until there were so many events."""

    job: Job
    seed: int
    events: int
    done: Counter[str] = field(default_factory=Counter)
    runs: int = 0

    def trial(self) -> Steps:
        """Do it; an AssertionError tells what went wrong."""
        generator = random.Random(self.seed)
        while self.done.total() < self.events:
            self.runs += 1
            yield from self._run(generator, self.job.folder / f"mix_{self.seed}_{self.runs}")

    def _run(self, generator: random.Random, output: Path) -> Steps:
        """One run from its start until it is finished, whatever happens to its processes."""
        crew = _Crew(self.job, output)
        crew.start()
        while not crew.is_over():
            yield from pause(generator.uniform(*PAUSE_S))
            kind = generator.choices(KINDS, WEIGHTS)[0]
            if crew.do(kind, generator):
                self.done[kind] += 1
            if kind == "stop long":
                yield from pause(1.2 * LIMIT_S)
        yield from crew.end()
        require_same(self.job, output, "when all had ended")
        yield from require_finished(self.job, output, tidied=not crew.victims)
        shutil.rmtree(output)


@dataclass
class _Crew:
    """The processes of a run."""

    job: Job
    output: Path
    living: list[Running] = field(default_factory=list)
    victims: set[int] = field(default_factory=set)
    poor: set[int] = field(default_factory=set)
    over: bool = False

    def start(self, file_limit_bytes: int | None = None) -> None:
        child = self.job.start(self.output, file_limit_bytes=file_limit_bytes)
        self.living.append(child)
        if file_limit_bytes is not None:
            self.poor.add(child.pid)

    def is_over(self) -> bool:
        """Whether a process has ended with success; those that ended are looked at and let go."""
        for child in list(self.living):
            if not isinstance(child.state, str):
                self.living.remove(child)
                self._require_right_end(child)
        return self.over

    def do(self, kind: str, generator: random.Random) -> bool:
        """Let something happen; False where there is nobody it could happen to."""
        states = {child: child.state for child in self.living}
        if kind.startswith("start"):
            if len(states) < MOST:
                self.start(generator.randint(*FULL_BYTES) if "full" in kind else None)
            return len(states) < MOST
        wanted = "stopped" if kind == "continue" else "running"
        able = [child for child, state in states.items() if state == wanted or (kind == "kill" and state == "stopped")]
        if not able:
            return False
        child = generator.choice(able)
        if kind == "kill":
            self.victims.add(child.pid)
        child.send({"kill": signal.SIGKILL, "continue": signal.SIGCONT}.get(kind, signal.SIGSTOP))
        return True

    def end(self) -> Iterator[None]:
        """Let all go on; each must end rightly."""
        while self.living:
            for child in self.living:
                if child.state == "stopped":
                    child.send(signal.SIGCONT)
            yield from wait(self.living[0], "stopped")
            self.is_over()

    def _require_right_end(self, child: Running) -> None:
        if child.pid in self.victims and child.state == -signal.SIGKILL:
            return
        if child.pid in self.poor and child.state == 3:
            require_ended(child, 3, "the process whose disk is full")
            return
        require_ended(child, 0, "a process that nobody killed")
        self.over = True


def main(events: int, seed: int) -> int:
    """Mix on a run through every stage and on decodings, side by side; print what was done and what went wrong."""
    with labelling(EVERYTHING, masked=True) as everything, decoding("h5,zarr,tiff,zarr2,n5,precomputed") as objects:
        mixes = [Mix(everything, seed, events // 2), Mix(objects, seed + 1, events - events // 2)]
        wrong = side_by_side(((f"seed {mix.seed}", mix.trial()) for mix in mixes), at_once=2)
    end()
    told = [f"seed {mix.seed}: {mix.done.total()} events, {dict(mix.done)}, in {mix.runs} runs" for mix in mixes]
    sys.stdout.write("\n".join([*told, *wrong]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
