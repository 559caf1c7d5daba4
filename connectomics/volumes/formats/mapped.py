"""One array inside a file in C or Fortran order: memory-mapped anew for each read, or unpacked once and then mapped."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Literal

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.source import Source
from connectomics.volumes.stored import row_chunk
from connectomics.volumes.volume import Array

UNPACKED_BYTES = 4 << 20  # at a time
LARGEST_RATIO = 1040  # gzip packs 1032 bytes into one at best


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


class UnpackedArray:
    """The array of a packed file, unpacked when first asked for into an anonymous temporary file, and then mapped.

    Parameters
    ----------
    source
        The request, for messages.
    open_packed
        Gives a stream of the unpacked bytes.
    total_bytes
        How many there are, as the header promises.
    mapped
        Gives the array in the file of the unpacked bytes.
    """

    def __init__(
        self,
        source: Source,
        open_packed: Callable[[], IO[bytes]],
        total_bytes: int,
        mapped: Callable[[IO[bytes]], MappedArray],
    ) -> None:
        self._source = source
        self._open = open_packed
        self._bytes = total_bytes
        self._mapped = mapped
        self._lock = threading.Lock()
        self._stream: IO[bytes] | None = None
        self._array: MappedArray | None = None

    def fetch(self, index: tuple[slice, ...]) -> Array:
        """A copy of the voxels at an index."""
        with self._lock:
            if self._array is None:
                self._array = self._unpack()
        return self._array.fetch(index)

    def close(self) -> None:
        """Remove what was unpacked."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
            self._array = self._stream = None

    def _unpack(self) -> MappedArray:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if self._bytes > free:
            raise VolumeError(
                f"{self._source.uri}: unpacked it takes {self._bytes} bytes, but {folder} has {free} free; "
                "set TMPDIR to a folder with more room, or write it unpacked."
            )
        with contextlib.ExitStack() as opened:
            stream: IO[bytes] = opened.enter_context(tempfile.TemporaryFile())
            left, surplus = self._bytes, 0
            with self._open() as packed:
                while piece := packed.read(UNPACKED_BYTES):  # to the end, where checksums are
                    stream.write(piece[:left])
                    surplus += max(0, len(piece) - left)
                    left -= min(left, len(piece))
                    if surplus > self._bytes + UNPACKED_BYTES:
                        raise ValueError(f"it goes on beyond the {self._bytes} bytes that its header promises")
            stream.flush()
            array = self._mapped(stream)
            self._stream = stream
            opened.pop_all()
        return array
