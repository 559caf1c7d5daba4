"""Filters on a whole volume of labels in memory: small objects, holes.

``stages.predict.filters`` calls them after checking the memory budget; all arrays are (z, y, x).
"""

from __future__ import annotations

import cc3d
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from connectomics.volumes.volume import Array


def remove_small_objects(labels: Array, minimum_voxels: int) -> Array:
    """Set connected components of fewer than ``minimum_voxels`` voxels to 0.

    Parameters
    ----------
    labels
        uint8 or uint16 (z, y, x). A component is a set of voxels of one label that touch by faces, edges or
        corners (26-connected).
    minimum_voxels
        Components of at least this many voxels stay.

    Returns
    -------
    array
        A new array of the same dtype.
    """
    kept: Array = cc3d.dust(labels, threshold=minimum_voxels, connectivity=26, in_place=False)
    return kept


def fill_holes(labels: Array) -> Array:
    """Give background that a label encloses to that label.

    A hole of a label is a 6-connected set of voxels without that label that does not reach the border of the
    volume; what is background (0) in it is filled, other labels stay. An axis of one voxel has no border, so
    a single section is filled as a 2D image. Where several labels enclose a voxel, the lowest takes it.

    Parameters
    ----------
    labels
        uint8 or uint16 (z, y, x).

    Returns
    -------
    array
        A new array of the same dtype.
    """
    filled = labels.copy()
    for i, box in enumerate(ndimage.find_objects(labels)):
        if box is not None:
            # Everything outside the label's bounding box reaches the border, so its holes lie within.
            _fill_label(filled[box], labels[box] == i + 1, i + 1, labels.shape)
    return filled


def _fill_label(filled: Array, inside: npt.NDArray[np.bool_], label: int, volume: tuple[int, ...]) -> None:
    outside = cc3d.connected_components(~inside, connectivity=6)
    is_hole = np.ones(int(outside.max()) + 1, bool)
    is_hole[0] = False
    for axis, length in enumerate(volume):
        if length > 1:
            is_hole[np.take(outside, (0, -1), axis=axis)] = False
    filled[is_hole[outside] & (filled == 0)] = label
