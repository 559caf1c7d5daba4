"""One uncompressed array inside a file, memory-mapped anew for each read; for ``npy``, ``nifti`` and ``mrc``."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import IO, Literal

import numpy as np

from connectomics.volumes.stored import row_chunk
from connectomics.volumes.volume import Array


class MappedArray:
    """An array at an offset of an open file; nothing of it stays in memory between reads.

    Parameters
    ----------
    stream
        The file, open for reading; stays the caller's.
    dtype
        Element type as stored.
    shape
        Of the stored array.
    offset
        Bytes before its first element.
    order
        "C": the last axis is contiguous; "F": the first.

    Raises
    ------
    ValueError
        If the file is shorter than the array.
    """

    def __init__(
        self,
        stream: IO[bytes],
        dtype: np.dtype[np.generic],
        shape: Sequence[int],
        offset: int,
        order: Literal["C", "F"] = "C",
    ) -> None:
        self._stream = stream
        self._dtype = dtype
        self._shape = tuple(int(n) for n in shape)
        self._offset = offset
        self._order = order
        self._bytes = offset + math.prod(self._shape) * dtype.itemsize
        self._require_whole()

    @property
    def chunk(self) -> tuple[int, ...]:
        """Stored shape of the piece that is cheapest to read at once."""
        return contiguous_chunk(self._shape, self._dtype.itemsize, self._order)

    def fetch(self, index: tuple[slice, ...]) -> Array:
        """A copy of the voxels at an index."""
        self._require_whole()
        mapped = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ)
        array: Array = np.ndarray(self._shape, self._dtype, mapped, self._offset, order=self._order)
        return np.array(array[index])

    def _require_whole(self) -> None:
        found = os.fstat(self._stream.fileno()).st_size
        if found < self._bytes:
            raise ValueError(f"the file has {found} bytes, its header promises {self._bytes}; it was cut short")


def contiguous_chunk(shape: Sequence[int], itemsize: int, order: Literal["C", "F"]) -> tuple[int, ...]:
    """The cheap unit of an array that is stored without chunks: neighbours in the file."""
    return row_chunk(shape, itemsize) if order == "C" else row_chunk(shape[::-1], itemsize)[::-1]
