"""An array that TensorStore opened as a volume; for ``zarr``, ``n5`` and ``precomputed``."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import tensorstore as ts

from connectomics.core.errors import VolumeError
from connectomics.core.files import DurableFolders, flushes_folders
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.metadata.frame import Frame
from connectomics.volumes.source import Source
from connectomics.volumes.stored import Layout, StoredVolume, info_of, require_small_chunks
from connectomics.volumes.volume import Array

INSTEAD = "instead/"


def open_stored(
    driver: str, place: Path | Mapping[str, Any], *, writable: bool = False, instead: Any = None, **options: object
) -> Any:
    """TensorStore's handle of the array that stands in a folder.

    Parameters
    ----------
    driver
        TensorStore's name of the format.
    place
        The folder, or TensorStore's description of a store.
    writable
        Whether it can be written, too.
    instead
        Contents by file name that are read instead of the files of these names, as bytes or values for JSON: metadata
        that TensorStore takes too strictly, or chunks that are unpacked.
    options
        Of the driver.
    """
    context = ts.Context(_writing(place) if writable and isinstance(place, Path) else {})
    store: dict[str, Any] = dict(place) if isinstance(place, Mapping) else _in_folder(place)
    if instead:
        memory = ts.KvStore.open({"driver": "memory", "path": INSTEAD}, context=context).result()
        for name, content in instead.items():
            memory.write(name, content if isinstance(content, bytes) else json.dumps(content).encode()).result()
        kept = [{"exact": name, "base": {"driver": "memory", "path": INSTEAD + name}} for name in instead]
        store = {"driver": "kvstack", "layers": [{"base": store}, *kept]}
    spec = {"driver": driver, "kvstore": store, **options}
    return ts.open(spec, open=True, read=True, write=writable, context=context).result()


def _writing(folder: Path) -> dict[str, Any]:
    """How files are written there.

    Without locks: each is written under a name of its own and renamed, whoever writes a chunk twice writes the same
    bytes, some file systems know no locks, and a writer that sleeps would hold its lock.
    """
    return {"file_io_locking": {"mode": "none"}, "file_io_sync": flushes_folders(folder)}


class ChunksOnDisk:
    """Makes what TensorStore has written into the array of a folder outlast a loss of power.

    TensorStore flushes each file and the folder it is in. It does not flush the entries of folders that it makes, and
    where folders cannot be flushed it flushes nothing, see ``open_stored``.
    """

    def __init__(self, folder: Path) -> None:
        self._folders = DurableFolders(folder)
        self._flushed = flushes_folders(folder)

    def keep(self, folders: Iterable[Path]) -> None:
        """Flush what was just written into these folders; one that is absent holds nothing."""
        if not self._flushed:
            os.sync()  # all there is: which files were written is known to TensorStore alone
        for folder in folders:
            self._folders.keep(folder)


def touched(box: Box, chunk: Vec3) -> Iterator[Vec3]:
    """Yield the numbers (z, y, x) of the chunks that a box touches, in raster order.

    Examples
    --------
    >>> list(touched(Box((0, 8, 0), (1, 24, 9)), (1, 16, 16)))
    [(0, 0, 0), (0, 1, 0)]
    """
    edges = zip(box.start, box.stop, chunk, strict=True)
    return map(vec3, itertools.product(*(range(a // c, -(-b // c)) for a, b, c in edges)))


def _in_folder(folder: Path) -> dict[str, Any]:
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def inner_path(source: Source, kind: str) -> PurePosixPath:
    """What stands after ``::``, a path below the folder; a VolumeError if it leads out of that."""
    inner = PurePosixPath(source.inner or "")
    if inner.is_absolute() or ".." in inner.parts:
        raise VolumeError(f"{source.uri}: the array {source.inner!r} lies outside the {kind} folder; name one inside.")
    return inner


def chunked_volume(
    source: Source, layout: Layout, array: Any, *, frame: Frame, identity: Callable[[], dict[str, object]]
) -> StoredVolume:
    """The reader of TensorStore's handle of an array; a VolumeError if its type or size of chunks is unusable."""
    dtype = array.dtype.numpy_dtype
    chunk: tuple[Any, ...] = array.chunk_layout.read_chunk.shape or array.shape
    require_small_chunks(source, chunk, dtype.itemsize)
    info = info_of(
        source,
        layout,
        dtype,
        chunk,
        voxel_size_nm=frame.voxel_size_nm,
        origin_nm=frame.origin_nm,
        found=frame.found,
    )

    def fetch(index: tuple[slice, ...]) -> Array:
        block: Array = array[index].read().result()
        return block

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=lambda: None)
