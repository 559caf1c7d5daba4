"""How large an output can become at most, and how many files it is, before a voxel of it is known.

Every chunk is taken as whole and incompressible, though labels are most compressible. ``forecast.volumes`` asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.output.export import PYRAMIDS, multiscale_of
from connectomics.stages.output.multiscale.contract import Multiscale
from connectomics.stages.output.multiscale.n5 import N5Levels
from connectomics.stages.output.multiscale.precomputed import PrecomputedLevels
from connectomics.stages.output.multiscale.zarr import Zarr2Levels, Zarr3Levels
from connectomics.stages.output.single_file import TILE, is_tiled, section_bytes
from connectomics.volumes.levels import Level
from connectomics.volumes.volume import VolumeInfo

EXPANSION = 1.01  # of what a compressor cannot compress
CHUNK_BYTES = 128  # of a chunk's header, and of its place in an index
FILE_BYTES = 4096  # of a file's own metadata
STAMP_BYTES = 1 << 19  # of the facts about a run that an output carries
STRIP_BYTES = 1 << 16  # of a TIFF's strips, at least, where a row is not longer
WIDENED = {2: 4}  # float16 becomes float32 where a format does not know it


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes at most, and files at most."""

    nbytes: int
    files: int

    def __add__(self, other: Size) -> Size:
        return Size(self.nbytes + other.nbytes, self.files + other.files)


def largest_size(info: VolumeInfo, format: str, shard: Vec3, *, labels: bool, levels: int | None = None) -> Size:
    """Upper bound of an output's size.

    Parameters
    ----------
    info
        The output: its chunks are those of the working store.
    format
        One of ``export.FORMATS`` that can hold it.
    shard
        Shape (z, y, x) of the working store's shards, which are the blocks of the run.
    labels
        Whether it is a segmentation.
    levels
        How many levels of a pyramid at most; None for all there are.

    Raises
    ------
    OutputError
        If the format cannot hold such a volume.
    """
    if format in PYRAMIDS:
        image = multiscale_of(format, info, shard, Path(format), labels=labels, levels=levels)
        return sum((_level(image, level) for level in image.levels), Size(STAMP_BYTES + FILE_BYTES, 3))
    if format == "png":
        rows = info.extent[0] * info.extent[1]
        nbytes = _packed(math.prod(info.shape) * info.dtype.itemsize, info.extent[0])
        return Size(nbytes + rows + info.extent[0] * FILE_BYTES + STAMP_BYTES, info.extent[0] + 1)
    if format == "tiff":
        return Size(_tiff_bytes(info), 1)
    chunks = _cells(info.extent, info.chunk_shape) * info.channels
    chunk_bytes = math.prod(info.chunk_shape) * info.dtype.itemsize
    return Size(_packed(chunks * chunk_bytes, chunks) + 2 * STAMP_BYTES + FILE_BYTES, 1)


def store_size(info: VolumeInfo, shard: Vec3) -> Size:
    """Upper bound of the working store, which lies beside the outputs until they are complete."""
    return _sharded(info, info.extent, shard) + Size(2 * FILE_BYTES, 2)


def _tiff_bytes(info: VolumeInfo) -> int:
    sections = info.extent[0] * info.channels
    plane = section_bytes(info) // info.channels
    parts = min(info.extent[1], -(-plane // STRIP_BYTES) + 1)
    if is_tiled(info):
        parts = _cells((1, *info.extent[1:]), (1, TILE, TILE))
        plane = parts * TILE * TILE * info.dtype.itemsize
    return _packed(sections * plane, sections * parts) + sections * FILE_BYTES + STAMP_BYTES


def _level(image: Multiscale, level: Level) -> Size:
    """One level of a pyramid with its metadata."""
    if isinstance(image, Zarr3Levels):
        return _sharded(image.info, level.extent, image.shard(level)) + Size(FILE_BYTES, 1)
    if isinstance(image, Zarr2Levels | N5Levels):
        chunk = image.chunk(level)
        files = _cells(level.extent, chunk)
        nbytes = files * math.prod(chunk) * image.info.channels * _stored_bytes(image.info)
        return Size(_packed(nbytes, files) + FILE_BYTES, files + 1)
    assert isinstance(image, PrecomputedLevels), f"a pyramid of unknown kind {type(image)}"
    return _precomputed(image, level)


def _precomputed(image: PrecomputedLevels, level: Level) -> Size:
    info = image.info
    chunk = _clipped(info.chunk_shape, level.extent)
    chunks = _cells(level.extent, chunk)
    files = min(chunks, image.shards(level))
    item = _stored_bytes(info) * (2 if image.compressed else 1)  # of blocks that hold many ids
    return Size(_packed(chunks * math.prod(chunk) * info.channels * item, chunks) + files * FILE_BYTES, files)


def _sharded(info: VolumeInfo, extent: Vec3, shard: Vec3) -> Size:
    chunk = _clipped(info.chunk_shape, extent)
    chunks, files = _cells(extent, chunk) * info.channels, _cells(extent, shard)
    nbytes = chunks * math.prod(chunk) * info.dtype.itemsize
    places = files * _cells(shard, chunk) * info.channels * 16  # of the index of a shard, whole at the far faces
    return Size(_packed(nbytes, chunks) + places + files * CHUNK_BYTES, files)


def _packed(nbytes: int, chunks: int) -> int:
    return math.ceil(nbytes * EXPANSION) + chunks * CHUNK_BYTES


def _stored_bytes(info: VolumeInfo) -> int:
    size = info.dtype.itemsize
    return WIDENED.get(size, size) if info.dtype.kind == "f" else size


def _cells(extent: Vec3, unit: Vec3) -> int:
    return math.prod(-(-n // u) for n, u in zip(extent, unit, strict=True))


def _clipped(chunk: Vec3, extent: Vec3) -> Vec3:
    return vec3([min(c, n) for c, n in zip(chunk, extent, strict=True)])
