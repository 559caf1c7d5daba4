"""Seeded watershed of one component, and which components need it.

``stages.decode.watershed.flooding`` calls it. A voxel's order in the flood depends on its component alone, so that a
component is flooded alike in its own box and in the whole volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import segmentation

from connectomics.core.geometry import Vec3, vec3
from connectomics.objects.components import Connectivity
from connectomics.objects.mapped_tables import flush, table
from connectomics.objects.merge import AT_ONCE, OBJECTS, spans
from connectomics.volumes.volume import Array

_watershed: Callable[..., Any] = segmentation.watershed
SEED_COUNTS = "seed_counts.npy"
MOST_VOXELS = 1 << 27  # of a flood: beyond, its order needs more than the 53 bits of a float64


def flood(heights: Array, markers: Array, inside: Array, connectivity: Connectivity) -> Array:
    """Flood from markers, highest voxels first: scikit-image's watershed of the heights turned upside down.

    scikit-image leaves open which of two marked voxels of equal height comes first, and its choice changes with what
    lies elsewhere in the array; here it is the first in raster order.

    Parameters
    ----------
    heights
        Numbers (z, y, x), at most 2^27.
    markers
        Unsigned integers (z, y, x); 0 where nothing is marked.
    inside
        bool (z, y, x): what is flooded.
    connectivity
        Which voxels are neighbours.

    Returns
    -------
    array
        Of the markers' dtype (z, y, x): 0 outside and where no marker is connected.
    """
    marked, footprint = (markers > 0) & inside, footprint_of(connectivity)
    # what lies within markers has nothing to flood, and seeds are mostly large
    flowing = ndimage.binary_dilation(inside & ~marked, footprint, mask=inside)
    numbers, place = np.unique(markers[marked & flowing], return_inverse=True)
    compact = np.zeros(inside.shape, np.int32)
    compact[marked & flowing] = place + 1
    found = _watershed(flooding_order(heights, marked, flowing), compact, footprint, mask=flowing)
    flooded: Array = np.concatenate([np.zeros(1, markers.dtype), numbers])[found]
    np.copyto(flooded, markers, where=marked)
    return flooded


def footprint_of(connectivity: Connectivity) -> Array:
    """A voxel and its neighbours, bool (3, 3, 3)."""
    footprint = np.zeros((3, 3, 3), bool)
    for step in ((0, 0, 0), *connectivity.steps):
        footprint[vec3([1 + s for s in step])] = True
    return footprint


def flooding_order(heights: Array, marked: Array, inside: Array) -> Array:
    """When each voxel's turn is: by height, the highest first; of equal ones the marked first, in raster order.

    Parameters
    ----------
    heights, marked, inside
        Numbers, bool and bool (z, y, x).

    Returns
    -------
    array
        Whole numbers, float64 (z, y, x); equal for unmarked voxels of equal height, whose turn the flood decides.

    Examples
    --------
    >>> flooding_order(np.array([[[5, 7, 5, 5]]]), np.array([[[1, 0, 1, 0]]]) > 0, np.ones((1, 1, 4), bool)).tolist()
    [[[3.0, 2.0, 4.0, 5.0]]]
    """
    at = np.flatnonzero(inside)
    values, rank = np.unique(heights.ravel()[at], return_inverse=True)
    rank = len(values) - 1 - rank
    (among,) = np.nonzero(marked.ravel()[at])
    groups = rank[among]
    in_groups = np.argsort(groups, kind="stable")
    begins = np.flatnonzero(np.diff(groups[in_groups], prepend=-1))
    sizes = np.diff(begins, append=len(among))
    step = int(sizes.max(initial=0)) + 1
    turn = rank * step + (step - 1)
    turn[among[in_groups]] += np.arange(len(among)) - np.repeat(begins, sizes) - (step - 1)
    order = np.zeros(inside.shape)
    order.ravel()[at] = turn
    return order


@dataclass(frozen=True, slots=True)
class RunLengths:
    """Labels in raster order as runs of equal ones: lengths and u8 labels."""

    lengths: Array
    labels: Array

    @classmethod
    def of(cls, labels: Array) -> RunLengths:
        """The runs of an array."""
        flat = labels.ravel()
        begins = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        return cls(np.diff(begins, append=flat.size), flat[begins].astype(np.uint64))

    def array(self, shape: Vec3, dtype: npt.DTypeLike) -> Array:
        """The labels (z, y, x)."""
        return np.repeat(self.labels.astype(dtype), self.lengths).reshape(shape)


def count_seeds(seeds: Path, count: int, components: int, folder: Path) -> None:
    """Write how many seeds each component, numbered from 1 on, has: ``seed_counts.npy`` u4 in ``folder``.

    ``seeds`` are tables of ``count`` seeds, whose values are their components.
    """
    rows = np.load(seeds / OBJECTS, mmap_mode="r")
    counts = table(folder / SEED_COUNTS, components, np.uint32)
    for span in spans(count, AT_ONCE):
        np.add.at(counts, rows["value"][span].astype(np.int64) - 1, 1)
    flush(counts)
