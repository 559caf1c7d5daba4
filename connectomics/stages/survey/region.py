"""Which voxels of a volume are wanted: a box, a mask, or where both hold; decides which blocks have work.

``assembly`` makes a ``RegionOfInterest`` of ``inference.roi`` and ``inference.mask``; runner and predict task ask it.
It is about labels only: statistics, nonzero box and windows stay those of the whole case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.execution.retry import RetryingReader
from connectomics.stages.survey.placement import Placement, placed_by_extent
from connectomics.volumes.volume import VolumeReader

PIECE_BYTES = 1 << 24  # of a mask read at once
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RegionOfInterest:
    """The wanted voxels of one volume.

    Parameters
    ----------
    extent
        Of the volume (z, y, x) in voxels.
    box
        Nothing outside it is wanted; it lies inside the volume.
    mask
        One channel at the volume's resolution or a lower one: a voxel of the volume is wanted where the mask's voxel
        that it lies in is not zero. None where the box says it all. It is read piece by piece.
    name
        Of the mask, for messages.
    placement
        Where the mask lies; None: as its extent alone says.

    Raises
    ------
    VolumeError
        If the mask does not belong to such a volume.
    """

    extent: Vec3
    box: Box
    mask: VolumeReader | None = None
    name: str = ""
    placement: Placement | None = None

    def __post_init__(self) -> None:
        if self.mask is not None:
            _require_one_channel(self.mask, self.name)
            if self.placement is None:
                object.__setattr__(self, "placement", placed_by_extent(self.extent, self.mask.info, self.name))

    def within(self, core: Box) -> tuple[Box, Flags | None]:
        """The smallest box around the wanted voxels of ``core``, and which of its voxels they are.

        Returns
        -------
        box
            Inside ``core``; empty where nothing is wanted.
        flags
            bool (z, y, x) of the box's extent, or None where all of it is wanted.

        Raises
        ------
        VolumeError
            If the mask cannot be read or holds what is not a number.
        """
        box = core.intersect(self.box)
        if self.mask is None or not box.voxels:
            return box, None
        index = [self._seen(axis, np.arange(box.start[axis], box.stop[axis])) for axis in range(3)]
        seen = Box(vec3([int(i[0]) for i in index]), vec3([int(i[-1]) + 1 for i in index]))
        flags = self._flags(seen)
        if not flags.any():
            return Box(box.start, box.start), None
        index = [i - first for i, first in zip(index, seen.start, strict=True)]
        spans = [_ends(flags, axis, i) for axis, i in enumerate(index)]
        inner = Box(vec3([a for a, _ in spans]), vec3([b + 1 for _, b in spans]))
        part: Flags = flags[np.ix_(*(i[a : b + 1] for i, (a, b) in zip(index, spans, strict=True)))]
        return inner.shift(box.start), None if part.all() else part

    def blocks(self, grid: BlockGrid) -> Flags:
        """Which blocks hold a wanted voxel: bool of ``grid.counts``; the mask is read once, many blocks at a time.

        Raises VolumeError if the mask cannot be read or holds what is not a number.
        """
        flags = np.zeros(grid.counts, bool)
        first, spans = zip(*(self._spans(grid, axis) for axis in range(3)), strict=True)
        touched = Box(vec3(first), vec3([a + len(s) for a, s in zip(first, spans, strict=True)]))
        if self.mask is None:
            flags[touched.slices] = True
            return flags
        for tile in BlockGrid(touched.shape, _blocks_at_once(spans, self.mask.info.dtype.itemsize)):
            parts = [s[a:b] for s, a, b in zip(spans, tile.core.start, tile.core.stop, strict=True)]
            seen = Box(vec3([int(p[0, 0]) for p in parts]), vec3([int(p[-1, 1]) for p in parts]))
            found = self._flags(seen)
            for axis, part in enumerate(parts):
                found = _any_of(found, part - seen.start[axis], axis)
            flags[tile.core.shift(touched.start).slices] = found
        return flags

    def patiently(self, pauses_s: tuple[float, ...]) -> RegionOfInterest:
        """The same, with a mask whose reading is tried again when it fails for a moment."""
        if self.mask is None:
            return self
        return replace(self, mask=RetryingReader(self.mask, self.name, pauses_s))

    def close(self) -> None:
        """Release the mask; closing twice is harmless."""
        if self.mask is not None:
            self.mask.close()

    def _seen(self, axis: int, voxels: Indices) -> Indices:
        """The mask's voxels that decide over the volume's, along one axis."""
        assert self.placement is not None
        return self.placement[axis].seen(voxels)

    def _spans(self, grid: BlockGrid, axis: int) -> tuple[int, Indices]:
        """The first block that touches the box along an axis, and of each that does the mask's voxels (start, stop)."""
        size, low, high = grid.block_shape[axis], self.box.start[axis], self.box.stop[axis]
        first, stop = low // size, -(-high // size)
        starts = np.arange(first, stop, dtype=np.int64) * size
        ends = np.minimum(starts + size, high)
        starts = np.maximum(starts, low)
        if self.mask is None:
            return first, np.stack([starts, ends], axis=1)
        return first, np.stack([self._seen(axis, starts), self._seen(axis, ends - 1) + 1], axis=1)

    def _flags(self, box: Box) -> Flags:
        """Which voxels of a box of the mask are not zero."""
        assert self.mask is not None
        flags = np.empty(box.shape, bool)
        for piece in _pieces(box, self.mask.info.dtype.itemsize):
            values = self.mask.read(piece)[0]
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise VolumeError(
                    f"{self.name}: NaN or infinite values in voxels (z, y, x) {piece.start} to {piece.stop} of the "
                    "mask; write 0 where nothing is wanted and another number elsewhere"
                )
            flags[piece.relative_to(box).slices] = values != 0
        return flags


def require_inside(box: Box, extent: Vec3, name: str) -> None:
    """Refuse a box that does not lie inside a volume, by a VolumeError that says where the volume ends."""
    if not Box.of_shape(extent).contains(box):
        raise VolumeError(
            f"{name}: inference.roi is {box.start} to {box.stop} (z, y, x), but the volume ends at {extent}; state a "
            "box inside the volume"
        )


def _require_one_channel(mask: VolumeReader, name: str) -> None:
    found = mask.info
    if found.channels != 1:
        raise VolumeError(
            f"{name}: the mask has {found.channels} channels, expected one; name an array of one channel, "
            "nonzero where labels are wanted"
        )


def _ends(flags: Flags, axis: int, index: Indices) -> tuple[int, int]:
    """The first and last voxel along an axis whose plane ``index`` of the flags holds a wanted one; there is one."""
    line = np.logical_or.reduce(flags, axis=tuple(a for a in range(3) if a != axis))[index]
    first, last = np.flatnonzero(line)[[0, -1]]
    return int(first), int(last)


def _any_of(flags: Flags, spans: Indices, axis: int) -> Flags:
    """Whether anything is set within each span (start, stop) along an axis; spans may overlap."""
    padding = [(0, int(a == axis)) for a in range(3)]
    each = np.logical_or.reduceat(np.pad(flags, padding), spans.ravel(), axis)
    result: Flags = each.take(np.arange(0, 2 * len(spans), 2), axis)
    return result


def _blocks_at_once(spans: tuple[Indices, ...], itemsize: int) -> Vec3:
    """Return how many blocks (z, y, x) may be asked about with one piece of the mask, one at least."""
    widest = [int((s[:, 1] - s[:, 0]).max()) for s in spans]
    count = [1, 1, 1]
    for axis in (2, 1, 0):
        others = math.prod(n * w for a, (n, w) in enumerate(zip(count, widest, strict=True)) if a != axis)
        fitting = PIECE_BYTES // (others * widest[axis] * itemsize)
        count[axis] = max(1, min(len(spans[axis]), fitting))
    return vec3(count)


def _pieces(box: Box, itemsize: int) -> Iterator[Box]:
    """Whole rows of a box in pieces of bounded size."""
    depth, height, width = box.shape
    rows = max(1, min(height, PIECE_BYTES // (width * itemsize)))
    sections = max(1, min(depth, PIECE_BYTES // (rows * width * itemsize)))
    for piece in BlockGrid(box.shape, (sections, rows, width)):
        yield piece.core.shift(box.start)
