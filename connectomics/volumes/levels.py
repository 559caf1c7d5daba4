"""The levels of a pyramid: how large each is, what a voxel of it covers, and the units it is written in.

``stages.output.pyramid`` computes them; they depend on the volume only. ``multiscale`` is how OME-Zarr tells of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from connectomics.core.geometry import Vec3, vec3
from connectomics.volumes.volume import Nanometres, VolumeInfo

ISOTROPIC = math.sqrt(2)  # an axis is coarse when its voxels are so much longer than the shortest


@dataclass(frozen=True, slots=True)
class Level:
    """One level; all values are (z, y, x).

    Parameters
    ----------
    extent
        In voxels.
    step
        Voxels of the level before that a window has: 1 or 2 an axis.
    factor
        Voxels of level 0 that a voxel is long.
    offset
        Index of the first voxel where voxels are counted from the origin of the coordinates.
    phase
        Voxels of the level before that the first window lacks, because the volume begins within it: 0 or 1.
    """

    extent: Vec3
    step: Vec3 = (1, 1, 1)
    factor: Vec3 = (1, 1, 1)
    offset: Vec3 = (0, 0, 0)
    phase: Vec3 = (0, 0, 0)

    def scale(self, size: Nanometres) -> Nanometres:
        """Length of a voxel, from that of level 0."""
        return (self.factor[0] * size[0], self.factor[1] * size[1], self.factor[2] * size[2])

    def translation(self, size: Nanometres, origin: Nanometres) -> Nanometres:
        """Centre of the first voxel, from that of level 0, where the first window is whole.

        Examples
        --------
        >>> Level((5, 5, 5), factor=(1, 2, 4)).translation((40.0, 4.0, 4.0), (0.0, 0.0, 100.0))
        (0.0, 2.0, 106.0)
        """
        z, y, x = (o + (f - 1) / 2 * s for o, f, s in zip(origin, self.factor, size, strict=True))
        return (z, y, x)


def plan_levels(info: VolumeInfo, offset: Vec3 = (0, 0, 0)) -> tuple[Level, ...]:
    """Halve until a plane fits one chunk: first the axes whose voxels are short, then all.

    Where the voxel size is not known, volumes of flat chunks are halved in the plane and others along all axes.

    Parameters
    ----------
    info
        Level 0.
    offset
        Index of its first voxel, see ``Level``.

    Examples
    --------
    >>> from connectomics.volumes.volume import VolumeInfo
    >>> import numpy as np
    >>> info = VolumeInfo((1, 100, 1024, 1023), np.dtype("u1"), (64, 64, 64), (40.0, 8.0, 8.0))
    >>> [level.factor for level in plan_levels(info)]
    [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)]
    """
    levels = [Level(info.extent, offset=offset)]
    while any(n > c for n, c in zip(levels[-1].extent[1:], info.chunk_shape[1:], strict=True)):
        coarser = _next(levels[-1], _step(levels[-1], info))
        if coarser.extent == levels[-1].extent:  # two voxels, one on each side of the origin, which stay two
            break
        levels.append(coarser)
    return tuple(levels)


def _step(level: Level, info: VolumeInfo) -> Vec3:
    long = [n > 1 for n in level.extent]
    if info.voxel_size_nm is None:
        return vec3([1 + (ok and (axis > 0 or info.chunk_shape[0] > 1)) for axis, ok in enumerate(long)])
    size = level.scale(info.voxel_size_nm)
    shortest = min(s for s, ok in zip(size, long, strict=True) if ok)
    return vec3([1 + (ok and s < shortest * ISOTROPIC) for s, ok in zip(size, long, strict=True)])


def _next(level: Level, step: Vec3) -> Level:
    first = [o // s for o, s in zip(level.offset, step, strict=True)]
    stop = [-(-(o + n) // s) for o, n, s in zip(level.offset, level.extent, step, strict=True)]
    return Level(
        vec3([b - a for a, b in zip(first, stop, strict=True)]),
        step,
        vec3([f * s for f, s in zip(level.factor, step, strict=True)]),
        vec3(first),
        phase=vec3([o % s for o, s in zip(level.offset, step, strict=True)]),
    )


def grown(chunk: Vec3, extent: Vec3, voxel_bytes: int, limit_bytes: int) -> Vec3:
    """``chunk``, no larger than the extent, doubled along x, y and z in turn until it covers the extent or is full.

    Examples
    --------
    >>> grown((1, 512, 512), (20, 3000, 600), 1, 4 << 20)
    (2, 2048, 1024)
    """
    shape = [min(c, n) for c, n in zip(chunk, extent, strict=True)]
    axis, stuck = 2, 0
    while stuck < 3:
        if shape[axis] < extent[axis] and 2 * math.prod(shape) * voxel_bytes <= limit_bytes:
            shape[axis] *= 2
            stuck = 0
        else:
            stuck += 1
        axis = (axis - 1) % 3
    return vec3(shape)


def multiscale(name: str, info: VolumeInfo, levels: Sequence[Level]) -> dict[str, object]:
    """One entry of OME-Zarr's ``multiscales``, 0.4 and 0.5; level ``k``, which has no phase, is the array ``k``."""
    unit = {} if info.voxel_size_nm is None else {"unit": "nanometer"}
    channel = [] if info.channels == 1 else [{"name": "c", "type": "channel"}]
    size = info.voxel_size_nm or (1.0, 1.0, 1.0)
    datasets = [
        {
            "path": str(k),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0] * len(channel) + list(level.scale(size))},
                {
                    "type": "translation",
                    "translation": [0.0] * len(channel) + list(level.translation(size, info.origin_nm)),
                },
            ],
        }
        for k, level in enumerate(levels)
    ]
    axes = channel + [{"name": axis, "type": "space", **unit} for axis in "zyx"]
    return {"name": name, "axes": axes, "datasets": datasets}
