"""The blockwise tasks of decoding: cut blocks into pieces, find which touch, paint the objects.

``stages.decode.context`` runs them in this order, each under a ledger of its own; a block leaves one file, which is
whole or absent. A stage is called as the folder that it fills, in the work folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import OutputError
from connectomics.core.fingerprint import sha256_of_file
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.retry import PAUSES_S, retried
from connectomics.execution.runner import write_block
from connectomics.execution.task import BlockRecord
from connectomics.objects.arrays import SUFFIX, load, save
from connectomics.objects.components import Connectivity
from connectomics.objects.faces import directions, first_axis, neighbour, pairs
from connectomics.objects.merge import IDS, OFFSETS
from connectomics.objects.numbering.ranges import KeyRanges
from connectomics.objects.numbering.tables import Numbering
from connectomics.objects.pieces import BlockPlacement, component_pieces, hole_pieces, painted, plane_name, value_pieces
from connectomics.volumes.source import reason
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

Read = Callable[[Box], Array]
BlockFunction = Callable[[BlockGrid, Block], Mapping[str, Array]]
"""What is done with a block of a grid."""
PAINT = "paint"


def block_file(folder: Path, block: Block) -> Path:
    """Where a block's result lies."""
    return folder / f"{block.key}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class BlockTask:
    """Compute the arrays of each block, by name, into one file; the stage is called as the folder of the files."""

    grid: BlockGrid
    folder: Path
    compute: BlockFunction

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.folder.name

    def process(self, block: Block) -> BlockRecord:
        """Compute a block; its file is on disk on return, or an OutputError is raised, also after waiting."""
        began = time.perf_counter()
        arrays, path = self.compute(self.grid, block), block_file(self.folder, block)

        def written() -> str:
            save(path, **arrays)
            return sha256_of_file(path)

        try:
            checksum = retried(written, f"writing {path}", PAUSES_S)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run again; "
                "finished blocks are kept."
            ) from error
        name = path.relative_to(path.parents[1]).as_posix()
        return BlockRecord(block.key, {name: checksum}, 0, round(time.perf_counter() - began, 3))


@dataclass(frozen=True, slots=True)
class BlockPieces:
    """Cut a block into pieces and measure them.

    Parameters
    ----------
    read
        Values (z, y, x) of a box: bool or unsigned integers.
    connectivity
        Which voxels are neighbours; None where all voxels of one value are one object.
    probabilities
        Probabilities (z, y, x) of a box, or None.
    holes
        Whether the pieces are of the background, with the labels beside them.
    flat
        Whether objects lie in sections, so that z has no border.
    """

    read: Read
    connectivity: Connectivity | None
    probabilities: Read | None = None
    holes: bool = False
    flat: bool = False

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the arrays of the block's pieces."""
        cut = BlockPlacement(block.core, grid.volume)
        likely = None if self.probabilities is None else self.probabilities(block.core)
        if self.connectivity is None:
            return value_pieces(self.read(block.core), cut, likely, by_section=self.flat).arrays()
        if not self.holes:
            return component_pieces(self.read(block.core), self.connectivity, cut, likely).arrays()
        box = block.core.grow((1, 1, 1)).clip(grid.volume)
        return hole_pieces(self.read(box), box, self.connectivity, cut, probabilities=likely).arrays()


@dataclass(frozen=True, slots=True)
class BlockJoins:
    """Find which pieces of a block, whose file lies in ``pieces``, touch pieces of its later neighbours."""

    pieces: Path
    connectivity: Connectivity

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return which joints ``here`` touch which ones ``there`` of which ``other`` block; int64 [n] each."""
        nothing = np.zeros(0, np.int64)
        found = {"here": [nothing], "there": [nothing], "other": [nothing]}
        own: dict[int, tuple[Array, Array]] = {}
        for direction in directions(self.connectivity):
            index = neighbour(block.index, direction, grid.counts)
            if index is None:
                continue
            axis = first_axis(direction)
            if axis not in own:
                own[axis] = self._side(block, axis, high=True)
            plane, values = own[axis]
            other, others = self._side(grid.block(index), axis, high=False)
            touching = pairs(plane, other, direction, self.connectivity, values=values, others=others)
            found["here"].append(touching[:, 0].astype(np.int64))
            found["there"].append(touching[:, 1].astype(np.int64))
            found["other"].append(np.full(len(touching), grid.number(index), np.int64))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _side(self, block: Block, axis: int, *, high: bool) -> tuple[Array, Array]:
        """A block's outermost plane, and the value of each of its joints."""
        plane, values = load(block_file(self.pieces, block), plane_name(axis, high), "joint_values")
        return plane, values


@dataclass(frozen=True, slots=True)
class BlockNumbers:
    """Number the objects of a range of keys; the blocks are the ranges of a plan."""

    numbering: Numbering
    plan: KeyRanges

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the arrays of the range's objects."""
        return self.numbering.part(self.plan, grid.number(block.index))


@dataclass(frozen=True, slots=True)
class PaintTask:
    """Write each block with its objects' numbers.

    ``pieces`` and ``tables`` are folders. ``under`` gives values (z, y, x) of a box, kept where no object is painted.
    """

    grid: BlockGrid
    pieces: Path
    tables: Path
    store: Store
    under: Read | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return f"{self.store.path.stem}.{PAINT}"

    def process(self, block: Block) -> BlockRecord:
        """Paint a block; its shard is on disk on return."""
        began = time.perf_counter()
        voxels = painted_block(self.grid, block, self.pieces, self.tables, dtype=self.store.info.dtype)
        if self.under is not None:
            np.copyto(voxels, self.under(block.core).astype(voxels.dtype, copy=False), where=voxels == 0)
        shard, checksum = write_block(self.store, block, voxels[None])
        return BlockRecord(block.key, {shard: checksum}, 0, round(time.perf_counter() - began, 3))


def painted_block(grid: BlockGrid, block: Block, pieces: Path, tables: Path, dtype: np.dtype[Any]) -> Array:
    """A block (z, y, x) with what the tables say is painted for its pieces; 0 elsewhere."""
    lengths, labels = load(block_file(pieces, block), "lengths", "labels")
    offsets = np.load(tables / OFFSETS, mmap_mode="r")
    number = grid.number(block.index)
    ids = np.load(tables / IDS, mmap_mode="r")[offsets[number] : offsets[number + 1]]
    numbers = np.zeros(len(ids) + 1, dtype)
    numbers[1:] = ids
    return painted(lengths, labels, numbers, block.core.shape)


def smallest_dtype(largest: int) -> np.dtype[Any]:
    """uint32, or uint64 where the largest id needs it.

    Examples
    --------
    >>> smallest_dtype(2**32 - 1), smallest_dtype(2**32)
    (dtype('uint32'), dtype('uint64'))
    """
    return np.dtype(np.uint32 if largest <= np.iinfo(np.uint32).max else np.uint64)
