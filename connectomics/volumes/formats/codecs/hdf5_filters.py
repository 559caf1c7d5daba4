"""Filters by which HDF5 datasets are packed: those of the extra ``hdf5`` are registered when one is met."""

from __future__ import annotations

from typing import Any

import h5py

from connectomics.core.errors import VolumeError
from connectomics.core.installation import install_command
from connectomics.volumes.source import Source

NAMES = {
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32022: "jpeg",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
}
"""What the numbers of filters mean, as The HDF Group registers them."""


def require_filters(source: Source, dataset: Any) -> None:
    """Register the filters of a dataset, by the package hdf5plugin where HDF5 does not have them.

    Raises
    ------
    VolumeError
        If the package is missing, or has not the filter either.
    """
    unknown = _unknown(dataset)
    if not unknown:
        return
    names = ", ".join(f"{NAMES.get(number, 'unknown')} (filter {number})" for number in unknown)
    try:
        import hdf5plugin  # noqa: F401  # registers filters when it is imported
    except ImportError as error:
        raise VolumeError(
            f"cannot open {source.uri}: {dataset.name} is packed by {names}, which needs the package hdf5plugin: "
            f"{install_command('hdf5')}"
        ) from error
    if _unknown(dataset):
        raise VolumeError(
            f"{source.uri}: {dataset.name} is packed by {names}, which the package hdf5plugin does not unpack; write "
            "it again with h5repack -f GZIP=4 where it can be read."
        )


def _unknown(dataset: Any) -> list[int]:
    """Numbers of a dataset's filters that HDF5 does not have."""
    properties = dataset.id.get_create_plist()
    numbers = [int(properties.get_filter(i)[0]) for i in range(properties.get_nfilters())]
    return [number for number in numbers if not h5py.h5z.filter_avail(number)]
