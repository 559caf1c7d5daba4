"""Shards of blocks: whoever has none takes half of another's, and no block is forgotten that a process cut off."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.block_shards import Shards, cut_point
from connectomics.execution.coordination import DiskStore
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.lease import LIMIT_S, Lease, Stretch, packed
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.task import BlockRecord
from connectomics.execution.worker import Worker

BLOCKS = 1100  # 4 in a shard, at first
FOREIGN = "0123abcd-77-5-aaaaaaaa"  # a process of another machine


@dataclass
class Marking:
    """A task that notes its blocks."""

    done: list[int] = field(default_factory=list)
    name: str = "marks"

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid((BLOCKS, 1, 1), (1, 1, 1))

    def process(self, block: Block) -> BlockRecord:
        self.done.append(block.index[0])
        return BlockRecord(block.key, {}, 0, 0.0)


def ledger_in(work: Path) -> Ledger:
    return Ledger(work / "ledger_marks", "key", {}, BlockPlan((1, 1, 1), (1, 1, 1)), (BLOCKS, 1, 1))


def shards_in(work: Path) -> Shards:
    return Shards.of(work / "ledger_marks", BLOCKS)


def run(work: Path, task: Marking) -> BlocksDone:
    with Worker.of(work / "coordination") as worker, closing(ledger_in(work)) as ledger:
        return run_blocks(task, ledger, SerialExecutor(), worker, lambda finished, planned: None)


@given(st.integers(1, 3000), st.data())
def test_an_end_follows_from_the_first_block_whatever_was_cut(blocks: int, data: st.DataObject) -> None:
    """Each part is what it was by its first block when it came into being, so a part that nobody took is found."""
    shards = Shards("", blocks)
    parts = {start: shards.end(start) for start in shards.heads}
    assert list(itertools.chain.from_iterable(range(a, b) for a, b in parts.items())) == list(range(blocks))
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.sampled_from(sorted(parts)))
        following = data.draw(st.integers(0, parts[start]))
        at = cut_point(start, Stretch(parts[start], next=following))
        if at is None:
            assert max(following, start + 1) >= parts[start]
            continue
        assert max(following, start + 1) <= at < parts[start] == shards.end(at)
        parts |= {start: at, at: parts[start]}
    assert sorted(number for a, b in parts.items() for number in range(a, b)) == list(range(blocks))


def test_a_part_that_was_cut_off_by_a_process_that_died_then_is_done(tmp_path: Path) -> None:
    with Worker.of(tmp_path / "coordination") as worker:
        lease = shards_in(tmp_path).lease(8)
        assert worker.acquire(lease, Stretch(12)) and worker.cut(lease, 10) is not None and worker.done(lease)
    task = Marking()
    with Worker.of(tmp_path / "coordination"):
        with closing(ledger_in(tmp_path)) as ledger:
            for number in (8, 9):
                ledger.append(BlockRecord(f"{number}-0-0", {}, 0, 0.0))
        run(tmp_path, task)
    assert sorted(task.done) == [n for n in range(BLOCKS) if n not in (8, 9)]


def test_each_block_is_done_once_by_many(tmp_path: Path) -> None:
    tasks = [Marking() for _ in range(6)]
    threads = [threading.Thread(target=run, args=(tmp_path, task)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for task in tasks for number in task.done) == list(range(BLOCKS))
    assert all(task.done for task in tasks)


class Asleep(Marking):
    """Its process stands still in a block until all others are done."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.awake = threading.Event(), threading.Event()

    def process(self, block: Block) -> BlockRecord:
        self.began.set()
        assert self.awake.wait(60)
        return super().process(block)


def test_what_another_has_not_begun_is_taken_and_only_that(tmp_path: Path) -> None:
    """One that computes for long keeps its block alone."""
    sleeper, other = Asleep(), Marking()
    thread = threading.Thread(target=run, args=(tmp_path, sleeper))
    thread.start()
    assert sleeper.began.wait(60)
    helper = threading.Thread(target=run, args=(tmp_path, other))
    helper.start()
    while len(other.done) < BLOCKS - 1:
        assert helper.is_alive()
    sleeper.awake.set()
    thread.join()
    helper.join()
    assert (sleeper.done, sorted(other.done)) == ([0], list(range(1, BLOCKS)))


def test_a_block_whose_record_is_undone_is_done_again_at_once(tmp_path: Path) -> None:
    """Though its shard is called done in this attempt."""
    with Worker.of(tmp_path / "coordination"):
        run(tmp_path, Marking())
        with closing(ledger_in(tmp_path)) as ledger:
            name, record = next(iter(ledger.named_records()))
            ledger.void(name, record.block)
        task, began = Marking(), time.monotonic()
        run(tmp_path, task)
    assert [f"{number}-0-0" for number in task.done] == [record.block]
    assert time.monotonic() - began < LIMIT_S / 2, "it was waited for"


def test_what_a_dead_process_took_again_is_done(tmp_path: Path) -> None:
    """It had begun to do a shard anew that was called done."""
    with Worker.of(tmp_path / "coordination") as here:
        run(tmp_path, Marking())
        with closing(ledger_in(tmp_path)) as ledger:
            name, record = next(iter(ledger.named_records()))
            ledger.void(name, record.block)
        store, lease = DiskStore(tmp_path / "coordination"), shards_in(tmp_path).lease(0)
        seen = store.read(lease)
        assert seen is not None
        dead = Lease(here.mark.rpartition("-")[0].rpartition("-")[0] + "-1-00000000", epoch=7, blocks=Stretch(4))
        assert store.replace(lease, seen, packed(dead)) is not None
        task = Marking()
        run(tmp_path, task)
    assert task.done == [0]


@pytest.mark.parametrize("state", ["of a living one", "unreadable"])
def test_nobody_s_record_is_waited_for_in_vain(tmp_path: Path, state: str) -> None:
    """What is left of one who may be alive is waited for, and taken when it has stood still for the limit."""
    (tmp_path / "coordination").mkdir()
    store, lease = DiskStore(tmp_path / "coordination"), shards_in(tmp_path).lease(4)
    if state == "unreadable":
        (tmp_path / "coordination" / f"{lease}.0").touch()
    else:
        assert store.create(lease, packed(Lease(FOREIGN, blocks=Stretch(8))))
    task = Marking()
    with (
        Worker(store, limit_s=1.0) as worker,
        closing(ledger_in(tmp_path)) as ledger,
    ):
        done = run_blocks(task, ledger, SerialExecutor(), worker, lambda finished, planned: None)
    assert done.done == BLOCKS and sorted(task.done) == list(range(BLOCKS))
    last = task.done[-1:] if state == "of a living one" else task.done[-4:]
    assert last == ([4] if state == "of a living one" else [4, 5, 6, 7]), "all but the first could be had before"
