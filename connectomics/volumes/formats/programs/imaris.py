"""Imaris volumes (``.ims``): HDF5 of a layout of its own, read by h5py; ``path.ims::1`` is level 1; for ``opening``."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import h5py
import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.codecs.hdf5_filters import require_filters
from connectomics.volumes.formats.hdf5 import refuse_bombs
from connectomics.volumes.metadata.hdf5_parts import opened_file
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import READ_ERRORS, Source, file_identity, three_positive, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, require_small_chunks, row_chunk
from connectomics.volumes.volume import Array, Nanometres
from connectomics.volumes.watched import WatchedFiles

LEVEL = "DataSet/ResolutionLevel {}"
FIRST = "TimePoint 0"


def open_imaris(source: Source) -> StoredVolume:
    """Open one level of an Imaris file for lazy reading; its channels are in the order of their numbers.

    Raises
    ------
    VolumeError
        If the file is damaged, lacks the level, or has several points in time.
    """
    try:
        with contextlib.ExitStack() as opened:
            file_identity(source.path)  # refuses pipes, at which opening would wait for ever
            watched = WatchedFiles(source.path)
            file = opened.enter_context(opened_file(source.path))
            channels, extent = _channels(source, file)
            first = channels[0]["Data"]
            datasets = [channel["Data"] for channel in channels]
            for dataset in datasets:
                require_filters(source, dataset)
                if (dataset.dtype, dataset.ndim) != (first.dtype, 3) or any(
                    n > m for n, m in zip(extent, dataset.shape, strict=True)
                ):
                    raise ValueError("its channels differ in type or size")
            layout = layout_of(source, (len(datasets), *extent), "czyx", "Imaris' own order")
            chunk = first.chunks or row_chunk(first.shape, first.dtype.itemsize)
            require_small_chunks(source, chunk, first.dtype.itemsize)
            info = info_of(
                source,
                layout,
                first.dtype,
                (1, *chunk),
                voxel_size_nm=_voxel_size(source, file, extent),
                found={"voxel size": "DataSetInfo/Image"},
            )
            opened.pop_all()
    except READ_ERRORS as error:
        raise unreadable(source, "Imaris", error) from error
    lock = threading.Lock()

    def fetch(index: tuple[slice, ...]) -> Array:
        channel, *where = index
        with lock:
            for dataset in datasets[channel]:
                refuse_bombs(dataset, tuple(where))
            return np.stack([dataset[tuple(where)] for dataset in datasets[channel]])

    def release() -> None:
        with lock:
            file.close()

    def identity() -> dict[str, object]:
        return watched.identity | ({} if source.inner is None else {"level": source.inner})

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=release, watched=watched)


def _channels(source: Source, file: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The groups of the channels of the wanted level, and its extent (z, y, x), to which arrays are padded."""
    level = file.get(LEVEL.format(source.inner or 0))
    if not isinstance(level, h5py.Group):
        found = sorted(name.removeprefix("ResolutionLevel ") for name in file.get("DataSet", {}))
        raise VolumeError(
            f"{source.uri}: no resolution level {source.inner or '0'}; the file holds "
            f"{', '.join(found[:10]) or 'none, so it is no Imaris file'}. Name one by its number, as "
            f"{source.path.name}::0."
        )
    times = [name for name in level if name.startswith("TimePoint ")]
    if len(times) != 1:
        raise VolumeError(
            f"{source.uri}: {len(times)} points in time (a time axis), expected one; export a single one from Imaris."
        )
    numbers = {
        int(name.split()[1]): name for name in level[times[0]] if name.split()[1:2] and name.split()[1].isdigit()
    }
    channels = [level[times[0]][numbers[number]] for number in sorted(numbers)]
    if not channels:
        raise VolumeError(f"{source.uri}: the Imaris file holds no channel.")
    extents = {tuple(int(_text(channel.attrs[f"ImageSize{axis}"])) for axis in "ZYX") for channel in channels}
    if len(extents) != 1 or min(min(extents)) < 1:
        raise ValueError(f"its channels state the sizes {sorted(extents)[:4]}")
    return channels, extents.pop()


def _text(value: Any) -> str:
    """An attribute, which Imaris stores letter by letter."""
    if isinstance(value, bytes | str):
        return value.decode() if isinstance(value, bytes) else value
    return b"".join(np.asarray(value).astype("S1").ravel()[:1000].tolist()).decode()


def _voxel_size(source: Source, file: Any, extent: tuple[int, ...]) -> Nanometres | None:
    """The edges of the box over the number of voxels; in micrometres where no unit is stated."""
    image = file.get("DataSetInfo/Image")
    if image is None:
        return None
    stated = {name: _text(value) for name, value in image.attrs.items() if name == "Unit" or name.startswith("Ext")}
    try:
        edges = [float(stated[f"ExtMax{i}"]) - float(stated[f"ExtMin{i}"]) for i in (2, 1, 0)]
    except (KeyError, ValueError):
        return None
    factor = nanometres(source, stated.get("Unit") or "um", "attribute `Unit` of DataSetInfo/Image")
    return None if factor is None else three_positive(np.divide(edges, extent), factor)
