"""Precomputed chunks that are packed file by file (``NAME.gz``, ``NAME.br``), as CloudVolume writes them by default."""

from __future__ import annotations

import bz2
import functools
import itertools
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from connectomics.volumes.formats.chunked import open_stored
from connectomics.volumes.source import file_identity
from connectomics.volumes.stored import RecentArrays
from connectomics.volumes.volume import Array

SPARE_BYTES = 1 << 16
_GZIP = 31  # window bits with gzip's header


def _gzip(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(_GZIP)
    return _whole(stream.decompress(data, limit + 1), limit, complete=stream.eof)


def _xz(data: bytes, limit: int) -> bytes:
    stream = lzma.LZMADecompressor()
    return _whole(stream.decompress(data, limit + 1), limit, complete=stream.eof)


def _bz2(data: bytes, limit: int) -> bytes:
    stream = bz2.BZ2Decompressor()
    return _whole(stream.decompress(data, limit + 1), limit, complete=stream.eof)


def _brotli(data: bytes, limit: int) -> bytes:
    return _by_imagecodecs(imagecodecs.brotli_decode, data, limit)


def _zstd(data: bytes, limit: int) -> bytes:
    return _by_imagecodecs(imagecodecs.zstd_decode, data, limit)


def _by_imagecodecs(decode: Callable[..., Any], data: bytes, limit: int) -> bytes:
    try:
        return bytes(decode(data, out=limit))
    except RuntimeError as error:  # all that imagecodecs says is a number
        raise ValueError(f"it is damaged, or unpacks to more than {limit} bytes") from error


def _whole(content: bytes, limit: int, *, complete: bool) -> bytes:
    if len(content) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")
    if not complete:
        raise ValueError("it is cut short")
    return content


UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    ".gz": _gzip,
    ".br": _brotli,
    ".zst": _zstd,
    ".zstd": _zstd,
    ".xz": _xz,
    ".lzma": _xz,
    ".bz2": _bz2,
}
"""By the suffix of a file: what unpacks its content to at most so many bytes."""


class PackedChunks:
    """The chunks of one scale, each unpacked and given to TensorStore, which decodes it; the last ones are remembered.

    Parameters
    ----------
    folder
        Of the scale's chunks.
    opened
        TensorStore's handle of the scale, from which domain, chunks and type are taken.
    info
        The info file's content with this scale alone.
    """

    def __init__(self, folder: Path, opened: Any, info: dict[str, Any]) -> None:
        self._folder = folder
        self._info = info
        self._key = info["scales"][0]["key"]
        self._origin = tuple(int(n) for n in opened.domain.origin)
        self._shape = tuple(int(n) for n in opened.shape)
        self._chunk = tuple(int(n) for n in opened.chunk_layout.read_chunk.shape)
        self._dtype = opened.dtype.numpy_dtype
        self._limit = 2 * math.prod(self._chunk[:3]) * self._shape[3] * self._dtype.itemsize + SPARE_BYTES
        self._recent = RecentArrays()

    def forget(self) -> None:
        """Drop the remembered chunks."""
        self._recent.clear()

    def fetch(self, index: tuple[slice, ...]) -> Array:
        """The voxels (x, y, z, c) at an index, counted from the first voxel."""
        result = np.empty([span.stop - span.start for span in index], self._dtype)
        for at in itertools.product(*self._touching(index)):
            spans = self._spans(at)
            block = self._recent.get(at, functools.partial(self._decoded, spans))
            shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index[:3], spans, strict=True)]
            into = [slice(s.start - i.start, s.stop - i.start) for s, i in zip(shared, index[:3], strict=True)]
            taken = [slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, spans, strict=True)]
            result[tuple(into)] = block[(*taken, index[3])]
        return result

    def _touching(self, index: tuple[slice, ...]) -> Iterator[range]:
        """Numbers of the chunks along x, y and z that touch an index."""
        for span, n in zip(index[:3], self._chunk[:3], strict=True):
            yield range(span.start // n, -(-span.stop // n))

    def _spans(self, at: tuple[int, ...]) -> list[slice]:
        sizes = zip(at, self._chunk[:3], self._shape[:3], strict=True)
        return [slice(i * n, min((i + 1) * n, end)) for i, n, end in sizes]

    def _decoded(self, spans: list[slice]) -> Array:
        """One chunk; zeros where it is not stored."""
        whole = [slice(s.start + o, s.stop + o) for s, o in zip(spans, self._origin[:3], strict=True)]
        name = "_".join(f"{s.start}-{s.stop}" for s in whole)
        content = self._content(name)
        if content is None:
            return np.zeros([*(s.stop - s.start for s in spans), self._shape[3]], self._dtype)
        store = {"driver": "memory"}
        held = {"info": self._info, f"{self._key}/{name}": content}
        array = open_stored("neuroglancer_precomputed", store, instead=held)
        block: Array = array[(*whole, slice(None))].read().result()
        return block

    def _content(self, name: str) -> bytes | None:
        for suffix in ("", *UNPACKERS):
            path = self._folder / f"{name}{suffix}"
            if not path.exists():
                continue
            file_identity(path)  # refuses pipes, at which opening would wait for ever
            if path.stat().st_size > self._limit:
                raise ValueError(f"{path.name} takes {path.stat().st_size} bytes, expected at most {self._limit}")
            data = path.read_bytes()
            try:
                return UNPACKERS[suffix](data, self._limit) if suffix else data
            except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path.name} cannot be unpacked: {error}") from error
        return None
