"""``connectomics inspect VOLUME``: what a volume is, and where each fact was found."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, vec3
from connectomics.volumes.formats.zarr import level_names
from connectomics.volumes.opened import OpenedVolume
from connectomics.volumes.opening import open_volume
from connectomics.volumes.source import without_prefix

SAMPLE_VOXELS = 1 << 22
MOST_LEVELS = 32


def describe_volume(
    uri: str, axes: str | None = None, voxel_size_nm: Sequence[float] | None = None
) -> dict[str, object]:
    """What ``connectomics inspect`` prints of a volume, as JSON values.

    Parameters
    ----------
    uri, axes, voxel_size_nm
        As for ``open_volume``.

    Raises
    ------
    VolumeError
        If it cannot be opened or its sample cannot be read.
    """
    with open_volume(uri, axes=axes, voxel_size_nm=voxel_size_nm) as volume:
        info, sample = volume.info, _sample(volume)
        values = volume.read(sample)
        facts: dict[str, object] = {
            "volume": uri,
            "format": volume.format,
            "shape (c, z, y, x)": list(info.shape),
            "axes as stored": info.found.get("axes", "c, z, y, x"),
            "dtype": str(info.dtype),
            "chunks (z, y, x)": list(info.chunk_shape),
            "voxel size (z, y, x)": _stated(volume, "voxel size", info.voxel_size_nm, "nm"),
            "origin (z, y, x)": _stated(volume, "origin", info.origin_nm if info.voxel_size_nm else None, "nm"),
            "spacing (z, y, x)": _stated(volume, "spacing", info.spacing, "in the plan's unit"),
            "levels": list(_levels(volume)) or "one",
            "sample": f"voxels {sample.start} to {sample.stop}",
        }
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        facts["not finite"] = f"{values.size - finite.size} voxels of the sample"
    facts["minimum"] = finite.min().item() if finite.size else None
    facts["maximum"] = finite.max().item() if finite.size else None
    return facts


def _stated(volume: OpenedVolume, what: str, value: Sequence[float] | None, unit: str) -> str:
    if value is None:
        return "not stated"
    numbers, where = ", ".join(f"{number:.6g}" for number in value), volume.info.found.get(what)
    return f"{numbers} {unit}{'' if where is None else f', by {where}'}"


def _sample(volume: OpenedVolume) -> Box:
    """A box in the middle: all of the volume where that is small, else what is near a few whole chunks."""
    info = volume.info
    shape = list(info.extent)
    for axis, least in itertools.cycle(((0, 1), (1, 512), (2, 512), (1, 1), (2, 1))):
        if np.prod(shape) * info.channels <= SAMPLE_VOXELS or max(shape) == 1:
            break
        shape[axis] = min(shape[axis], max(least, -(-shape[axis] // 2)))
    start = [(whole - part) // 2 for whole, part in zip(info.extent, shape, strict=True)]
    return Box(vec3(start), vec3([a + n for a, n in zip(start, shape, strict=True)]))


def _levels(volume: OpenedVolume) -> Iterator[str]:
    """Each level of a pyramid that can be named behind the volume's path."""
    prefix, local = without_prefix(volume.uri)
    path, _, inner = local.partition("::")
    group = Path(path) / inner
    names: Sequence[str] = ()
    if volume.format == "zarr":
        names = level_names(group)
    elif volume.format == "n5":
        names = [child.name for child in group.iterdir() if re.fullmatch(r"s\d+", child.name)]
        names = sorted(names, key=lambda name: int(name[1:]))
    elif volume.format == "precomputed" and not inner:
        names = [str(number) for number in range(MOST_LEVELS)]
    for name in names[:MOST_LEVELS]:
        within = f"{prefix}{path}::{f'{inner}/' if inner else ''}{name}"
        try:
            with open_volume(within) as level:
                yield f"::{within.partition('::')[2]} {level.info.shape}"
        except VolumeError as error:
            if volume.format == "precomputed":  # the number after the last
                return
            yield f"::{within.partition('::')[2]} cannot be opened: {error}"
