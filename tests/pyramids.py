"""What pyramids are compared with: windows one by one with numpy, and the readers of other programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

Vec3 = tuple[int, ...]


def coarser(voxels: np.ndarray, step: Vec3, phase: Vec3, *, labels: bool) -> np.ndarray:
    """The next level of (c, z, y, x), window by window; the windows at the faces hold what there is."""
    extent = [-(-(n + p) // s) for n, p, s in zip(voxels.shape[1:], phase, step, strict=True)]
    result = np.empty((len(voxels), *extent), voxels.dtype)
    for at in itertools.product(range(len(voxels)), *map(range, extent)):
        spans = zip(at[1:], step, phase, strict=True)
        window = voxels[(at[0], *(slice(max(0, i * s - p), (i + 1) * s - p) for i, s, p in spans))]
        if labels:
            found, counts = np.unique(window, return_counts=True)
            result[at] = found[counts.argmax()]  # the smallest of equally frequent ones
        else:
            value = window.astype(np.float64).mean()
            result[at] = np.rint(value) if voxels.dtype.kind in "iu" else value
    return result


def by_zarr_python(path: Path, level: int) -> np.ndarray:
    """(c, z, y, x) or (z, y, x) of a level, v2 or v3."""
    return np.asarray(zarr.open_group(path, mode="r", use_consolidated=False)[str(level)][:])


def by_z5py(path: Path, level: int) -> np.ndarray:
    """The same of N5, which this library gives slowest axis first."""
    import z5py

    with z5py.File(str(path), mode="r") as file:
        return np.asarray(file[f"s{level}"][:])


def by_cloud_volume(path: Path, level: int) -> np.ndarray:
    """(c, z, y, x) of a scale; chunks of zeros are absent."""
    import cloudvolume

    volume = cloudvolume.CloudVolume(f"file://{path}", mip=level, progress=False, fill_missing=True)
    return np.asarray(volume[:]).transpose(3, 2, 1, 0)


READERS: dict[str, Callable[[Path, int], Any]] = {
    "zarr": by_zarr_python,
    "zarr2": by_zarr_python,
    "n5": by_z5py,
    "precomputed": by_cloud_volume,
}
