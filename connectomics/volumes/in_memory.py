"""A volume whose voxels are an array in memory."""

from __future__ import annotations

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, Vec3
from connectomics.volumes.volume import Array, Nanometres, VolumeInfo


class ArrayVolume:
    """A VolumeReader over an array; it has no identity, as nothing of it is stored.

    Parameters
    ----------
    array
        (c, z, y, x), kept and not copied; bool becomes uint8.
    chunk_shape
        (z, y, x) in which it is read when it is read piece by piece; a section where none is given.
    voxel_size_nm
        (z, y, x), where it is known.

    Examples
    --------
    >>> ArrayVolume(np.ones((1, 2, 3, 4))).read(Box((0, 0, 0), (1, 1, 2)))
    array([[[[1., 1.]]]])
    """

    def __init__(
        self, array: Array, chunk_shape: Vec3 | None = None, *, voxel_size_nm: Nanometres | None = None
    ) -> None:
        self._array = array.astype(np.uint8) if array.dtype.kind == "b" else array
        c, z, y, x = array.shape
        self.info = VolumeInfo(
            (c, z, y, x), self._array.dtype.newbyteorder("="), chunk_shape or (1, y, x), voxel_size_nm
        )
        self.identity: dict[str, object] = {}
        self._closed = False

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new array; see ``VolumeReader``."""
        if self._closed or not Box.of_shape(self.info.extent).contains(box):
            why = "the volume was closed" if self._closed else f"outside the volume of {self.info.extent}"
            raise VolumeError(f"cannot read the array in memory, voxels {box.start} to {box.stop}: {why}.")
        return np.array(self._array[(slice(None), *box.slices)], self.info.dtype, order="C")

    def close(self) -> None:
        """Read no more; closing twice is harmless."""
        self._closed = True
