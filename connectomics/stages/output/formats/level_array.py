"""One level of a pyramid on disk as a (c, z, y, x) array; every chunked format opens its levels as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from connectomics.core.errors import OutputError, VolumeError
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.stages.output.shards import ShardWriter
from connectomics.volumes.formats.chunked import ChunksOnDisk, open_stored
from connectomics.volumes.source import READ_ERRORS, reason
from connectomics.volumes.volume import Array


class LevelArray:
    """One level of a pyramid on disk.

    Parameters
    ----------
    path
        Folder of the pyramid, for messages.
    stored
        TensorStore handle with axes (c, z, y, x) or (z, y, x).
    unit_shape
        (z, y, x) that is written at once, whole chunks and shards; None for those of the storage.
    shards
        Writes units part by part; None where TensorStore is given whole ones.
    folders
        The folders of the files of a unit's chunks, where they are not those of ``shards`` and the format's ``files``
        do not make them.
    """

    def __init__(
        self,
        path: Path,
        stored: Any,
        unit_shape: Vec3 | None = None,
        shards: ShardWriter | None = None,
        *,
        folders: Callable[[Box], Iterable[Path]] | None = None,
    ) -> None:
        self._path = path
        self._stored = stored
        self._shards = shards
        self._unit = unit_shape or vec3(stored.chunk_layout.write_chunk.shape[-3:])
        self._folders = folders or (shards.folders if shards else lambda box: ())
        self._disk = ChunksOnDisk(path)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(c, z, y, x) in voxels."""
        shape = tuple(int(n) for n in self._stored.shape)
        c, z, y, x = shape if len(shape) == 4 else (1, *shape)
        return (c, z, y, x)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored voxels."""
        dtype: np.dtype[Any] = self._stored.dtype.numpy_dtype
        return dtype

    @property
    def chunk_shape(self) -> Vec3:
        """(z, y, x) of the unit of compression."""
        return vec3(self._stored.chunk_layout.read_chunk.shape[-3:])

    @property
    def unit_shape(self) -> Vec3:
        """(z, y, x) that is written at once; units at the far faces are clipped."""
        return self._unit

    @property
    def part_shape(self) -> Vec3:
        """(z, y, x) of a unit that is held in memory at once, whole chunks."""
        return self._unit if self._shards is None else self._shards.part_shape

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new (c, z, y, x) array, 0 where nothing was written; a VolumeError if that fails."""
        try:
            voxels: Array = self._stored[self._index(box)].read().result()
        except READ_ERRORS as error:
            raise VolumeError(
                f"cannot read voxels {box.start} to {box.stop} of {self._path}: {reason(error)}. Remove it and "
                "run again."
            ) from error
        return np.ascontiguousarray(voxels.reshape(self.shape[0], *box.shape))

    def write(self, box: Box, parts: Iterable[tuple[Box, Array]]) -> None:
        """Write a unit; on return it is on the disk, each file whole.

        Parameters
        ----------
        box
            The unit, clipped to the volume.
        parts
            Boxes of ``part_shape`` that fill it, with their voxels (c, z, y, x).

        Raises
        ------
        OutputError
            If the storage refuses.
        """
        try:
            if self._shards is not None:
                self._shards.write(box, parts)
            else:
                self._write(parts)
            self._disk.keep(self._folders(box))
        except READ_ERRORS as error:
            raise OutputError(
                f"cannot write voxels {box.start} to {box.stop} of {self._path}: {reason(error)}. Free disk space or "
                "mend the permission, then run again; finished blocks are kept."
            ) from error

    def _write(self, parts: Iterable[tuple[Box, Array]]) -> None:
        with ts.Transaction() as transaction:  # so that the chunks of a shard arrive together
            stored = self._stored.with_transaction(transaction)
            for part, voxels in parts:
                target = stored[self._index(part)]
                target.write(voxels.reshape(target.shape)).result()

    def _index(self, box: Box) -> tuple[slice, ...]:
        return box.slices if self._stored.rank == 3 else (slice(None), *box.slices)


def open_driver(driver: str, folder: Path, **more: object) -> Any:
    """TensorStore's handle of an array on disk; an OutputError if its metadata are damaged or gone."""
    try:
        return open_stored(driver, folder, writable=True, **more)
    except READ_ERRORS as error:
        raise OutputError(f"cannot open {folder}: {reason(error)}. Remove it and run again.") from error
