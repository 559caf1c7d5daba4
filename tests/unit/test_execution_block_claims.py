"""Who has which block: one that was lost is not set aside; what is in hand is given back when a stage ends early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.block_claims import BlockClaims
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import DiskStore
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.lease import LeaseLostError
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import run_blocks
from connectomics.execution.task import BlockFailure, BlockRecord, Task
from connectomics.execution.worker import Time, Worker

LIMIT_S = 8.0
SHARDS = Shards("nothing.blocks-", 4)


@dataclass(frozen=True)
class Nothing:
    """A task whose blocks are done at once, but one that a disk refuses."""

    refused: str = ""
    name: str = "nothing"

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid((4, 1, 1), (1, 1, 1))

    def process(self, block: Block) -> BlockRecord:
        if block.key == self.refused:
            raise OSError(28, "No space left on device")
        return BlockRecord(block.key, {}, 0, 0.0)


class Hours:
    """A clock that goes on as somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = ledger_in(tmp_path)
    yield opened
    opened.close()


def ledger_in(work: Path) -> Ledger:
    return Ledger(work / "ledger_nothing", "key", {}, BlockPlan((1, 1, 1), (1, 1, 1)), volume=(4, 1, 1))


def worker_in(work: Path, clock: Hours) -> Worker:
    """One that is here and never shows that it is alive."""
    folder = work / "coordination"
    folder.mkdir(exist_ok=True)
    worker = Worker(DiskStore(folder), limit_s=LIMIT_S, clock=Time(lambda: clock.now, clock.sleep))
    worker.join()
    return worker


def take_over(worker: Worker, lease: str) -> None:
    """Wait until a lease is to be had."""
    for pause in worker.pauses():
        if worker.acquire(lease):
            return
        worker.sleep(pause)


def failure_of(task: Task, key: str) -> BlockFailure:
    return BlockFailure(key, task.grid.block((0, 0, 0)).core, "its folder is gone", "")


def test_a_block_that_another_has_taken_over_is_not_set_aside(tmp_path: Path, ledger: Ledger) -> None:
    clock, task = Hours(), Nothing()
    sleeper, other = worker_in(tmp_path, clock), worker_in(tmp_path, clock)
    claims = BlockClaims(task, ledger, sleeper)
    block = next(claims.results(SerialExecutor())).block
    lease = SHARDS.lease(int(block[0]))
    take_over(other, lease)
    with pytest.raises(LeaseLostError):
        claims.fail(failure_of(task, block))
    assert not list(ledger.folder.glob("quarantine*"))
    assert other.failure(SHARDS.failed(int(block[0]))) is None
    other.confirm(lease)


class Ahead:
    """An executor that takes all blocks before it gives any of them back."""

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        taken = [block for _, block in zip(range(4), blocks, strict=False)]
        yield from SerialExecutor().run(task, taken)


def test_blocks_in_hand_are_given_back_when_a_stage_ends_early(tmp_path: Path, ledger: Ledger) -> None:
    """Else this process would not do them in its next attempt, and nobody else as long as it lives."""
    clock = Hours()
    one, other = worker_in(tmp_path, clock), worker_in(tmp_path, clock)
    with pytest.raises(Exception, match="No space left"):
        run_blocks(Nothing(refused="2-0-0"), ledger, Ahead(), one, on_block=lambda finished, planned: None)
    assert ledger.finished == 2
    assert other.acquire(SHARDS.lease(2)) and other.acquire(SHARDS.lease(3))
    other.leave()
    done = run_blocks(Nothing(), ledger, SerialExecutor(), one, on_block=lambda finished, planned: None)
    assert (done.done, ledger.finished) == (2, 4)


def test_each_builder_has_leases_of_its_own(tmp_path: Path) -> None:
    """A builder that was replaced, and wakes up, can neither take nor set aside a block of its successor."""
    names = {Shards.of(tmp_path / f / "ledger_a.n5.0", 4).lease(3) for f in ("staging.0.m", "staging.1.n")}
    assert names == {"staging.0.m.a.n5.0.blocks-3", "staging.1.n.a.n5.0.blocks-3"}
    assert Shards.of(tmp_path / "ledger", 4).lease(3) == "predict.blocks-3"
    assert Shards.of(tmp_path / "ledger_a.cut", 4).lease(3) == "a.cut.blocks-3"
