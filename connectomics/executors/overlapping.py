"""Runs blocks one after the other, and puts each on disk while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from connectomics.executors.serial import SerialExecutor
from connectomics.geometry import Block
from connectomics.pipeline.blocks import attempt
from connectomics.pipeline.contracts import BlockFailure, BlockRecord, Computed, Task, TwoStepTask
from connectomics.pipeline.memory import BEHIND_BYTES

BEHIND_S = 5.0
"""Blocks that took longer to compute are waited for: writing them is a small share, and a kill would lose more."""


class OverlappingExecutor:
    """This process, in the order given, with a second thread that compresses, writes and flushes.

    At most one block is being written. Its record comes out before the next one's writing begins, or, where the run is
    stopped, before the error that stops it. Blocks that are slow or whose outputs are large are waited for, and so are
    those of tasks of one step.
    """

    def run(self, task: Task, blocks: Iterable[Block]) -> Iterator[BlockRecord | BlockFailure]:
        """Process the blocks."""
        if not isinstance(task, TwoStepTask):
            yield from SerialExecutor().run(task, blocks)
            return
        behind: tuple[Block, Future[BlockRecord]] | None = None
        with ThreadPoolExecutor(1) as writer:
            try:
                for block in blocks:
                    keep, waited = _computed(task, block)
                    if behind is not None:
                        before, behind = behind, None
                        yield attempt(task, before[0], before[1].result)
                    behind = block, writer.submit(keep)
                    del keep  # with the block's outputs
                    if waited:
                        before, behind = behind, None
                        yield attempt(task, before[0], before[1].result)
            except BaseException:
                if behind is not None and behind[1].exception() is None:
                    yield behind[1].result()
                raise
            if behind is not None:
                yield attempt(task, behind[0], behind[1].result)


def _computed(task: TwoStepTask, block: Block) -> tuple[Callable[[], BlockRecord], bool]:
    """What keeps a block, or raises what computing it raised; and whether to wait for it."""
    try:
        computed = task.compute(block)
    except Exception as error:  # noqa: BLE001 - ``attempt`` handles it as an error of the block
        return _raising(error), True
    waited = computed.seconds > BEHIND_S or computed.size_bytes > BEHIND_BYTES
    return _keeping(task, computed), waited


def _keeping(task: TwoStepTask, computed: Computed) -> Callable[[], BlockRecord]:
    return lambda: task.keep(computed)


def _raising(error: Exception) -> Callable[[], BlockRecord]:
    def keep() -> BlockRecord:
        raise error

    return keep
