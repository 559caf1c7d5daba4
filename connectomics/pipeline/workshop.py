"""Where the steps of decoding work: tasks under ledgers, tables and stores that are whole or absent.

``pipeline.decode`` and ``pipeline.filtering`` make a workshop for each step; ``pipeline.steps`` are what is done in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from connectomics.decode.merge import Cuts, merge
from connectomics.decode.objects import Frame
from connectomics.decode.selection import Rule, select
from connectomics.geometry import Block, BlockGrid, vec3
from connectomics.io.atomic import replacing
from connectomics.io.store import Store, create_store, open_store
from connectomics.io.volume import VolumeInfo, VolumeReader
from connectomics.pipeline.contracts import Executor, Task
from connectomics.pipeline.ledger import Ledger
from connectomics.pipeline.pieces import JoinTask, PaintTask, PiecesTask, Read, block_file
from connectomics.pipeline.planning import BlockPlan

log = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]
BLOCK_VOXELS = 1 << 24
VOXEL_BYTES = 40  # of a block: values, components, runs, probabilities as they are summed
CHUNK = 64
NUMERIC_CLASS = {"decode": "integers"}
SUMMARY = "summary.json"


class FileTask(Task, Protocol):
    """A task that can say whether a block's result is on disk."""

    def whole(self, block: Block) -> bool:
        """Whether it is."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What a step is given and gives.

    Parameters
    ----------
    volume
        Labels, ids or probabilities.
    frame
        Its voxel size, and how probabilities are summed.
    probabilities
        Probabilities (z, y, x) of a box, for the table, or None.
    tables
        Tables of its objects, or None where it has none yet.
    count
        Objects in them.
    """

    volume: VolumeReader
    frame: Frame
    probabilities: Read | None = None
    tables: Path | None = None
    count: int = 0


class Step(Protocol):
    """One step of ``decoding``."""

    @property
    def name(self) -> str: ...

    def run(self, scene: Scene, shop: Workshop) -> Scene:
        """Make the next scene, continuing whatever an earlier run left in the shop's folder."""
        ...


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where a step works, and whose hands do its blocks.

    Parameters
    ----------
    folder
        Of this step.
    plan
        How the volume is cut.
    grid
        The cut volume.
    run_key
        Of the whole decoding.
    executor
        Runs the blocks.
    on_block
        Called with finished and planned blocks of the current task.
    """

    folder: Path
    plan: BlockPlan
    grid: BlockGrid
    run_key: str
    executor: Executor
    on_block: OnBlock

    def run(self, task: FileTask, name: str) -> None:
        """Do all blocks of a task that its ledger does not have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(self.folder / f"{name}.jsonl", self.run_key, NUMERIC_CLASS, self.plan)
        try:
            lost = {block.key for block in self.grid if block.key in ledger.records and not task.whole(block)}
            if lost:
                log.warning("%s: %d recorded blocks are missing on disk and are done again", name, len(lost))
                ledger.forget(lost)
            self.on_block(len(ledger.records), len(self.grid))
            for record in self.executor.run(task, (b for b in self.grid if b.key not in ledger.records)):
                ledger.append(record)
                log.info("%s: %s block %s: %.2f s", self.folder.name, name, record.block, record.seconds)
                self.on_block(len(ledger.records), len(self.grid))
        finally:
            ledger.close()

    def pieces(self, task: PiecesTask) -> None:
        """Cut all blocks into pieces and, where they are joined over faces, find which touch."""
        task.folder.mkdir(parents=True, exist_ok=True)
        self.run(task, task.folder.name)
        if task.connectivity is not None:
            joins = self.joins_of(task.folder)
            joins.mkdir(exist_ok=True)
            self.run(JoinTask(self.grid, task.folder, joins, task.connectivity), joins.name)

    @staticmethod
    def joins_of(pieces: Path) -> Path:
        """Where the pairs of touching pieces lie."""
        return pieces.with_name(f"{pieces.name}_joins")

    def objects(self, pieces: Path, rule: Rule, *, joined: bool) -> tuple[Path, int, int]:
        """Tables of the objects that stay, how many they are, and the largest number that is painted."""
        tables = pieces.with_name(f"{pieces.name}_tables")
        if not tables.exists():
            _, ny, nx = self.grid.counts
            joins = self.joins_of(pieces)
            cuts = Cuts(
                len(self.grid),
                ny * nx,
                lambda number: block_file(pieces, self._block(number)),
                (lambda number: block_file(joins, self._block(number))) if joined else None,
            )
            with replacing(tables) as temporary:
                temporary.mkdir()
                found = merge(cuts, temporary)
                kept, largest = select(temporary, found, rule)
                (temporary / SUMMARY).write_text(json.dumps({"found": found, "kept": kept, "largest": largest}))
                log.info("%d of %d objects stay", kept, found)
        summary = json.loads((tables / SUMMARY).read_text())
        return tables, int(summary["kept"]), int(summary["largest"])

    def paint(
        self, pieces: Path, tables: Path, info: VolumeInfo, dtype: np.dtype[Any], under: Read | None = None
    ) -> Store:
        """Write the objects of all blocks."""
        store = self.store(info, dtype)
        self.run(PaintTask(self.grid, pieces, tables, store, under), "objects")
        return store

    def store(self, info: VolumeInfo, dtype: np.dtype[Any]) -> Store:
        """The working store of the step's result."""
        path = self.folder / "objects.zarr"
        if path.exists():
            return open_store(path)
        kept = VolumeInfo((1, *info.extent), dtype, self.plan.chunk_shape, info.voxel_size_nm, info.origin_nm)
        return create_store(path, kept, shard_shape=self.plan.block_shape, attributes={})

    def _block(self, number: int) -> Block:
        _, ny, nx = self.grid.counts
        return self.grid.block((number // (ny * nx), number // nx % ny, number % nx))


def decode_plan(info: VolumeInfo, budget_bytes: int) -> BlockPlan:
    """Blocks of whole input chunks where they fit, of up to ``BLOCK_VOXELS`` voxels, in chunks of about ``CHUNK``.

    Examples
    --------
    >>> import numpy as np
    >>> decode_plan(VolumeInfo((1, 100, 4096, 4096), np.dtype(np.uint8), (1, 512, 512)), 8 << 30)
    BlockPlan(block_shape=(64, 512, 512), chunk_shape=(64, 64, 64))
    """
    most = max(1, min(BLOCK_VOXELS, budget_bytes // VOXEL_BYTES))
    shape = [min(c, n) for c, n in zip(info.chunk_shape, info.extent, strict=True)]
    while shape[0] * shape[1] * shape[2] > most:
        axis = max(range(3), key=lambda a: shape[a])
        shape[axis] = -(-shape[axis] // 2)
    while True:
        growing = [a for a in range(3) if shape[a] < info.extent[a]]
        axis = min(growing, key=lambda a: shape[a], default=0)
        if not growing or shape[0] * shape[1] * shape[2] * 2 > most:
            break
        shape[axis] *= 2
    chunk = list(shape)
    for axis in range(3):
        while chunk[axis] > CHUNK and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return BlockPlan(vec3(shape), vec3(chunk))
