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
        edges = np.union1d(starts, starts_there)
        rows = np.empty(len(edges), OVERLAP)
        rows["here"] = labels[np.searchsorted(starts, edges, "right") - 1]
        rows["there"] = labels_there[np.searchsorted(starts_there, edges, "right") - 1]
        rows["voxels"] = np.diff(edges, append=end - begin)
        yield summed(rows[(rows["here"] > 0) & (rows["there"] > 0)])


def summed(rows: Array) -> Array:
    """``OVERLAP`` rows of equal pair added up, sorted by pair."""
    rows = rows[np.lexsort((rows["there"], rows["here"]))]
    edges = np.flatnonzero(np.diff(rows["here"], prepend=-1) | np.diff(rows["there"], prepend=-1))
    result = rows[edges]
    if len(edges) < len(rows):
        result["voxels"] = np.add.reduceat(rows["voxels"], edges)
    return result
