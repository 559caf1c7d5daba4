"""TIFF volumes: multi-page, BigTIFF, tiled, ImageJ hyperstacks, OME-TIFF; for ``opening`` and ``images``.

Only the pages, strips and tiles that touch a box are read: uncompressed pages by memory map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import struct
import threading
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import tifffile

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.grey import Fetch, grey_fetch, is_grey, may_be_one_channel
from connectomics.volumes.formats.mapped import MappedArray
from connectomics.volumes.metadata.tiff_frames import refuse_companions, tiff_frame
from connectomics.volumes.source import READ_ERRORS, Source, unreadable
from connectomics.volumes.spacing import stated_spacing
from connectomics.volumes.stored import (
    Layout,
    RecentArrays,
    StoredVolume,
    info_of,
    layout_of,
    require_small_chunks,
    row_chunk,
)
from connectomics.volumes.volume import Array, Spacing
from connectomics.volumes.watched import WatchedFiles

LETTERS = {"S": "c", "C": "c", "Q": "z", "I": "z", "Z": "z", "Y": "y", "X": "x", "T": "t"}
"""TIFF series axes: samples are channels, pages of unstated meaning are sections."""
LOOKED_AT_BYTES = 1 << 26
"""Of a page, to tell whether its colours are equal."""
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)


def open_tiff(source: Source, *, spacing: Spacing | None = None, colours: bool = False) -> StoredVolume:
    """Open one image series (level 0 of a pyramid) of a TIFF file for lazy reading.

    Parameters
    ----------
    source
        The request.
    spacing
        What a file beside it states; part of the volume's identity.
    colours
        Whether equal colours are kept; else they are grey, one channel.

    Raises
    ------
    VolumeError
        If the file is damaged, cut short, one part of a set, or holds several images of differing shape.
    """
    try:
        with contextlib.ExitStack() as opened:
            watched = WatchedFiles(source.path)
            stream = opened.enter_context(source.path.open("rb"))
            tif = opened.enter_context(tifffile.TiffFile(source.path))
            series, number = _series(source, tif)
            _require_whole(source, tif, series)
            letters = "".join(LETTERS.get(letter, "?") for letter in series.axes)
            layout = layout_of(source, series.shape, letters, f"axes {series.axes} of its {series.kind} description")
            pages: _Pages | _OnePage
            if series.is_truncated:
                pages = _OnePage(stream, series)
            else:
                pages = _Pages(source, series, layout, stream.fileno())
            fetch: Fetch = pages.fetch
            chunk = pages.chunk
            axis = None if colours else _colour_axis(source, series)
            if axis is not None and _is_grey(pages, layout, series):
                fetch = grey_fetch(fetch, axis, layout.stored[axis], source.path.name)
                layout = dataclasses.replace(layout, stored=_with_one(layout.stored, axis))
                chunk = _with_one(chunk, axis)
            frame = tiff_frame(source, tif, number)
            info = info_of(
                source,
                layout,
                series.dtype,
                chunk,
                voxel_size_nm=frame.voxel_size_nm,
                origin_nm=frame.origin_nm,
                spacing=spacing,
                found=frame.found | ({} if spacing is None else {"spacing": "the JSON file beside it"}),
            )
            opened.callback(pages.forget)
            release = opened.pop_all().close
    except (AssertionError, *READ_ERRORS) as error:  # tifffile asserts what a damaged file may break
        raise unreadable(source, "TIFF", error) from error

    def identity() -> dict[str, object]:
        series = {} if source.inner is None else {"series": number}
        return watched.identity | series | ({} if spacing is None else {"spacing": list(spacing)})

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=release, watched=watched)


def _colour_axis(source: Source, series: Any) -> int | None:
    """Where the colours of the pixels stand that would be read as one channel if they are equal, or None."""
    axis = series.axes.find("S")
    rgb = series.keyframe.photometric == tifffile.PHOTOMETRIC.RGB and "C" not in series.axes
    return axis if rgb and axis >= 0 and may_be_one_channel(source, int(series.shape[axis])) else None


def _is_grey(pages: _Pages | _OnePage, layout: Layout, series: Any) -> bool:
    """Whether the colours are equal in the first page and in the one in the middle, as far as these are not large."""
    inner = len(layout.stored) - len(series.keyframe.shape)
    rows = max(1, LOOKED_AT_BYTES // max(1, series.keyframe.nbytes // layout.size("y")))
    chunk = [
        1 if i < inner else min(n, rows) if c == "y" else n
        for i, (c, n) in enumerate(zip(layout.letters, layout.stored, strict=True))
    ]
    axis = layout.letters.index("c")
    for part in (0, 2):
        starts = [0 if part == 0 else (n // part) // c * c for n, c in zip(layout.stored, chunk, strict=True)]
        index = [slice(a, min(a + c, n)) for a, c, n in zip(starts, chunk, layout.stored, strict=True)]
        index[axis] = slice(0, layout.stored[axis])
        if not is_grey(pages.fetch(tuple(index)), axis):
            return False
    return True


def _with_one(lengths: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*lengths[:axis], 1, *lengths[axis + 1 :])


def open_tiff_as_stated(source: Source) -> StoredVolume:
    """Open a TIFF file with the spacing that a JSON file beside it states, as nnU-Net's Tiff3DIO does."""
    return open_tiff(source, spacing=stated_spacing(source))


def _series(source: Source, tif: Any) -> tuple[Any, int]:
    count = len(tif.series)
    if source.inner is not None:
        if not source.inner.isdecimal() or int(source.inner) >= count:
            raise VolumeError(
                f"{source.uri}: no image series {source.inner!r}; the file holds {count}, counted from 0."
            )
        return tif.series[int(source.inner)], int(source.inner)
    if count == 0:
        raise VolumeError(f"{source.uri}: the TIFF file holds no image.")
    if count > 1:
        shapes = ", ".join(f"{s.shape} {s.dtype}" for s in tif.series[:4])
        raise VolumeError(
            f"{source.uri}: the file holds {count} image series that differ ({shapes}); name one as "
            f"{source.path.name}::0, or write sections of one shape and dtype."
        )
    return tif.series[0], 0


def _require_whole(source: Source, tif: Any, series: Any) -> None:
    """Refuse files whose chain of pages is cut, and sets of which this file is one part."""
    refuse_companions(source, tif)
    if series.is_multifile:
        raise VolumeError(f"{source.uri}: one part of an OME-TIFF set of several files; join them into one file first.")
    if series.transform is not None:
        raise VolumeError(
            f"{source.uri}: {series.kind} images need a conversion that is not supported; export as TIFF."
        )
    format_ = tif.tiff
    with source.path.open("rb") as stream:
        stream.seek(tif.pages[-1].offset)
        (tags,) = struct.unpack(format_.tagnoformat, stream.read(format_.tagnosize))
        stream.seek(tags * format_.tagsize, os.SEEK_CUR)
        (following,) = struct.unpack(format_.offsetformat, stream.read(format_.offsetsize))
    whole = following == 0 or any(following == page.offset for page in tif.pages)
    cut = _lacks_planes(tif, series) or (series.is_truncated and not _stands_behind_one_page(tif, series))
    if cut or not whole or any(page is None for page in series.pages):
        raise VolumeError(f"{source.uri}: the TIFF file is truncated or lacks pages; copy or write it again.")


def _lacks_planes(tif: Any, series: Any) -> bool:
    """Whether ImageJ wrote of more planes than the only page, behind which the file is cut short."""
    if not tif.is_imagej or series.kind == "imagej" or len(tif.pages) > 1:
        return False
    stated = tif.imagej_metadata or {}
    return any(isinstance(n, int) and n > 1 for n in (stated.get(k) for k in ("images", "slices", "frames")))


def _stands_behind_one_page(tif: Any, series: Any) -> bool:
    """Whether the file has one page and the planes of all others behind its own, as ImageJ writes more than 4 GB."""
    return len(tif.pages) == 1 and bool(series.keyframe.is_final) and series.kind in ("imagej", "shaped")


class _OnePage:
    """The planes behind the only page of a file as one array, memory-mapped."""

    def __init__(self, stream: IO[bytes], series: Any) -> None:
        dtype = series.dtype.newbyteorder(series.keyframe.parent.byteorder)
        self._array = MappedArray(stream, dtype, series.shape, int(series.keyframe.dataoffsets[0]))
        self.chunk = self._array.chunk
        self._dtype = series.dtype

    def fetch(self, index: tuple[slice, ...]) -> Array:
        return self._array.fetch(index).astype(self._dtype, copy=False)

    def forget(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True, slots=True)
class _StripLayout:
    """The strips or tiles of a page: their size in rows and columns, and how many there are."""

    height: int
    width: int
    down: int
    across: int
    total: int

    @classmethod
    def of(cls, page: Any) -> _StripLayout:
        height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        width = page.tilewidth if page.is_tiled else page.imagewidth
        down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
        return cls(height, width, down, across, total=int(np.prod(page.chunked)))

    def touching(self, rows: slice, columns: slice) -> list[int]:
        """Numbers of the pieces that touch the rows and columns, in every plane of samples or depth."""
        return [
            (plane * self.down + i) * self.across + j
            for plane in range(self.total // (self.down * self.across))
            for i in range(rows.start // self.height, -(-rows.stop // self.height))
            for j in range(columns.start // self.width, -(-columns.stop // self.width))
        ]


class _Pages:
    """The pages of a series as one array; the last decoded strips and tiles are remembered."""

    def __init__(self, source: Source, series: Any, layout: Layout, descriptor: int) -> None:
        self._path = source.path
        self._series = series
        self._key = series.keyframe
        self._shape = layout.stored
        self._outer = len(self._shape) - len(self._key.shape)
        if self._shape[self._outer :] != tuple(self._key.shape):
            raise VolumeError(
                f"{source.uri}: pages of shape {self._key.shape} in a series of {self._shape}; not supported."
            )
        self._y = self._key.axes.index("Y")
        self._x = self._key.axes.index("X")
        self._pieces = _StripLayout.of(self._key)
        if not self._key.is_final:
            piece = (self._pieces.height, self._pieces.width, self._key.samplesperpixel)
            require_small_chunks(source, piece, self._key.dtype.itemsize)
        self._decode = self._key.decode
        self._recent = RecentArrays()
        self._lock = threading.Lock()
        self._descriptor = descriptor

    def forget(self) -> None:
        """Drop the remembered pieces."""
        self._recent.clear()

    @property
    def chunk(self) -> tuple[int, ...]:
        """Stored shape of the piece that is cheapest to read at once."""
        whole = list(self._key.shape)
        if self._key.is_final:
            height, width = row_chunk((self._key.imagelength, self._key.imagewidth), self._key.dtype.itemsize)
        else:
            height, width = self._pieces.height, self._pieces.width
        whole[self._y], whole[self._x] = height, width
        return (*(1,) * self._outer, *whole)

    def fetch(self, index: tuple[slice, ...]) -> Array:
        outer, inner = index[: self._outer], index[self._outer :]
        rows, columns = inner[self._y], inner[self._x]
        rest = tuple(slice(None) if i in (self._y, self._x) else span for i, span in enumerate(inner))
        seen = list(self._key.shape)
        seen[self._y], seen[self._x] = rows.stop - rows.start, columns.stop - columns.start
        result = np.empty([span.stop - span.start for span in index], self._key.dtype)
        for at in itertools.product(*(range(span.start, span.stop) for span in outer)):
            number = int(np.ravel_multi_index(at, self._shape[: self._outer])) if at else 0
            window = self._window(number, rows, columns).reshape(seen)
            result[tuple(a - span.start for a, span in zip(at, outer, strict=True))] = window[rest]
        return result

    def _window(self, number: int, rows: slice, columns: slice) -> Array:
        """Rows and columns of a page as (sample plane, depth, rows, columns, samples)."""
        with self._lock:
            page = self._series.pages[number]
            offsets, counts = page.dataoffsets, page.databytecounts
        follows = all(a + n == b for a, n, b in zip(offsets, counts, offsets[1:], strict=False))
        if self._key.is_final and follows:
            dtype = self._key.dtype.newbyteorder(self._key.parent.byteorder)
            mapped = np.memmap(self._path, dtype, "r", offsets[0], self._key.shaped)
            return np.array(mapped[:, :, rows, columns], dtype=self._key.dtype)
        planes, depth, _, _, samples = self._key.shaped
        shape = (planes, depth, rows.stop - rows.start, columns.stop - columns.start, samples)
        window = np.full(shape, self._key.nodata, self._key.dtype)
        for piece in self._pieces.touching(rows, columns):
            if counts[piece] == 0:
                continue
            values = self._piece(number, piece, page)
            plane, deep, top, left, _ = self._decode(None, piece)[1]
            first, last = max(top, rows.start), min(top + values.shape[1], rows.stop)
            begin, end = max(left, columns.start), min(left + values.shape[2], columns.stop)
            window[
                plane,
                deep : deep + values.shape[0],
                first - rows.start : last - rows.start,
                begin - columns.start : end - columns.start,
            ] = values[: depth - deep, first - top : last - top, begin - left : end - left]
        return window

    def _piece(self, number: int, piece: int, page: Any) -> Array:
        """One strip or tile, decoded, as (depth, rows, columns, samples)."""

        def decode() -> Array:
            offset, count = page.dataoffsets[piece], page.databytecounts[piece]
            if offset + count > os.fstat(self._descriptor).st_size:
                raise EOFError(f"page {number} has {count} bytes at offset {offset}, beyond the end of the file")
            data = os.pread(self._descriptor, count, offset)
            tables: dict[str, Any] = {}
            if self._key.compression in JPEG_COMPRESSIONS:
                tables = {"jpegtables": page.jpegtables, "jpegheader": self._key.jpegheader}
            values: Array = self._decode(data, piece, **tables)[0]
            return values

        return self._recent.get((number, piece), decode)
