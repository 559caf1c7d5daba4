"""Coarser voxels from windows of one or two voxels an axis: labels by mode, intensities by mean; for pyramids."""

from __future__ import annotations

import itertools

import numpy as np

from connectomics.core.geometry import Vec3
from connectomics.volumes.volume import Array


def mode(voxels: Array, step: Vec3) -> Array:
    """The most frequent value of each window; of equally frequent ones the smallest.

    Parameters
    ----------
    voxels
        Integers (c, z, y, x), whole windows.
    step
        Voxels (z, y, x) of a window.

    Examples
    --------
    >>> mode(np.array([[[[7, 3, 1, 1], [3, 7, 1, 0]]]]), (1, 2, 2))
    array([[[[3, 1]]]])
    """
    first, *others = values = _members(voxels, step)
    if all(np.array_equal(first, other) for other in others):
        return first.copy()
    best, most = first.copy(), _occurrences(first, values)
    for value in others:
        count = _occurrences(value, values)
        better = (count > most) | ((count == most) & (value < best))
        np.copyto(best, value, where=better)
        np.copyto(most, count, where=better)
    return best


def mean(voxels: Array, step: Vec3) -> Array:
    """The mean of each window, summed in float64; integers are rounded to the nearest, halves to the even one.

    Parameters
    ----------
    voxels
        Numbers (c, z, y, x) of at most 32 bit, whole windows.
    step
        Voxels (z, y, x) of a window.

    Examples
    --------
    >>> mean(np.array([[[[1, 2, 4, 5], [2, 2, 4, 5]]]], np.uint8), (1, 2, 2))
    array([[[[2, 4]]]], dtype=uint8)
    """
    values = _members(voxels, step)
    total = values[0].astype(np.float64)
    for value in values[1:]:
        total += value
    total /= len(values)
    return (np.rint(total, out=total) if voxels.dtype.kind in "iu" else total).astype(voxels.dtype)


def _members(voxels: Array, step: Vec3) -> list[Array]:
    """One view for each place in a window, in raster order."""
    dz, dy, dx = step
    return [voxels[:, z::dz, y::dy, x::dx] for z, y, x in itertools.product(range(dz), range(dy), range(dx))]


def _occurrences(value: Array, values: list[Array]) -> Array:
    count = np.zeros(value.shape, np.uint8)
    for other in values:
        count += value == other
    return count
