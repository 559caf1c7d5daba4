"""The contracts of a run: a Task says what a block is worth, an Executor whose hands do it, records what was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.volumes.volume import Array


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One finished block: its key, the sha256 of each file it wrote, and what it cost.

    Files are named by their path in the work folder, ``labels.zarr/0/c/0/0/0``, so that a record can be checked
    without knowing what wrote it.
    """

    block: str
    checksums: Mapping[str, str]
    windows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockFailure:
    """One block that failed again and again: why in one line, and the traceback of the last attempt."""

    block: str
    box: Box
    reason: str
    trace: str


class Task(Protocol):
    """Block-wise work; everything generic about running it lives elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def grid(self) -> BlockGrid: ...

    def process(self, block: Block) -> BlockRecord:
        """Compute a block and put it on disk whole; safe to repeat.

        Raises
        ------
        ConnectomicsError
            If the block cannot be done.
        """
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """What a block became, not yet on disk: an array (c, z, y, x) for each output, and what it cost."""

    block: Block
    arrays: Mapping[str, Array]
    windows: int
    seconds: float

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@runtime_checkable
class TwoStepTask(Task, Protocol):
    """A task whose ``process`` is ``keep`` of ``compute``, so that a block can be kept while the next is computed."""

    def compute(self, block: Block) -> Computed:
        """Compute a block; nothing is written."""
        ...

    def keep(self, computed: Computed) -> BlockRecord:
        """Put a block on disk whole; safe to repeat, and called in another thread than ``compute``."""
        ...


class Executor(Protocol):
    """Runs a task's blocks somewhere."""

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        """Give each block to ``blocks.attempt``; a record comes out when its block is on disk.

        Blocks are drawn one by one when hands are free. None stands where the next one waits for other processes, which
        may be waiting for this one: what is in hand comes out before more is drawn.
        """
        ...


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one process did of a volume, or all processes of an attempt, as ``report.json`` tells it.

    ``skipped`` blocks were finished before or by others, ``failed`` ones are quarantined. ``predicted_s`` is what the
    blocks it did were predicted to take, None where nobody did, and ``ratio`` is ``seconds`` over that.
    """

    planned: int
    skipped: int
    done: int
    failed: int
    windows: int
    voxels: int
    seconds: float
    predicted_s: float | None = None
    ratio: float | None = None
