"""Which pieces of two neighbouring blocks are one object: their voxels touch across a face, an edge or a corner."""

from __future__ import annotations

import numpy as np

from connectomics.core.geometry import Vec3, vec3
from connectomics.objects.components import Connectivity
from connectomics.volumes.volume import Array


def directions(connectivity: Connectivity) -> tuple[Vec3, ...]:
    """Steps (z, y, x) in blocks to the neighbours that come later in raster order; the others are their mirror images.

    Examples
    --------
    >>> directions(Connectivity(6)), len(directions(Connectivity(26)))
    (((0, 0, 1), (0, 1, 0), (1, 0, 0)), 13)
    """
    return tuple(step for step in connectivity.steps if step > (0, 0, 0))


def first_axis(direction: Vec3) -> int:
    """The axis whose planes are compared for two blocks in this direction."""
    return next(axis for axis, step in enumerate(direction) if step)


def pairs(
    plane: Array, other: Array, direction: Vec3, connectivity: Connectivity, values: Array, others: Array
) -> Array:
    """Pairs of joints that touch.

    Parameters
    ----------
    plane, other
        Outermost planes of a block and of its neighbour, across ``first_axis(direction)``: 0, or 1 + joint.
    direction
        From the block to its neighbour.
    connectivity
        Which voxels are neighbours.
    values, others
        Value of each joint of the block and of its neighbour; only equal ones are one object.

    Returns
    -------
    array
        uint32 [n, 2], sorted, each pair of joints once.
    """
    across = first_axis(direction)
    inside = [axis for axis in range(3) if axis != across]
    keys = []
    for step in connectivity.steps:
        if any(d and s != d for s, d in zip(step, direction, strict=True)):
            continue
        windows = [_windows(direction[axis], step[axis], plane.shape[i]) for i, axis in enumerate(inside)]
        here = plane[windows[0][0], windows[1][0]].ravel()
        there = other[windows[0][1], windows[1][1]].ravel()
        both = (here > 0) & (there > 0)
        keys.append(_once((here[both].astype(np.uint64) << np.uint64(32)) | there[both]))
    key = np.unique(np.concatenate(keys))
    found = np.stack([key >> np.uint64(32), key & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32) - np.uint32(1)
    alike: Array = found[values[found[:, 0]] == others[found[:, 1]]]
    return alike


def _windows(direction: int, step: int, length: int) -> tuple[slice, slice]:
    """What of an axis within the planes is compared here and there."""
    if direction:
        ends = (slice(-1, None), slice(0, 1))
        return ends if direction > 0 else ends[::-1]
    return slice(max(0, -step), length - max(0, step)), slice(max(0, step), length - max(0, -step))


def _once(keys: Array) -> Array:
    """Leave out what repeats the one before, which sorting would then have to carry."""
    changes = np.empty(keys.shape, bool)
    changes[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=changes[1:])
    return keys[changes]


def neighbour(index: Vec3, direction: Vec3, counts: Vec3) -> Vec3 | None:
    """Index of the block in this direction, or None at the volume's border."""
    found = vec3([i + d for i, d in zip(index, direction, strict=True)])
    return found if all(0 <= i < n for i, n in zip(found, counts, strict=True)) else None
