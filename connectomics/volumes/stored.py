"""What all formats share: stored axes against (c, z, y, x), dtypes, and the reader itself.

Each format finds its array and hands ``StoredVolume`` a function that fetches an index of it; only this file
knows about transposing.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, Vec3, pieces, vec3
from connectomics.volumes.metadata.axes import completed, usual
from connectomics.volumes.source import READ_ERRORS, Source, again, reason, require_believable
from connectomics.volumes.volume import Array, Nanometres, Spacing, VolumeInfo
from connectomics.volumes.watched import WatchedFiles

AXES = "czyx"
CACHE_BYTES = 64 << 20
READ_BYTES = 16 << 20
PIECE_BYTES = 1 << 20
LARGEST_CHUNK_BYTES = 1 << 32
"""Chunks, strips and tiles are unpacked whole, so larger ones are refused."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which letter each stored axis has; ``t`` marks an axis of length 1 that is dropped; ``where`` tells who says so.

    Examples
    --------
    >>> Layout("xyz", (4, 3, 2)).shape
    (1, 2, 3, 4)
    """

    letters: str
    stored: tuple[int, ...]
    where: str = ""

    def size(self, letter: str) -> int:
        """Length of the axis ``letter``; 1 where the array has no such axis."""
        return self.stored[self.letters.index(letter)] if letter in self.letters else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(c, z, y, x) in voxels."""
        return (self.size("c"), self.size("z"), self.size("y"), self.size("x"))

    def chunk(self, stored_chunk: Sequence[int]) -> Vec3:
        """(z, y, x) of a stored chunk, clipped to the volume."""
        lengths = dict(zip(self.letters, stored_chunk, strict=True))
        return vec3([max(1, min(lengths.get(letter, 1), self.size(letter))) for letter in "zyx"])

    def index(self, box: Box) -> tuple[slice, ...]:
        """The index of ``box`` (all channels) into the stored array."""
        spans = dict(zip("zyx", box.slices, strict=True))
        spans["c"] = slice(0, self.size("c"))
        return tuple(spans.get(letter, slice(0, 1)) for letter in self.letters)

    def arrange(self, block: Array) -> Array:
        """A stored block, seen as (c, z, y, x)."""
        kept = [i for i, letter in enumerate(self.letters) if letter != "t"]
        order = sorted(kept, key=lambda i: AXES.index(self.letters[i]))
        dropped = [i for i in range(block.ndim) if i not in kept]
        ordered = block.transpose(dropped + order)[(0,) * len(dropped)]
        lengths = dict(zip((self.letters[i] for i in order), ordered.shape, strict=True))
        arranged: Array = ordered.reshape([lengths.get(letter, 1) for letter in AXES])
        return arranged


def layout_of(source: Source, stored: Sequence[int], found: str | None, where: str = "the file") -> Layout:
    """Decide the stored axes from the user's override, the file's own letters, or the number of axes.

    Parameters
    ----------
    source
        The request; ``source.axes`` comes first.
    stored
        Shape of the stored array.
    found
        Letters out of t, c, z, y, x that the file states, ``?`` for an axis of another kind, ``_`` for one without a
        name, or None.
    where
        The file states them.

    Raises
    ------
    VolumeError
        If the letters do not fit the array, an axis is empty, or a time axis is longer than 1.
    """
    shape = tuple(int(n) for n in stored)
    default = (usual(shape) if len(shape) <= len("tczyx") else None) or "tczyx"[-len(shape) :]
    letters = source.axes or (completed(found, shape) if found else usual(shape))
    stating = f"state them in the file's order, such as inference.axes={default} (in Python axes={default!r})"
    if letters is None:
        raise VolumeError(
            f"{source.uri}: the array has {len(shape)} axes, shape {shape!s:.80}; a volume has 2 (y, x), 3 (z, "
            "y, x) or 4 (c, z, y, x). State the axes, t for each of length 1, for example inference.axes=tczyx (in "
            "Python axes='tczyx'), or export an array of fewer axes."
        )
    if len(letters) != len(shape):
        raise VolumeError(
            f"{source.uri}: the axes {letters!r}{'' if source.axes else f' ({where})'} name {len(letters)} axes, but "
            f"the stored array has {len(shape)}, shape {shape!s:.80}; {stating}, t for one of length 1 that is dropped."
        )
    if min(shape) < 1:
        raise VolumeError(
            f"{source.uri}: the array of shape {shape!s:.80} has an axis without voxels; nothing to read."
        )
    for letter, length in zip(letters, shape, strict=True):
        if letter in "t?" and length > 1:
            kind = "a time axis" if letter == "t" else "an axis of unknown kind"
            raise VolumeError(
                f"{source.uri}: {kind} of length {length} in an array of {len(shape)} axes, shape {shape} (axes "
                f"{letters!r}); export a single one of them, or, if its axes are others, {stating}."
            )
    letters = letters.replace("?", "t")
    if letters.count("c") > 1:  # such as samples beside channels
        letters = "".join("t" if a == "c" and n == 1 else a for a, n in zip(letters, shape, strict=True))
    spatial = letters.replace("t", "")
    if set(spatial) - set(AXES) or len(set(spatial)) < len(spatial) or not {"y", "x"} <= set(spatial):
        raise VolumeError(
            f"{source.uri}: cannot use the axes {letters!r} for an array of shape {shape}: each of c, z, "
            f"y, x may stand once, y and x must; {stating}."
        )
    by_number = f"the usual order of {len(shape)} axes, as the file states none"
    return Layout(letters, shape, "inference.axes" if source.axes else where if found else by_number)


def native_dtype(source: Source, dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype in which voxels are handed out: this machine's byte order, bool as uint8.

    Raises VolumeError for anything but bool, integers and floats of at most 64 bit.
    """
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.names is not None:
        raise VolumeError(
            f"{source.uri}: voxels of type {dtype} cannot be read as intensities or labels; expected "
            "bool, integers or floats of at most 64 bit. Convert the array or name another one."
        )
    return dtype.newbyteorder("=")


def info_of(
    source: Source,
    layout: Layout,
    dtype: np.dtype[np.generic],
    stored_chunk: Sequence[int],
    *,
    voxel_size_nm: Nanometres | None = None,
    origin_nm: Nanometres = (0.0, 0.0, 0.0),
    spacing: Spacing | None = None,
    found: Mapping[str, str] | None = None,
) -> VolumeInfo:
    """The volume's description; the request's voxel size wins over ``voxel_size_nm`` found in the file.

    ``found`` says where each of these facts was found. Raises VolumeError if dtype or requested voxel size cannot be
    used, or the shape is beyond belief.
    """
    native = native_dtype(source, dtype)
    require_believable(source, math.prod(layout.stored) * dtype.itemsize)
    stated = source.voxel_size_nm
    known = {"voxel size": voxel_size_nm is not None, "spacing": spacing is not None}
    try:
        chunk = layout.chunk(stored_chunk)
        return VolumeInfo(
            layout.shape,
            native,
            chunk,
            stated or voxel_size_nm,
            origin_nm=origin_nm,
            spacing=spacing,
            found={
                **({"axes": f"{layout.letters}, by {layout.where}"} if layout.where else {}),
                **{fact: where for fact, where in (found or {}).items() if known.get(fact, True)},
                **({"voxel size": "inference.voxel_size_nm"} if stated else {}),
            },
        )
    except ValueError as error:
        raise VolumeError(f"{source.uri}: {error}") from error


def require_small_chunks(source: Source, stored_chunk: Sequence[int], itemsize: int) -> None:
    """Refuse an array whose chunks take more than ``LARGEST_CHUNK_BYTES`` unpacked, by a VolumeError."""
    found = math.prod(int(n) for n in stored_chunk) * itemsize
    if found > LARGEST_CHUNK_BYTES:
        raise VolumeError(
            f"{source.uri}: its chunks {tuple(stored_chunk)} take {float(found):.3g} bytes each, expected at most "
            f"{LARGEST_CHUNK_BYTES}; write the array again in smaller chunks."
        )


def row_chunk(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Whole rows of about 1 MiB: the cheap unit of an array stored in C order without chunks."""
    rows = max(1, PIECE_BYTES // max(1, shape[-1] * itemsize))
    return (*(1,) * (len(shape) - 2), min(shape[-2], rows), shape[-1])


def reading_bytes(info: VolumeInfo) -> int:
    """Most memory that reading takes beside what it returns: pieces as stored and decoded, and recent ones kept.

    A read is made of pieces of whole chunks of about ``READ_BYTES``, so one chunk that is larger decides.
    """
    voxel_bytes = info.channels * info.dtype.itemsize
    chunk = math.prod(info.chunk_shape) * voxel_bytes
    volume = math.prod(info.extent) * voxel_bytes
    return 3 * min(volume, max(chunk, READ_BYTES)) + min(volume, max(chunk, CACHE_BYTES))


class RecentArrays:
    """The arrays decoded last, so that reading stripe by stripe decodes each piece once; bounded in bytes."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._arrays: OrderedDict[Hashable, Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], Array]) -> Array:
        """The array of ``key``, decoded now unless it is a recent one; callers must not write to it."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = decode()
        with self._lock:
            self._arrays[key] = array
            while len(self._arrays) > 1 and sum(a.nbytes for a in self._arrays.values()) > self._limit_bytes:
                self._arrays.popitem(last=False)
        return array

    def clear(self) -> None:
        """Forget all arrays."""
        with self._lock:
            self._arrays.clear()


class StoredVolume:
    """A VolumeReader over any storage that can fetch an index of its array; safe for several threads.

    Parameters
    ----------
    source
        The request, for messages.
    info
        Description of the volume.
    layout
        Axes of the stored array.
    fetch
        Gives the voxels at an index (one slice for each stored axis) as a new array.
    identity
        Computes the identity; called once, when first asked for. Without it, that of ``watched``.
    release
        Closes what ``fetch`` uses.
    watched
        The files that ``fetch`` reads, which must not change meanwhile; for storage that reads what is gone as zeros.
    """

    def __init__(
        self,
        source: Source,
        info: VolumeInfo,
        layout: Layout,
        *,
        fetch: Callable[[tuple[slice, ...]], Array],
        identity: Callable[[], dict[str, object]] | None = None,
        release: Callable[[], None],
        watched: WatchedFiles | None = None,
    ) -> None:
        assert identity or watched, "a stored volume has files"
        self._watched = watched
        self._source = source
        self._info = info
        self._layout = layout
        self._fetch = fetch
        self._compute_identity = identity or (lambda: watched.identity if watched else {})
        self._identity: dict[str, object] | None = None
        self._release = release
        self._closed = False

    @property
    def info(self) -> VolumeInfo:
        """Shape, dtype and physical frame."""
        return self._info

    @property
    def identity(self) -> dict[str, object]:
        """Names, sizes and modification times of the files that make up the volume."""
        if self._identity is None:
            try:
                self._identity = self._compute_identity()
            except OSError as error:
                raise VolumeError(f"cannot examine the files of {self._source.uri}: {reason(error)}.") from error
        return dict(self._identity)

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new (c, z, y, x) array of ``info.dtype``.

        Raises
        ------
        VolumeError
            If the storage cannot be read, the volume is closed, or ``box`` is not inside it.
        """
        where = f"{self._source.uri}, voxels {box.start} to {box.stop}"
        if self._closed:
            raise VolumeError(f"cannot read {where}: the volume was closed.")
        if not Box.of_shape(self._info.extent).contains(box):
            raise VolumeError(f"cannot read {where}: outside the volume of (z, y, x) = {self._info.extent}.")
        if box.voxels == 0:
            return np.empty((self._info.channels, *box.shape), self._info.dtype)
        voxel_bytes = self._info.channels * self._info.dtype.itemsize
        try:
            result: Array | None = None
            for part in pieces(box, self._info.chunk_shape, READ_BYTES // voxel_bytes):
                block = self._layout.arrange(self._fetch(self._layout.index(part)))
                if part == box:
                    result = np.asarray(block, dtype=self._info.dtype, order="C")
                    break
                if result is None:
                    result = np.empty((self._info.channels, *box.shape), self._info.dtype)
                result[(slice(None), *part.relative_to(box).slices)] = block
            if self._watched is not None:
                self._watched.require_same()
            assert result is not None, "a box that is not empty has parts"
        except READ_ERRORS as error:
            raise VolumeError(f"cannot read {where}: {reason(error)}.{again(error)}") from error
        return result

    def close(self) -> None:
        """Release the storage; closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._release()
