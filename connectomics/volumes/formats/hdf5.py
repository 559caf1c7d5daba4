"""HDF5 volumes: ``path.h5::dataset``, default ``main``, else the only dataset; called by ``opening``."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from typing import Any

import h5py
import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.codecs.hdf5_filters import require_filters
from connectomics.volumes.source import READ_ERRORS, Source, file_identity, some_of, three_positive, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, require_small_chunks, row_chunk
from connectomics.volumes.volume import Array, Nanometres

DEFAULT_DATASET = "main"
VOXEL_SIZE_ATTRIBUTES = {"voxel_size_nm": 1.0, "resolution": 1.0, "element_size_um": 1000.0}
"""Attributes (z, y, x) that state the voxel size, with the nanometres of their unit, the first found wins."""

MOST_OBJECTS = 10_000
DEEPEST = 64
"""Objects and levels of groups that are looked through for a dataset."""
PACKED_SPARE_BYTES = 1 << 16
"""Filters may lengthen a chunk by a little, never to more than double its size and this."""


def open_hdf5(source: Source) -> StoredVolume:
    """Open one dataset of an HDF5 file for lazy reading.

    Raises
    ------
    VolumeError
        If the file is not a complete HDF5 file or holds no dataset that fits.
    """
    try:
        with contextlib.ExitStack() as opened:
            identity = file_identity(source.path)
            file = opened.enter_context(h5py.File(source.path, "r", locking="best-effort"))
            dataset = _dataset(source, file)
            identity["dataset"] = dataset.name
            layout = layout_of(source, dataset.shape, None)
            chunk = dataset.chunks or row_chunk(dataset.shape, dataset.dtype.itemsize)
            require_small_chunks(source, chunk, dataset.dtype.itemsize)
            info = info_of(source, layout, dataset.dtype, chunk, voxel_size_nm=_voxel_size(file, dataset))
            opened.pop_all()
    except READ_ERRORS as error:
        raise unreadable(source, "HDF5", error) from error
    lock = threading.Lock()

    def fetch(index: tuple[slice, ...]) -> Array:
        with lock:
            refuse_bombs(dataset, index)
            block: Array = dataset[index]
        return block

    def release() -> None:
        with lock:
            file.close()

    return StoredVolume(source, info, layout, fetch=fetch, identity=lambda: identity, release=release)


def _dataset(source: Source, file: Any) -> Any:
    wanted = source.inner or DEFAULT_DATASET
    node = file.get(wanted)
    if isinstance(node, h5py.Dataset):
        return _usable(source, node)
    names = _names(source, file)
    if not names:
        raise VolumeError(f"{source.uri}: the HDF5 file holds no dataset.")
    if source.inner is None and len(names) == 1:
        return _usable(source, file[names[0]])
    raise VolumeError(
        f"{source.uri}: no dataset {wanted!r}; the file holds {some_of(sorted(names))}. Name one of them as "
        f"{source.path.name}::dataset."
    )


def _names(source: Source, file: Any) -> list[str]:
    """Names of all datasets."""
    names: list[str] = []
    visited = itertools.count()

    def visit(name: str, item: object) -> bool | None:
        if isinstance(item, h5py.Dataset):
            names.append(name)
        return next(visited) >= MOST_OBJECTS or name.count("/") >= DEEPEST or None

    if file.visititems(visit):
        raise VolumeError(
            f"{source.uri}: more than {MOST_OBJECTS} objects or {DEEPEST} levels of groups; name the dataset as "
            f"{source.path.name}::dataset."
        )
    return names


def _usable(source: Source, dataset: Any) -> Any:
    if dataset.shape is None:
        raise VolumeError(f"{source.uri}: dataset {dataset.name} is a null dataset without voxels.")
    if dataset.is_virtual and any(_is_virtual(source, part) for part in dataset.virtual_sources()):
        raise VolumeError(
            f"{source.uri}: dataset {dataset.name} is made of parts that are virtual themselves, which may lead in a "
            "circle; copy the voxels into a dataset of their own."
        )
    require_filters(source, dataset)
    return dataset


def _is_virtual(source: Source, part: Any) -> bool:
    """Whether a part of a virtual dataset is virtual too, as in one that contains itself: HDF5 crashes on it."""
    path = source.path if part.file_name == "." else source.path.parent / part.file_name
    if not path.is_file():
        return False  # such parts are the fill value
    with h5py.File(path, "r", locking="best-effort") as file:
        node = file.get(part.dset_name)
        if not isinstance(node, h5py.Dataset):
            return False
        require_filters(source, node)
        return bool(node.is_virtual)


def refuse_bombs(dataset: Any, index: tuple[slice, ...]) -> None:
    """Refuse packed chunks that are longer than what they should unpack to: HDF5 would unpack them whatever comes."""
    if not dataset.chunks or not dataset.id.get_create_plist().get_nfilters():
        return
    largest = 2 * math.prod(dataset.chunks) * dataset.dtype.itemsize + PACKED_SPARE_BYTES
    starts = [range(s.start - s.start % n, s.stop, n) for s, n in zip(index, dataset.chunks, strict=True)]
    for start in itertools.product(*starts):
        found = dataset.id.get_chunk_info_by_coord(start).size
        if found > largest:
            raise ValueError(f"the chunk at {start} takes {found} bytes packed, expected at most {largest}")


def _voxel_size(file: Any, dataset: Any) -> Nanometres | None:
    for name, factor in VOXEL_SIZE_ATTRIBUTES.items():
        for holder in (dataset, file):
            value = holder.attrs.get(name)
            if value is not None and np.size(value) == 3:
                return three_positive(value, factor)
    return None
