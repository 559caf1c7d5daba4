"""The contracts of a run: a Task says what a block is worth, an Executor whose hands do it, records what was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from connectomics.geometry import Block, BlockGrid


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One finished block: its key, the sha256 of each shard it wrote by store name, and what it cost."""

    block: str
    checksums: Mapping[str, str]
    windows: int
    seconds: float


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


class Executor(Protocol):
    """Runs a task's blocks somewhere."""

    def run(self, task: Task, blocks: Iterable[Block]) -> Iterator[BlockRecord]:
        """Process the blocks; a record comes out as soon as its block is on disk."""
        ...


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run over one volume did; written to RUN as ``report.json``."""

    planned: int
    skipped: int
    done: int
    windows: int
    voxels: int
    seconds: float
