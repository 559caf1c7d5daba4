"""How much objects of one section lie over those of another: voxels of pairs of pieces, counted from runs of blocks.

``stages.decode.linking`` counts block by block; ``links`` adds up what the blocks have found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from connectomics.core.geometry import Vec3
from connectomics.volumes.volume import Array

VOXELS_AT_ONCE = 1 << 20
OVERLAP = np.dtype([("here", "i8"), ("there", "i8"), ("voxels", "i8")])
"""Voxels (y, x) that an object of one section and an object of a later one share."""
COLUMNS = ("here", "there", "voxels")


@dataclass(frozen=True, slots=True)
class PieceRuns:
    """A block as runs of equal piece in raster order, which end with their lines.

    Parameters
    ----------
    starts
        i64, the first voxel of each run.
    labels
        The piece of each; 0 is background.
    shape
        Of the block (z, y, x).
    """

    starts: Array
    labels: Array
    shape: Vec3

    @classmethod
    def of(cls, lengths: Array, labels: Array, shape: Vec3) -> PieceRuns:
        """Make them from the lengths of the runs."""
        return cls(np.cumsum(lengths, dtype=np.int64) - lengths, labels, shape)

    def part(self, begin: int, end: int) -> tuple[Array, Array]:
        """Starts, counted from ``begin``, and pieces of the runs between two voxels that begin lines."""
        first, last = np.searchsorted(self.starts, (begin, end))
        return self.starts[first:last] - begin, self.labels[first:last]


def overlaps(here: PieceRuns, there: PieceRuns, above: int, reach: int) -> Array:
    """Voxels that pieces of a block share with pieces of a block at the same (y, x), section on section.

    Parameters
    ----------
    here, there
        The block, and itself or one after it in z.
    above
        Sections from the first of ``here`` to the first of ``there``.
    reach
        Largest distance in sections that is looked at; the smallest is 1.

    Returns
    -------
    array
        ``OVERLAP`` [n] of numbers of pieces, sorted, each pair once.
    """
    found = [np.zeros(0, OVERLAP)]
    for z in range(here.shape[0]):
        for other in range(max(0, z + 1 - above), min(there.shape[0], z + reach + 1 - above)):
            found.extend(_of_sections(here, z, there, other))
    return summed(np.concatenate(found))


def _of_sections(here: PieceRuns, z: int, there: PieceRuns, other: int) -> Iterator[Array]:
    _, ny, nx = here.shape
    step = max(1, VOXELS_AT_ONCE // nx) * nx
    for begin in range(0, ny * nx, step):
        end = min(ny * nx, begin + step)
        starts, labels = here.part(z * ny * nx + begin, z * ny * nx + end)
        starts_there, labels_there = there.part(other * ny * nx + begin, other * ny * nx + end)
        edges = np.concatenate([starts, starts_there])
        edges.sort(kind="stable")  # two sorted parts, which it merges
        edges = edges[np.flatnonzero(np.diff(edges, prepend=-1))]
        one = labels[np.searchsorted(starts, edges, "right") - 1]
        two = labels_there[np.searchsorted(starts_there, edges, "right") - 1]
        both = np.flatnonzero((one > 0) & (two > 0))
        rows = np.empty(len(both), OVERLAP)
        rows["here"], rows["there"] = one[both], two[both]
        rows["voxels"] = np.diff(edges, append=end - begin)[both]
        yield summed(rows)


def summed(rows: Array) -> Array:
    """``OVERLAP`` rows of equal pair added up, sorted by pair."""
    rows = rows[_order(rows["here"], rows["there"])]
    edges = np.flatnonzero(np.diff(rows["here"], prepend=-1) | np.diff(rows["there"], prepend=-1))
    result = rows[edges]
    if len(edges) < len(rows):
        result["voxels"] = np.add.reduceat(rows["voxels"], edges)
    return result


def _order(here: Array, there: Array) -> Array:
    """Places of pairs in ascending order; as one number each, which sorts faster, where they are small enough."""
    if len(here) and max(int(here.max()), int(there.max())) < 1 << 31:
        return np.argsort((here << 31) | there, kind="stable")
    return np.lexsort((there, here))
