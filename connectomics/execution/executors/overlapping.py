"""Runs blocks one after the other, and puts each on disk while the next one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from connectomics.core.geometry import Block
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.runner import attempt
from connectomics.execution.stage import BEHIND_BYTES
from connectomics.execution.task import BlockFailure, BlockRecord, Computed, Task, TwoStepTask

BEHIND_S = 5.0
"""Blocks that took longer to compute are waited for: writing them is a small share, and a kill would lose more."""


class OverlappingExecutor:
    """This process, in the order given, with a second thread that compresses, writes and flushes.

    At most one block is being written. Its record comes out before the next one's writing begins, before other
    processes are waited for, and, where the run is stopped, before the error that stops it. Blocks that are slow or
    whose outputs are large are waited for, and so are those of tasks of one step.
    """

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        """Process the blocks."""
        if not isinstance(task, TwoStepTask):
            yield from SerialExecutor().run(task, blocks)
            return
        behind: deque[tuple[Block, Future[BlockRecord]]] = deque()  # one at most
        with ThreadPoolExecutor(1) as writer:
            try:
                for block in blocks:
                    if block is None:
                        yield from _told(task, behind)
                        continue
                    computed, kept = _computed(task, block)
                    yield from _told(task, behind)
                    if computed is not None:
                        kept = writer.submit(task.keep, computed)
                    behind.append((block, kept))
                    if computed is None or computed.seconds > BEHIND_S or computed.size_bytes > BEHIND_BYTES:
                        yield from _told(task, behind)
                    del computed  # with the block's outputs
            except GeneratorExit:
                raise
            except BaseException:
                yield from (kept.result() for _, kept in behind if kept.exception() is None)
                raise
            yield from _told(task, behind)


def _told(task: Task, behind: deque[tuple[Block, Future[BlockRecord]]]) -> Iterator[BlockRecord | BlockFailure]:
    """What became of the block behind, if there is one; waits for it."""
    while behind:
        block, kept = behind.popleft()
        yield attempt(task, block, kept.result)


def _computed(task: TwoStepTask, block: Block) -> tuple[Computed | None, Future[BlockRecord]]:
    """What a block became, or None and in the future what computing it raised, which ``attempt`` handles."""
    kept: Future[BlockRecord] = Future()
    try:
        return task.compute(block), kept
    except Exception as error:  # noqa: BLE001 - an error of the block like any other
        kept.set_exception(error)
        return None, kept
