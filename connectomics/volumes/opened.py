"""``OpenedVolume``: what ``open_volume`` gives, a reader that is an array, too, for numpy, dask and whoever indexes."""

from __future__ import annotations

from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, vec3
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader


class OpenedVolume:
    """A volume that is read where it is asked for; a VolumeReader, an array (c, z, y, x) and a context manager.

    Parameters
    ----------
    reader
        The volume.
    uri
        As it was named, for messages.
    format
        What it was taken for.

    Examples
    --------
    >>> from connectomics import open_volume
    >>> with open_volume("phantom:4x64x64?seed=7") as volume:
    ...     volume.shape, volume[0, 2, :8, ::2].shape, np.asarray(volume).dtype
    ((1, 4, 64, 64), (8, 32), dtype('uint8'))
    """

    def __init__(self, reader: VolumeReader, uri: str, format: str) -> None:
        self._reader = reader
        self.uri = uri
        self.format = format

    @property
    def info(self) -> VolumeInfo:
        """Shape, dtype and physical frame, and where each was found."""
        return self._reader.info

    @property
    def identity(self) -> dict[str, object]:
        """Names, sizes and modification times of the files that make up the volume."""
        return self._reader.identity

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(c, z, y, x) in voxels."""
        return self.info.shape

    @property
    def ndim(self) -> int:
        """Four."""
        return len(self.info.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.info.dtype

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new (c, z, y, x) array; see ``VolumeReader``.

        Raises
        ------
        VolumeError
            If the storage cannot be read, the volume is closed, or ``box`` is no box inside it.
        """
        if not isinstance(box, Box) or not all(isinstance(n, int | np.integer) for n in (*box.start, *box.stop)):
            raise VolumeError(
                f"cannot read {self.uri}: {box!r:.80} is no box of voxels; give a connectomics.Box(start, stop), each "
                "three whole numbers (z, y, x)"
            )
        return self._reader.read(box)

    def close(self) -> None:
        """Release the storage; closing twice is harmless."""
        self._reader.close()

    def __enter__(self) -> OpenedVolume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.format} volume {self.uri!r} {self.shape} {self.dtype}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a volume is read into a new array, which is a copy")  # what numpy asks for
        try:
            voxels = self.read(Box.of_shape(self.info.extent))
        except MemoryError as error:
            raise VolumeError(
                f"{self.uri}: {self.shape} {self.dtype} voxels do not fit in memory; read a part, volume[:, :10]"
            ) from error
        return voxels if dtype is None else voxels.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Array:
        spans, view = self._plan(index if isinstance(index, tuple) else (index,))
        block = self.read(Box(vec3([a for a, _ in spans[1:]]), vec3([b for _, b in spans[1:]])))
        voxels: Array = block[(slice(*spans[0]), ...)][view]
        return voxels

    def _plan(self, index: tuple[Any, ...]) -> tuple[list[tuple[int, int]], tuple[Any, ...]]:
        """The smallest range of each axis that an index touches, and the index into these."""
        at = next((i for i, part in enumerate(index) if part is Ellipsis), len(index))
        ahead, behind = index[:at], index[at + 1 :]
        missing = self.ndim - len(ahead) - len(behind)
        if missing < 0:
            raise self._no_index(index)
        spans: list[tuple[int, int]] = []
        view: list[Any] = []
        for part, length in zip((*ahead, *[slice(None)] * missing, *behind), self.shape, strict=True):
            if isinstance(part, slice):
                try:
                    steps = range(*part.indices(length))
                except (TypeError, ValueError) as error:
                    raise self._no_index(index) from error
                low, high = (min(steps[0], steps[-1]), max(steps[0], steps[-1]) + 1) if steps else (0, 0)
                spans.append((low, high))
                view.append(slice(None, None, steps.step) if steps else slice(0, 0))
            elif isinstance(part, SupportsIndex) and -length <= (i := part.__index__()) < length:
                spans.append((i % length, i % length + 1))
                view.append(0)
            else:
                raise self._no_index(index)
        return spans, tuple(view)

    def _no_index(self, index: object) -> VolumeError:
        return VolumeError(
            f"{self.uri}: [{index!r:.80}] is no index of shape (c, z, y, x) = {self.shape}; use whole numbers inside "
            "it and slices"
        )
