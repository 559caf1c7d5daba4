"""The tiles in which the survey reads a volume, ahead of what looks at them. ``survey`` and ``bands`` call this."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from connectomics.core.geometry import AxisOrder, BlockGrid, Box, Vec3, vec3
from connectomics.inference.normalise import is_exact
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey.finite import check_finite, clipped_channels, finite
from connectomics.stages.survey.mask import is_inside
from connectomics.stages.survey.tallies import CaseTally, SectionExtremes, TileTallies
from connectomics.volumes.reoriented import Orientation, ReorientedVolume
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

TILE_VOXELS = 1 << 23


def tile_shape(info: VolumeInfo) -> Vec3:
    """Shape (z, y, x) of the pieces the survey reads: whole input chunks, about 8 million voxels.

    Examples
    --------
    >>> import numpy as np
    >>> tile_shape(VolumeInfo((1, 100, 4096, 4096), np.dtype(np.uint8), (1, 4096, 4096)))
    (1, 2048, 4096)
    """
    shape = [min(c, n) for c, n in zip(info.chunk_shape, info.extent, strict=True)]
    for axis in (2, 1, 0):
        while shape[axis] < info.extent[axis] and math.prod(shape) * 2 <= TILE_VOXELS:
            shape[axis] = min(info.extent[axis], shape[axis] * 2)
    for axis in (0, 1, 2):
        excess = math.prod(shape) / TILE_VOXELS
        if excess > 1:
            shape[axis] = max(1, int(shape[axis] / excess))
    return vec3(shape)


@dataclass(frozen=True, slots=True)
class SurveyPass:
    """One pass over a volume: what is read, how, and what is gathered.

    Parameters
    ----------
    reader
        The volume, turned so that its first axis is the one across which sections lie.
    name
        Of the volume, for messages.
    order
        How the volume was turned.
    clipped
        Channels that may hold infinities, which count as float32's largest numbers.
    plane_axis
        The axis along which the range of each section is gathered; None: of none.
    workers
        Threads that read ahead.
    """

    reader: VolumeReader
    name: str
    order: AxisOrder
    clipped: tuple[int, ...]
    plane_axis: int | None
    workers: int

    @property
    def info(self) -> VolumeInfo:
        """What the turned volume says of itself."""
        return self.reader.info

    @property
    def exact(self) -> bool:
        """Whether statistics are integer sums, which merge in any order."""
        return is_exact(self.reader.info.dtype)

    def planes(self, box: Box) -> SectionExtremes | None:
        """What learns of the range of each section of a box, where that is gathered."""
        if self.plane_axis is None:
            return None
        return SectionExtremes(box, self.reader.info.channels, self.plane_axis)

    def tiles(self, within: Box, planes: SectionExtremes | None) -> Iterator[TileTallies]:
        """The tiles of a box, which begins where a tile does, in raster order; ``planes`` learn of each.

        Raises
        ------
        VolumeError
            If a voxel is no finite number, nor clipped.
        """
        for box, tile in self._read(within):
            tile = finite(tile, self.clipped)
            check_finite(tile, box, self.name, self.order)
            nonzero = is_inside(tile)
            if planes is not None:
                planes.add(tile, box)
            cuts = ((slice(i, i + 1), box.shift((i, 0, 0))) for i in range(box.shape[0]))
            yield box, (CaseTally.of(tile[:, here], nonzero[here], origin) for here, origin in cuts)

    def _read(self, within: Box) -> Iterator[tuple[Box, Array]]:
        """Tiles in raster order, ``workers`` of them read ahead."""
        grid = BlockGrid(within.shape, tile_shape(self.reader.info))
        boxes = (block.core.shift(within.start) for block in grid)
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            ahead = itertools.islice(boxes, self.workers)
            pending = deque((box, pool.submit(self.reader.read, box)) for box in ahead)
            while pending:
                box, tile = pending.popleft()
                values = tile.result()
                pending.extend((more, pool.submit(self.reader.read, more)) for more in itertools.islice(boxes, 1))
                yield box, values


def survey_pass(
    reader: VolumeReader,
    name: str,
    schemes: Sequence[ChannelNormalisation],
    *,
    section_axis: int | None,
    plane_axis: int | None,
    workers: int = 1,
) -> SurveyPass:
    """The pass for such a survey; see ``survey``. With a ``section_axis`` each section across it is a case."""
    order = AxisOrder.across(section_axis or 0)
    source = reader if order.identity else ReorientedVolume(reader, Orientation(order=order))
    gathered = plane_axis if section_axis is None else None
    return SurveyPass(source, name, order, clipped_channels(schemes), plane_axis=gathered, workers=workers)
