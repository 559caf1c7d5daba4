"""An array that a text header describes: raw, packed or as text, behind the header or in a file beside it."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.mapped import LARGEST_RATIO, UNPACKED_BYTES, MappedArray, UnpackedArray
from connectomics.volumes.source import Source
from connectomics.volumes.volume import Array
from connectomics.volumes.watched import WatchedFiles

LARGEST_TEXT_BYTES = 1 << 26
FROM_THE_END = -1
"""Where a number of bytes to skip is expected: all that stand before the last ones, which are the array."""


@dataclass(frozen=True, slots=True)
class RawArray:
    """Where an array stands and how.

    Parameters
    ----------
    path
        The file.
    dtype
        As stored.
    shape
        The fastest axis first.
    offset
        Bytes of the file before it, or FROM_THE_END.
    packing
        raw, gzip, bzip2, zlib or text.
    skipped
        Bytes to leave out once it is unpacked, or FROM_THE_END.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    packing: str = "raw"
    skipped: int = 0

    @property
    def total_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self, source: Source, opened: contextlib.ExitStack) -> Callable[[tuple[slice, ...]], Array]:
        """The function that fetches an index; what it needs is closed by ``opened``.

        Raises
        ------
        ValueError, OSError
            If the file is shorter than it should be, or too large where it must be held in memory.
        """
        if min(self.shape, default=0) < 1:
            raise ValueError(f"its header states the shape {self.shape[::-1]}, in which an axis has no voxel")
        size = self.path.stat().st_size
        if self.packing == "text":
            return self._text().__getitem__
        stream = opened.enter_context(self.path.open("rb"))
        if self.packing == "raw":
            offset = size - self.total_bytes if self.offset == FROM_THE_END else self.offset
            if offset < 0:
                raise ValueError(f"{self.path.name} has {size} bytes, its header promises more; it was cut short")
            return MappedArray(stream, self.dtype, self.shape, offset, order="F").fetch
        if self.packing != "bzip2" and self.total_bytes > LARGEST_RATIO * size:
            raise ValueError(f"its header promises {self.total_bytes} bytes, more than the file can hold")
        skipped = self._before_the_last() if self.skipped == FROM_THE_END else self.skipped
        array = UnpackedArray(
            source,
            self._unpacking,
            skipped + self.total_bytes,
            lambda file: MappedArray(file, self.dtype, self.shape, skipped, order="F"),
        )
        opened.callback(array.close)
        return array.fetch

    def _text(self) -> Array:
        size = self.path.stat().st_size
        if size > LARGEST_TEXT_BYTES:
            raise ValueError(f"voxels written as text take {size} bytes, expected at most {LARGEST_TEXT_BYTES}")
        words = self.path.read_bytes()[self.offset :].decode("ascii").split()
        if len(words) != math.prod(self.shape):
            raise ValueError(f"it holds {len(words)} voxels written as text, its header promises {self.shape[::-1]}")
        return np.array(words).astype(self.dtype).reshape(self.shape, order="F")

    def _unpacking(self) -> IO[bytes]:
        stream = self.path.open("rb")
        stream.seek(self.offset)
        kinds: dict[str, Callable[[IO[bytes]], Any]] = {"gzip": _gunzipping, "bzip2": bz2.BZ2File, "zlib": _Inflating}
        return cast(IO[bytes], _Unpacking(stream, kinds[self.packing](stream)))

    def _before_the_last(self) -> int:
        count = 0
        with self._unpacking() as stream:
            while piece := stream.read(UNPACKED_BYTES):
                count += len(piece)
                if count > self.total_bytes + UNPACKED_BYTES:
                    raise ValueError(f"it goes on beyond the {self.total_bytes} bytes that its header promises")
        if count < self.total_bytes:
            raise ValueError(f"it unpacks to {count} bytes, its header promises {self.total_bytes}; it was cut short")
        return count - self.total_bytes


def _gunzipping(stream: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=stream)


class _Unpacking:
    """A stream of unpacked bytes, which closes the file below it, too."""

    def __init__(self, stream: IO[bytes], unpacked: Any) -> None:
        self._stream = stream
        self.read = unpacked.read

    def __enter__(self) -> _Unpacking:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class _Inflating:
    """A stream of what zlib packed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._zlib = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while not self._zlib.eof:
            packed = self._zlib.unconsumed_tail or self._stream.read(1 << 16)
            if not packed:
                raise EOFError("what is packed was cut short")
            if piece := self._zlib.decompress(packed, size):
                return piece
        return b""


def beside(source: Source, name: str) -> Path:
    """The file of voxels that a header names; a VolumeError if it lies in another folder or is absent."""
    if Path(name).name != name or "%" in name or "*" in name or name.split(" ")[0] == "LIST":
        raise VolumeError(
            f"{source.uri}: its header names {name!r:.80} for the voxels, which is not one file beside it; join them "
            "into one file, for example by SimpleITK's WriteImage of what ReadImage gives."
        )
    path = source.path.with_name(name)
    if not path.is_file():
        raise VolumeError(f"{source.uri}: the file of its voxels, {name!r:.80}, is absent; copy it beside the header.")
    return path


def watched_files(source: Source, array: RawArray) -> WatchedFiles:
    """The file, or the header and the file beside it."""
    return WatchedFiles(source.path, [] if array.path == source.path else [(array.path.name, array.path)])


def text_before(path: Path, is_end: Callable[[bytes], bool], limit: int = 1 << 20) -> tuple[list[str], int]:
    """The lines of a header up to one that ends it, which is the last, and the bytes they take."""
    lines, taken = [], 0
    with path.open("rb") as stream:
        for line in iter(functools.partial(stream.readline, limit), b""):
            taken += len(line)
            lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
            if is_end(line):
                return lines, taken
            if taken > limit:
                raise ValueError("its header has no end")
    return lines, taken
