"""An array that TensorStore opened as a volume; for ``zarr``, ``n5`` and ``precomputed``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from connectomics.volumes.source import Source
from connectomics.volumes.stored import Layout, StoredVolume, info_of, require_small_chunks
from connectomics.volumes.volume import Array, Nanometres


@dataclass(frozen=True, slots=True)
class Frame:
    """Voxel size and position of the first voxel (z, y, x), as far as metadata state them, and where they do."""

    voxel_size_nm: Nanometres | None = None
    origin_nm: Nanometres = (0.0, 0.0, 0.0)
    where: str = ""


def chunked_volume(
    source: Source, layout: Layout, array: Any, *, frame: Frame, identity: Callable[[], dict[str, object]]
) -> StoredVolume:
    """The reader of TensorStore's handle of an array.

    Raises
    ------
    VolumeError
        If its type or the size of its chunks cannot be used.
    """
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
        found={"voxel size": frame.where, "origin": frame.where} if frame.where else {},
    )

    def fetch(index: tuple[slice, ...]) -> Array:
        block: Array = array[index].read().result()
        return block

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=lambda: None)
