"""An array that TensorStore opened as a volume; for ``zarr``, ``n5`` and ``precomputed``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import tensorstore as ts

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.frame import Frame
from connectomics.volumes.source import Source
from connectomics.volumes.stored import Layout, StoredVolume, info_of, require_small_chunks
from connectomics.volumes.volume import Array


def open_stored(driver: str, folder: Path, *, writable: bool = False, **options: object) -> Any:
    """TensorStore's handle of the array that stands in a folder; ``options`` are the driver's."""
    spec = {"driver": driver, "kvstore": _files(folder), **options}
    return ts.open(spec, open=True, read=True, write=writable, context=ts.Context()).result()


def open_mended(driver: str, folder: Path, metadata: tuple[str, object], options: Mapping[str, object]) -> Any:
    """Do as ``open_stored``, with other content of a metadata file than on disk, where TensorStore refuses that."""
    name, content = metadata
    context = ts.Context()
    ts.KvStore.open("memory://", context=context).result().write(name, json.dumps(content)).result()
    layers = [{"base": _files(folder)}, {"base": f"memory://{name}", "exact": name}]
    spec = {"driver": driver, "kvstore": {"driver": "kvstack", "layers": layers}, **options}
    return ts.open(spec, open=True, read=True, write=False, context=context).result()


def _files(folder: Path) -> dict[str, object]:
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
