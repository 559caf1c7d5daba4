"""Sections that lie across the file's own: several are read at once, for each may need every chunk of the volume."""

from __future__ import annotations

from connectomics.core.geometry import Box
from connectomics.inference.case import ReadBox
from connectomics.volumes.volume import Array

SLAB_BYTES = 64 << 20  # raw voxels of the sections that are held


class SlabReader:
    """Reads boxes of one section after the other, and with each box the same part of the sections behind it.

    A PNG of a stack holds one row of each section across y, and all of them are decoded to read one section. What is
    held are so many sections as fit ``SLAB_BYTES``; what the first one took tells how many that are.

    Parameters
    ----------
    read
        Gives raw voxels (c, z, y, x) of any box of the volume.
    axis
        The axis (0 = z, 1 = y, 2 = x) across which the sections lie.
    stop
        The section after the last one that will be read.
    """

    def __init__(self, read: ReadBox, axis: int, stop: int) -> None:
        self._read, self._axis, self._stop = read, axis, stop
        self._slabs: list[tuple[Box, Array]] = []
        self._at = -1  # the section that is being read, what it took so far, and most that one before it took
        self._taken = 0
        self._most = 0
        self._voxel_bytes = 0

    def __call__(self, box: Box) -> Array:
        """Raw voxels (c, z, y, x) of a box; not to be written to."""
        if box.shape[self._axis] != 1:
            return self._read(box)
        if box.start[self._axis] != self._at:
            self._at, self._most, self._taken = box.start[self._axis], max(self._most, self._taken), 0
            self._slabs = [slab for slab in self._slabs if slab[0].stop[self._axis] > self._at]
        found = self._found(box)
        self._taken += found.nbytes
        return found

    def _found(self, box: Box) -> Array:
        for kept, voxels in self._slabs:
            if kept.contains(box):
                part: Array = voxels[(slice(None), *box.relative_to(kept).slices)]
                return part
        left = SLAB_BYTES - sum(voxels.nbytes for _, voxels in self._slabs)
        roi = min(SLAB_BYTES // self._most, self._stop - self._at) if self._most else 1
        slab = box.with_span(self._axis, self._at, self._at + max(1, roi))
        if roi <= 1 or slab.voxels * self._voxel_bytes > left:
            voxels = self._read(box)
            self._voxel_bytes = voxels.nbytes // box.voxels
            return voxels
        self._slabs.append((slab, self._read(slab)))
        return self._found(box)
