"""HDF5 volumes: ``path.h5::dataset``, default ``main``, else the only dataset; called by ``opening``."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import h5py
import numpy as np

from connectomics.errors import VolumeError
from connectomics.io.source import READ_ERRORS, Source, file_identity, three_positive, unreadable
from connectomics.io.stored import StoredVolume, info_of, layout_of, row_chunk
from connectomics.io.volume import Array, Nanometres

DEFAULT_DATASET = "main"
VOXEL_SIZE_ATTRIBUTES = {"voxel_size_nm": 1.0, "resolution": 1.0, "element_size_um": 1000.0}
"""Attributes (z, y, x) that state the voxel size, with the nanometres of their unit, the first found wins."""


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
            info = info_of(source, layout, dataset.dtype, chunk, voxel_size_nm=_voxel_size(file, dataset))
            opened.pop_all()
    except READ_ERRORS as error:
        raise unreadable(source, "HDF5", error) from error
    lock = threading.Lock()

    def fetch(index: tuple[slice, ...]) -> Array:
        with lock:
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
        return _with_shape(source, node)
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    if not names:
        raise VolumeError(f"{source.uri}: the HDF5 file holds no dataset.")
    if source.inner is None and len(names) == 1:
        return _with_shape(source, file[names[0]])
    listed = ", ".join(sorted(names)[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise VolumeError(
        f"{source.uri}: no dataset {wanted!r}; the file holds {listed}. Name one of them as "
        f"{source.path.name}::dataset."
    )


def _with_shape(source: Source, dataset: Any) -> Any:
    if dataset.shape is None:
        raise VolumeError(f"{source.uri}: dataset {dataset.name} is a null dataset without voxels.")
    return dataset


def _voxel_size(file: Any, dataset: Any) -> Nanometres | None:
    for name, factor in VOXEL_SIZE_ATTRIBUTES.items():
        for holder in (dataset, file):
            value = holder.attrs.get(name)
            if value is not None and np.size(value) == 3:
                return three_positive(value, factor)
    return None
