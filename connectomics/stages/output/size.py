"""How large an output can become at most, and how many files it is, before a voxel of it is known.

Every chunk is taken as whole and incompressible, though labels are most compressible. Formats count with this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from connectomics.core.geometry import Vec3, vec3
from connectomics.volumes.volume import VolumeInfo

EXPANSION = 1.01  # of what a compressor cannot compress
HEAD_BYTES = 128  # of a chunk's header, and of its place in an index
FILE_BYTES = 4096  # of a file's own metadata
STAMP_BYTES = 1 << 19  # of the facts about a run that an output carries


@dataclass(frozen=True, slots=True)
class OutputSize:
    """Bytes at most, and files at most."""

    nbytes: int
    files: int

    def __add__(self, other: OutputSize) -> OutputSize:
        return OutputSize(self.nbytes + other.nbytes, self.files + other.files)


def store_size(info: VolumeInfo, shard: Vec3) -> OutputSize:
    """Upper bound of the working store, which lies beside the outputs until they are complete."""
    return sharded_size(info, info.extent, shard) + OutputSize(2 * FILE_BYTES, 2)


def sharded_size(info: VolumeInfo, extent: Vec3, shard: Vec3) -> OutputSize:
    """Upper bound of an array of such voxels and chunks in Zarr v3 shards, without its metadata."""
    chunk = clipped(info.chunk_shape, extent)
    chunks, files = cells(extent, chunk) * info.channels, cells(extent, shard)
    nbytes = chunks * math.prod(chunk) * info.dtype.itemsize
    places = files * cells(shard, chunk) * info.channels * 16  # of the index of a shard, whole at the far faces
    return OutputSize(packed(nbytes, chunks) + places + files * HEAD_BYTES, files)


def packed(nbytes: int, chunks: int) -> int:
    """Bytes at most of so many bytes when they are compressed in so many chunks."""
    return math.ceil(nbytes * EXPANSION) + chunks * HEAD_BYTES


def cells(extent: Vec3, unit: Vec3) -> int:
    """How many units cover an extent."""
    return math.prod(-(-n // u) for n, u in zip(extent, unit, strict=True))


def clipped(chunk: Vec3, extent: Vec3) -> Vec3:
    """A chunk that is no longer than the extent."""
    return vec3([min(c, n) for c, n in zip(chunk, extent, strict=True)])


def widened(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype that a format stores which does not know float16."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype
