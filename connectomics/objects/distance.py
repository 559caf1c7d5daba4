"""Distance to the nearest voxel that is not foreground: exact, so that it does not depend on how a volume is cut.

The watershed takes its seeds and its order from it. Squares of distances are whole numbers of square picometres.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.volume import Array

VoxelSize = tuple[float, float, float]
PICOMETRES = 1000  # in a nanometre


def squared_distance(inside: Array, voxel_size_nm: VoxelSize) -> Array:
    """Squared distance from each voxel to the nearest one that is not inside.

    Whole numbers in float64, hence exact up to 94 µm (2^53 pm²); voxel sizes are taken to the picometre. What lies
    beyond the array is neither inside nor outside.

    Parameters
    ----------
    inside
        bool (z, y, x).
    voxel_size_nm
        (z, y, x).

    Returns
    -------
    array
        float64 (z, y, x), pm²: 0 outside, infinite where everything is inside.

    Examples
    --------
    >>> squared_distance(np.array([[[True, True, False]]]), (40, 8, 8)).tolist()
    [[[256000000.0, 64000000.0, 0.0]]]
    """
    if inside.all():
        return np.full(inside.shape, np.inf)
    sizes = [float(round(size * PICOMETRES)) for size in voxel_size_nm]
    nearest = ndimage.distance_transform_edt(inside, sampling=sizes, return_distances=False, return_indices=True)
    result = np.zeros(inside.shape)
    for axis, size in enumerate(sizes):
        places = np.arange(inside.shape[axis], dtype=np.int32).reshape([-1 if a == axis else 1 for a in range(3)])
        steps = np.subtract(nearest[axis], places, dtype=np.float64)
        steps *= size
        steps *= steps
        result += steps
    return result


def beyond(squared: Array, distance_nm: float) -> Array:
    """bool: which of the squared distances exceed a distance."""
    return np.greater(squared, (distance_nm * PICOMETRES) ** 2)


def reach(distance_nm: float, voxel_size_nm: VoxelSize, *, by_section: bool) -> Vec3:
    """Voxels (z, y, x) around a box within which lies all that is no farther than a distance.

    Examples
    --------
    >>> reach(20, (40, 8, 8), by_section=False)
    (0, 2, 2)
    """
    voxels = [int(distance_nm * PICOMETRES // round(size * PICOMETRES)) for size in voxel_size_nm]
    return vec3([0, *voxels[1:]] if by_section else voxels)


def around(box: Box, margin: Vec3, volume: Vec3) -> tuple[Box, Box]:
    """A box grown by a margin within the volume, and where the box lies in it."""
    grown = box.grow(margin).clip(volume)
    return grown, box.relative_to(grown)
