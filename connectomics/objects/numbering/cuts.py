"""What is numbered: rows of pieces, block by block, each block's in the order of their keys, and which are one object.

The pieces are those of blocks of voxels here; ``links`` takes objects of sections for pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.objects.arrays import load, shapes, view
from connectomics.objects.pieces import JOINT_KEYS
from connectomics.volumes.volume import Array

NodePairs = Iterator[Array]
"""Nodes that are of one object, int64 [2, n], some at a time."""


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The pieces of a block.

    Parameters
    ----------
    table
        ``PIECE`` [n], mapped.
    keys
        u8 [n], ascending; mapped, too.
    order
        Where the piece of each key lies in the table; None where it is in the order of keys.
    """

    table: Array
    keys: Array
    order: Array | None = None

    def take(self, places: slice | Array) -> Array:
        """Rows of the pieces at these places among the keys, as a new array."""
        return np.array(self.table[places if self.order is None else self.order[places]])


@dataclass(frozen=True, slots=True)
class Cuts:
    """What is numbered.

    Parameters
    ----------
    count
        Number of blocks.
    rows
        The pieces of a block, by its number.
    nodes
        Which pieces of a block may be one object with pieces of others, ascending i8 [n], and their keys; None where
        those of equal key are.
    pairs
        Called with the first node of each block, all nodes counted block after block, a folder for scratch files and
        how many pairs should be in memory at a time: which nodes are one object.
    """

    count: int
    rows: Callable[[int], BlockRows]
    nodes: Callable[[int], tuple[Array, Array]] | None = None
    pairs: Callable[[Array, Path, int], NodePairs] | None = None


@dataclass(frozen=True, slots=True)
class BlockFiles:
    """Files of the pieces of all blocks, and of their pairs with later blocks where they are joined over faces."""

    pieces: Sequence[Path]
    joins: Sequence[Path] | None = None

    def cuts(self) -> Cuts:
        """What is numbered: by first voxels where pieces are joined over faces, else by values."""
        if self.joins is None:
            return Cuts(len(self.pieces), self._rows)
        return Cuts(len(self.pieces), self._rows, self._nodes, self._pairs)

    def _rows(self, block: int) -> BlockRows:
        rows = view(self.pieces[block], "rows")
        return BlockRows(rows, rows["value" if self.joins is None else "first"])

    def _nodes(self, block: int) -> tuple[Array, Array]:
        path = self.pieces[block]
        (joints,) = load(path, "joints")
        pieces = joints.astype(np.int64) - 1
        if JOINT_KEYS in shapes(path):  # programs before have not kept them apart
            return pieces, load(path, JOINT_KEYS)[0]
        return pieces, view(path, "rows")["first"][pieces]

    def _pairs(self, offsets: Array, folder: Path, at_once: int) -> NodePairs:
        assert self.joins is not None
        waiting: list[Array] = []
        for block, path in enumerate(self.joins):
            here, there, other = load(path, "here", "there", "other")
            waiting.append(np.stack([here + offsets[block], there + offsets[other]]))
            if sum(pairs.shape[1] for pairs in waiting) >= at_once:
                yield np.concatenate(waiting, axis=1)
                waiting.clear()
        if waiting:
            yield np.concatenate(waiting, axis=1)
