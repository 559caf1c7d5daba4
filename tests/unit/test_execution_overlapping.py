"""Writing one block while the next is computed: what overlaps, what does not, and what becomes of errors and stops."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from connectomics.core.errors import StorageError
from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.executors.overlapping import BEHIND_S, OverlappingExecutor
from connectomics.execution.stage import BEHIND_BYTES
from connectomics.execution.task import BlockFailure, BlockRecord, Computed

from small_runs import EXPECTED, job_in, labels, run

GRID = BlockGrid((4, 1, 1), (1, 1, 1), (0, 0, 0))
KEYS = [block.key for block in GRID]


def nothing(block: Block) -> None:
    """Nothing happens."""


@dataclass
class Recorded:
    """A task that writes down what is done, in order; ``computing`` and ``keeping`` may wait or raise."""

    computing: Callable[[Block], None] = nothing
    keeping: Callable[[Block], None] = nothing
    seconds: float = 0.0
    size_bytes: int = 1
    grid: BlockGrid = GRID
    name: str = "recorded"
    log: list[str] = field(default_factory=list)

    def process(self, block: Block) -> BlockRecord:
        return self.keep(self.compute(block))

    def compute(self, block: Block) -> Computed:
        self.computing(block)
        self.log.append(f"computed {block.key}")
        return Computed(block, {"labels": np.empty(self.size_bytes, np.uint8)}, 1, self.seconds)

    def keep(self, computed: Computed) -> BlockRecord:
        self.keeping(computed.block)
        self.log.append(f"kept {computed.block.key}")
        return BlockRecord(computed.block.key, {}, 1, 0.0)

    def outcomes(self) -> Iterator[BlockRecord | BlockFailure]:
        for outcome in OverlappingExecutor().run(self, GRID):
            self.log.append(f"told {outcome.block}")
            yield outcome


def test_a_block_is_kept_while_the_next_is_computed() -> None:
    reached = threading.Event()

    def computing(block: Block) -> None:
        if block.key == KEYS[1]:
            reached.set()

    def keeping(block: Block) -> None:
        assert block.key != KEYS[0] or reached.wait(20), "the second block was not begun"

    task = Recorded(computing, keeping)
    assert [outcome.block for outcome in task.outcomes()] == KEYS
    for key in KEYS:
        assert task.log.index(f"kept {key}") < task.log.index(f"told {key}")
    for key, following in itertools.pairwise(KEYS):
        assert task.log.index(f"told {key}") < task.log.index(f"kept {following}")


@pytest.mark.parametrize("task", [Recorded(seconds=BEHIND_S + 1), Recorded(size_bytes=BEHIND_BYTES + 1)])
def test_slow_and_large_blocks_are_told_before_the_next_is_begun(task: Recorded) -> None:
    list(task.outcomes())
    assert task.log == [f"{what} {key}" for key in KEYS for what in ("computed", "kept", "told")]


@pytest.mark.parametrize("where", ["computing", "keeping"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_fails_is_tried_once_more_and_stays_with_its_block(where: str, times: int) -> None:
    failed = []

    def fail(block: Block) -> None:
        if block.key == KEYS[1] and len(failed) < times:
            failed.append(threading.current_thread())
            raise ValueError("the voxels are odd")

    task = Recorded(**{where: fail})
    outcomes = list(task.outcomes())
    assert [outcome.block for outcome in outcomes] == KEYS
    assert [isinstance(outcome, BlockFailure) for outcome in outcomes] == [False, times == 2, False, False]
    if times == 2:
        assert isinstance(outcomes[1], BlockFailure)
        assert "the voxels are odd" in outcomes[1].reason
        assert "in fail" in outcomes[1].trace
        assert failed[1] is threading.main_thread(), "the network is not used by two threads"


def test_a_disk_that_is_full_ends_the_run() -> None:
    def refuse(block: Block) -> None:
        if block.key == KEYS[1]:
            raise OSError(28, "No space left on device")

    told = []
    with pytest.raises(StorageError):
        told.extend(outcome.block for outcome in Recorded(keeping=refuse).outcomes())
    assert f"told {KEYS[2]}" not in told


def test_nothing_is_in_hand_while_others_are_waited_for() -> None:
    told: list[str] = []

    def blocks() -> Iterator[Block | None]:
        for number, block in enumerate(GRID):
            yield block
            yield None
            assert told == KEYS[: number + 1]

    for outcome in OverlappingExecutor().run(Recorded(), blocks()):
        told.append(outcome.block)
    assert told == KEYS


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_was_written_is_told_before_the_run_stops(stop: type[BaseException]) -> None:
    def interrupted(block: Block) -> None:
        if block.key == KEYS[2]:
            raise stop

    told = []
    with pytest.raises(stop):
        for outcome in Recorded(interrupted).outcomes():
            told.append(outcome.block)
    assert told == KEYS[:2]


def test_a_whole_run_gives_the_same_labels(tmp_path: Path) -> None:
    run(tmp_path, job_in(tmp_path), OverlappingExecutor())
    assert (labels(tmp_path) == EXPECTED).all()
