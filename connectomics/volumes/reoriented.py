"""A volume with its axes in another order, some of them reversed; for NIfTI files, nnU-Net's folders and the survey."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from connectomics.core.geometry import AxisOrder, Box, vec3
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader


@dataclass(frozen=True, slots=True)
class Orientation:
    """Which axes (z, y, x) of a volume are reversed, and in which order they then come.

    Examples
    --------
    >>> turn = Orientation((True, False, False), AxisOrder((2, 0, 1)))
    >>> turn.inverse
    Orientation(reversed=(False, True, False), order=AxisOrder(axes=(1, 2, 0)))
    """

    reversed: tuple[bool, bool, bool] = (False, False, False)
    order: AxisOrder = field(default_factory=AxisOrder)

    @property
    def inverse(self) -> Orientation:
        """The turn that undoes this one."""
        return Orientation(self.order.turn(self.reversed), self.order.inverse)

    def of_info(self, info: VolumeInfo) -> VolumeInfo:
        """The description of the turned volume."""
        (channels, *extent), order = info.shape, self.order
        return dataclasses.replace(
            info,
            shape=(channels, *order.turn(vec3(extent))),
            chunk_shape=order.turn(info.chunk_shape),
            voxel_size_nm=None if info.voxel_size_nm is None else order.turn(info.voxel_size_nm),
            spacing=None if info.spacing is None else order.turn(info.spacing),
        )


class ReorientedVolume:
    """A VolumeReader over another one, turned. Closing it closes the other."""

    def __init__(self, volume: VolumeReader, turn: Orientation) -> None:
        self._volume = volume
        self._turn = turn
        self.info = turn.of_info(volume.info)

    @property
    def identity(self) -> dict[str, object]:
        """That of the volume, and how it is turned."""
        return self._volume.identity | {"turned": [list(self._turn.reversed), list(self._turn.order.axes)]}

    def read(self, box: Box) -> Array:
        """Voxels of ``box``; see ``VolumeReader``."""
        asked = self._turn.order.inverse.turn_box(box)
        ends = zip(self._turn.reversed, asked.start, asked.stop, self._volume.info.extent, strict=True)
        spans = [(n - stop, n - start) if back else (start, stop) for back, start, stop, n in ends]
        block = self._volume.read(Box(vec3([a for a, _ in spans]), vec3([b for _, b in spans])))
        block = block[(slice(None), *(slice(None, None, -1 if back else 1) for back in self._turn.reversed))]
        return np.ascontiguousarray(block.transpose(self._turn.order.of_array))

    def close(self) -> None:
        """Close the volume."""
        self._volume.close()
