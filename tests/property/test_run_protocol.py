"""The run protocol as a state machine: processes stand still, die, lose replies and have clocks of their own.

Never do two runs publish other bytes under one name, never is a block lost, and all that still live come to an end.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation import Process, World, interrupted

from connectomics.core.errors import ConnectomicsError, VolumeError
from connectomics.core.files import discard
from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution import append_log, block_shards, lease, name_claims, publishing, worker
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.name_claims import NameClaims
from connectomics.execution.publishing import Staging
from connectomics.execution.runner import run_blocks, void_lost
from connectomics.execution.task import BlockRecord
from connectomics.execution.worker import Time, Worker
from connectomics.runs.perseverance import until_it_stands

LIMIT_S = 2.0
BLOCKS = 4  # one shard, which others may cut
KEYS = ("a", "b")
FINAL = "v"
MOST_PROCESSES = 4
MOST_STEPS = 150  # more than a process takes alone from its start to its end
PROCESSES = st.integers(0, MOST_PROCESSES - 1)
RATES, OFFSETS = st.sampled_from([0.9, 1.0, 1.1]), st.sampled_from([-3600.0, 0.0, 1e6])


def content_of(key: str, block: str) -> bytes:
    """What a run of this key computes for a block."""
    return f"{key} {block}".encode()


class Task:
    """Blocks that are files."""

    name = "predict"

    def __init__(self, world: World, key: str, store: Path) -> None:
        self.grid = BlockGrid((BLOCKS, 1, 1), (1, 1, 1))
        self._world, self._key, self._store = world, key, store

    def process(self, block: Block) -> BlockRecord:
        self._world.point()
        content = content_of(self._key, block.key)
        self._store.mkdir(exist_ok=True)
        temporary = self._store / f".{block.key}{id(block)}"
        temporary.write_bytes(content)
        temporary.replace(self._store / block.key)
        self._world.point()
        return BlockRecord(block.key, {f"store/{block.key}": sha256(content).hexdigest()}, 1, 0.0)


class Run:
    """One process of a run, as ``runs.volume`` is written, with files for shards."""

    def __init__(self, world: World, process: Process, key: str, folder: Path, log: list[tuple[str, str]]) -> None:
        self.world, self.process, self.key, self.folder, self.log = world, process, key, folder, log
        self.work = folder / f"{FINAL}.run" / key
        self.ended = False

    def __call__(self) -> None:
        try:
            self._run()
            assert ("published", self.key) in self.log, "it ends when its result has stood; others may replace it then"
            self.process.outcome = "done"
        except ConnectomicsError as error:
            self.process.outcome = f"refused: {error}"
        finally:
            self.ended = True

    def _run(self) -> None:
        (self.work / "coordination").mkdir(parents=True, exist_ok=True)
        store = self.world.store(self.work / "coordination")
        here = Worker(store, limit_s=LIMIT_S, clock=Time(self.world.now, self.world.sleep))
        here.join()
        self.world.start(self.process, lambda: self._renew(here))
        with NameClaims(self.folder, [(FINAL, self.key)], self.work, here) as claims:
            self.log.append(("claimed", self.key))
            until_it_stands(
                lambda: self._attempt(here, claims) or True, lambda: standing(self.folder) == self.key or None
            )
        here.leave()
        if worker.is_deserted(self.work / "coordination"):
            discard(self.work / "store")

    def _renew(self, here: Worker) -> None:
        while not self.ended:
            self.world.sleep(LIMIT_S / lease.RENEWALS)
            for renew in here.renewals:
                renew()

    def _attempt(self, here: Worker, claims: NameClaims) -> None:
        store = self.work / "store"
        plan = BlockPlan((1, 1, 1), (1, 1, 1))
        with here.alone("writer"):
            ledger = Ledger(self.work / "ledger", self.key, {}, plan, (BLOCKS, 1, 1))
            if standing(self.folder) != self.key:
                void_lost(ledger, self.work, ["store"])
        with contextlib.closing(ledger):
            blocks = run_blocks(Task(self.world, self.key, store), ledger, SerialExecutor(), here, lambda a, b: None)
            assert not blocks.failures
            with here.alone("writer"), Staging(self.work, here, "writer", claims.confirm) as staging:
                if standing(self.folder) == self.key:
                    return
                place = staging.place("out")
                place.mkdir(exist_ok=True)
                for block in ledger.grid:
                    self.world.point()
                    shard = store / block.key
                    if not shard.exists():
                        raise VolumeError(f"{shard}: is missing")
                    (place / block.key).write_bytes(shard.read_bytes())
                staging.publish("out", self.folder / FINAL)
                self.world.point()
                if staging.is_unobserved():
                    self.world.point()
                    discard(store)


def standing(folder: Path) -> str | None:
    """Which key's result stands under the final name; an assertion where it is not whole."""
    final = folder / FINAL
    for key in KEYS:
        if final.is_dir() and (final / "0-0-0").read_bytes() == content_of(key, "0-0-0"):
            found = {path.name: path.read_bytes() for path in final.iterdir()}
            assert found == {f"{z}-0-0": content_of(key, f"{z}-0-0") for z in range(BLOCKS)}
            return key
    assert not final.exists()
    return None


class Protocol(RuleBasedStateMachine):
    """Processes of two runs that want one name."""

    keys: tuple[str, ...] = KEYS

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.log: list[tuple[str, str]] = []
        self.dead: set[str] = set()
        self.patches = contextlib.ExitStack()
        for module in (worker, name_claims):
            self.patches.enter_context(patch.object(module, "DiskStore", self.world.store))
        for module in (worker, lease):
            self.patches.enter_context(patch.object(module, "threading", self.world.threading()))
        self.patches.enter_context(patch.object(block_shards, "SHARDS", 1))
        marks = itertools.count()
        for module in (append_log, lease):
            self.patches.enter_context(patch.object(module, "new_mark", lambda: f"mark-{next(marks):04}"))
        self.patches.enter_context(patch.object(lease, "is_alive", lambda mark: False))
        self.patches.enter_context(patch.object(lease, "is_dead", lambda mark: False))
        real = publishing.rename

        def rename(source: Path | str, target: Path | str, *folders: int | None) -> None:
            here = self.world.here()
            assert here is not None
            here.process.publishes = target == self.folder / FINAL
            self.world.point()
            here.process.publishes = False
            real(source, target, *folders)
            if target == self.folder / FINAL:
                published = standing(self.folder)
                assert published is not None
                self._require_claimed(published)
                self.log.append(("published", published))
            self.world.point()

        self.patches.enter_context(patch.object(publishing, "rename", rename))
        for name in ("rename", "rmdir", "mkdir"):
            self.patches.enter_context(interrupted(self.world, Path, name))

    def _require_claimed(self, key: str) -> None:
        """Whoever publishes has claimed the name since another run published."""
        others = [i for i, event in enumerate(self.log) if event[0] == "published" and event[1] != key]
        claims = [i for i, event in enumerate(self.log) if event == ("claimed", key)]
        assert not others or claims[-1] > others[-1], f"{key} overwrites: {self.log}"

    def _start(self, key: str, rate: float, offset: float) -> None:
        process = Process(f"{key}{len(self.world.processes)}", rate, offset)
        self.world.start(process, Run(self.world, process, key, self.folder, self.log))

    @initialize(rate=RATES, offset=OFFSETS)
    def begin(self, rate: float, offset: float) -> None:
        for key in KEYS:
            self._start(key if key in self.keys else self.keys[0], rate, offset)

    @rule(key=st.sampled_from(KEYS), rate=RATES, offset=OFFSETS)
    @precondition(lambda self: len(self.world.processes) < MOST_PROCESSES)
    def start(self, key: str, rate: float, offset: float) -> None:
        self._start(key if key in self.keys else self.keys[0], rate, offset)

    @rule(number=PROCESSES, steps=st.integers(1, 120))
    def run(self, number: int, steps: int) -> None:
        """One process does some of the hundred steps that it takes alone from its start to its end."""
        if number < len(self.world.processes):
            self.world.run(self.world.processes[number], steps)

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.1, 2.5]))
    def wait(self, seconds: float) -> None:
        """Time passes, and nobody does anything."""
        self.world.time += seconds

    @rule(number=PROCESSES)
    def run_until_it_publishes(self, number: int) -> None:
        """One process runs until only the rename is to be done."""
        if number < len(self.world.processes):
            process = self.world.processes[number]
            for _ in range(MOST_STEPS):
                if not process.publishes:
                    self.world.run(process, 1)

    @rule(number=PROCESSES, steps=st.integers(40, 140))
    def outlast(self, number: int, steps: int) -> None:
        """One process runs while all others stand still for longer than the limit."""
        if number < len(self.world.processes):
            for _ in range(steps // 10):
                self.world.run(self.world.processes[number], 10)
                self.world.time += LIMIT_S / 6

    @rule(number=PROCESSES)
    def kill(self, number: int) -> None:
        if number < len(self.world.processes):
            self.world.kill(self.world.processes[number])

    @rule(kind=st.sampled_from(["error", "lost"]))
    def fail(self, kind: str) -> None:
        """The next operation on a record fails for a moment, or its reply is lost."""
        self.world.faults.append(kind)

    @invariant()
    def what_stands_stays(self) -> None:
        """A result that a process has ended with is there from then on."""
        if any(process.outcome == "done" for process in self.world.processes) and len(self.keys) == 1:
            assert standing(self.folder) is not None

    def teardown(self) -> None:
        try:
            self.world.finish()
            outcomes = {process.name: process.outcome for process in self.world.processes if not process.killed}
            wrong = {name: outcome for name, outcome in outcomes.items() if outcome.startswith("wrong")}
            assert not wrong, wrong
            if len(self.keys) == 1:
                assert set(outcomes.values()) <= {"done"}, outcomes
            self.what_stands_stays()
        finally:
            self.world.close()
            self.patches.close()
            shutil.rmtree(self.folder)


class OneRun(Protocol):
    """Processes of one run: none is ever refused."""

    keys = ("a",)


def examples(count: int, steps: int) -> settings:
    return settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("CRITICAL", logger="connectomics"):
        yield


@pytest.mark.parametrize("machine", [OneRun, Protocol])
def test_no_interleaving_breaks_the_protocol(machine: type[Protocol]) -> None:
    run_state_machine_as_test(machine, settings=examples(30, 40))


@pytest.mark.long
@pytest.mark.parametrize("machine", [OneRun, Protocol])
def test_no_interleaving_of_many_breaks_the_protocol(machine: type[Protocol]) -> None:
    run_state_machine_as_test(machine, settings=examples(1500, 60))
