"""Runs blocks one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from connectomics.core.geometry import Block
from connectomics.execution.runner import attempt
from connectomics.execution.task import BlockFailure, BlockRecord, Task


class SerialExecutor:
    """The plainest executor: this process, in the order given."""

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        """Process the blocks one by one."""
        for block in blocks:
            if block is not None:
                yield attempt(task, block)
