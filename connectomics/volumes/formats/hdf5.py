"""HDF5 volumes: ``path.h5::dataset``, default ``main``, else the only dataset; called by ``opening``."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.codecs.hdf5_filters import require_filters
from connectomics.volumes.formats.mapped import MappedArray
from connectomics.volumes.metadata.hdf5_attributes import stated_axes, stated_frame
from connectomics.volumes.metadata.hdf5_parts import opened_file, parts_of, require_links
from connectomics.volumes.source import READ_ERRORS, Source, file_identity, some_of, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, require_small_chunks, row_chunk
from connectomics.volumes.volume import Array
from connectomics.volumes.watched import WatchedFiles

DEFAULT_DATASET = "main"
MOST_OBJECTS = 10_000
DEEPEST = 64
"""Objects and levels of groups that are looked through for a dataset."""
_BIGDATAVIEWER = re.compile(r"/t\d{5}/(s\d{2,})/\d+/cells")
PACKED_SPARE_BYTES = 1 << 16
"""Filters may lengthen a chunk by a little, never to more than double its size and this."""


def open_hdf5(source: Source) -> StoredVolume:
    """Open one dataset of an HDF5 file for lazy reading.

    Its axes are those of ilastik's ``axistags`` or of its dimension labels, else by their number.

    Raises
    ------
    VolumeError
        If the file is not a complete HDF5 file, holds no dataset that fits, lacks a part that lies in another file, or
        states what contradicts itself.
    """
    try:
        with contextlib.ExitStack() as opened:
            file_identity(source.path)  # refuses pipes, at which opening would wait for ever
            file = opened.enter_context(opened_file(source.path))
            dataset = _dataset(source, file)
            watched = WatchedFiles(source.path, parts_of(source, dataset))
            raw = _raw_array(dataset, opened)
            stated = stated_axes(source, dataset)
            layout = layout_of(source, dataset.shape, *(stated or (None,)))
            unsigned = _is_bigdataviewer(file, dataset)
            dtype = np.dtype(np.uint16) if unsigned else dataset.dtype
            chunk = dataset.chunks or row_chunk(dataset.shape, dtype.itemsize)
            require_small_chunks(source, chunk, dtype.itemsize)
            frame = stated_frame(source, file, dataset, layout, named=stated is not None)
            info = info_of(
                source,
                layout,
                dtype,
                chunk,
                voxel_size_nm=frame.voxel_size_nm,
                origin_nm=frame.origin_nm,
                found=frame.found,
            )
            close = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "HDF5", error) from error
    lock = threading.Lock()

    def fetch(index: tuple[slice, ...]) -> Array:
        with lock:
            refuse_bombs(dataset, index)
            block: Array = dataset[index] if raw is None else raw.fetch(index)
        return block.view(block.dtype.str.replace("i", "u")) if unsigned else block

    def release() -> None:
        with lock:
            close()

    def identity() -> dict[str, object]:
        return watched.identity | {"dataset": dataset.name}

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=release, watched=watched)


def _raw_array(dataset: Any, opened: contextlib.ExitStack) -> MappedArray | None:
    """The voxels of a dataset in raw storage, which HDF5 itself would look for in the working folder; else None."""
    if not dataset.external:
        return None
    ((name, offset, _),) = dataset.external
    stream = opened.enter_context(Path(dataset.file.filename).with_name(name).open("rb"))
    return MappedArray(stream, dataset.dtype, dataset.shape, offset)


def _is_bigdataviewer(file: Any, dataset: Any) -> bool:
    """Whether this is a cell array of BigDataViewer, which keeps uint16 in int16."""
    setup = _BIGDATAVIEWER.fullmatch(dataset.name)
    return setup is not None and dataset.dtype == np.int16 and f"/{setup[1]}/resolutions" in file


def _dataset(source: Source, file: Any) -> Any:
    wanted = source.inner or DEFAULT_DATASET
    node = file.get(wanted)
    if isinstance(node, h5py.Dataset):
        return _usable(source, node)
    require_links(source, file, wanted)
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
        if isinstance(item, h5py.Dataset) and not item.is_scale:
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
    require_filters(source, dataset)
    return dataset


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
