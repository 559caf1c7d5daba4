"""Zarr arrays with filters and codecs that TensorStore does not know, through zarr-python; the extra ``zarr``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.installation import install_command
from connectomics.volumes.metadata.frame import Frame
from connectomics.volumes.source import Source
from connectomics.volumes.stored import Layout, StoredVolume, info_of, require_small_chunks
from connectomics.volumes.volume import Array


def second_reader(
    source: Source,
    layout: Layout,
    folder: Path,
    *,
    frame: Frame,
    identity: Callable[[], dict[str, object]],
    codecs: Sequence[str],
) -> StoredVolume:
    """The array in a folder, by zarr-python; ``codecs`` are those that TensorStore does not know.

    Raises
    ------
    VolumeError
        If the package zarr is missing, or does not know them either.
    """
    array = _opened(source, folder, codecs)
    chunk = tuple(int(n) for n in array.chunks)
    require_small_chunks(source, chunk, array.dtype.itemsize)
    info = info_of(
        source,
        layout,
        array.dtype,
        chunk,
        voxel_size_nm=frame.voxel_size_nm,
        origin_nm=frame.origin_nm,
        found=frame.found,
    )

    def fetch(index: tuple[slice, ...]) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about codecs that are not in the specification
            return np.asarray(array[index])

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=lambda: None)


def _opened(source: Source, folder: Path, codecs: Sequence[str]) -> Any:
    names = ", ".join(repr(name[:40]) for name in codecs)
    try:
        import zarr
    except ImportError as error:
        raise VolumeError(
            f"cannot open {source.uri}: its codec {names} needs the package zarr: {install_command('zarr')}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return zarr.open_array(folder, mode="r")
    except (KeyError, LookupError, TypeError, ValueError, ImportError) as error:
        raise VolumeError(
            f"{source.uri}: zarr-python {zarr.__version__} cannot unpack its codec {names}, nor can TensorStore; write "
            "the array again with blosc, gzip or zstd, in the environment in which it was written."
        ) from error
