"""The mask that models with nnU-Net's ``use_mask_for_norm`` are normalised within: nonzero voxels, holes filled.

The labels of a cascade's previous stage are resampled within it too.
The survey makes it of a case that is a volume. A section has no holes: along z, all of it lies at the border.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy import ndimage

from connectomics.errors import ResourceError
from connectomics.geometry import Box, Vec3
from connectomics.io.volume import Array

BACKGROUND, INSIDE, OUTSIDE = range(3)
SECTION_BYTES = 24  # per voxel of the one section that is being filled: its parts as bool, the edge that grows


def mask_bytes(extent: Vec3) -> int:
    """Memory that the mask of a volume (z, y, x) takes, from the survey to the last block."""
    return Box.of_shape(extent).voxels


def check_mask_memory(extent: Vec3, budget_bytes: int) -> None:
    """Refuse a volume whose mask does not fit the memory budget, before anything is read.

    Raises
    ------
    ResourceError
        Saying what it needs.
    """
    need = mask_bytes(extent) + extent[1] * extent[2] * SECTION_BYTES
    if need > budget_bytes:
        raise ResourceError(
            "the model needs the mask of nonzero voxels whole (use_mask_for_norm, or a cascade that is resampled): for "
            f"{extent} voxels it needs {need / 1e9:.3f} GB, the memory budget is {budget_bytes / 1e9:.3f} GB; raise "
            "system.memory_budget_gb, or label a cropped copy of the volume"
        )


def fill_holes(mask: Array) -> None:
    """Fill the holes of a mask in place: background that steps along the axes cannot leave the array from.

    Equal to scipy's ``binary_fill_holes``, which nnU-Net calls, in the memory of the mask and a section: the outside
    grows through one section after the other, down and up until it grows no more.

    Parameters
    ----------
    mask
        bool (z, y, x), contiguous.
    """
    state = mask.view(np.uint8)
    for axis, face in itertools.product(range(3), (0, -1)):
        border = state[(slice(None),) * axis + (face,)]
        border[border == BACKGROUND] = OUTSIDE
    before, grown, down = 0, True, True
    while grown or not down:  # at least once each way
        grown = False
        for z in range(len(state)) if down else reversed(range(len(state))):
            undecided = state[z] == BACKGROUND
            if undecided.any():
                reached = (state[z] == OUTSIDE) | (undecided & (state[before] == OUTSIDE))
                undecided &= ndimage.binary_propagation(reached, mask=state[z] != INSIDE)
                state[z][undecided] = OUTSIDE
                grown |= bool(undecided.any())
            before = z
        down = not down
    np.not_equal(state, OUTSIDE, out=mask)
