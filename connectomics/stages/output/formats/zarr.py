"""The output format ``zarr``: OME-Zarr 0.5, which is sharded Zarr v3."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.output.formats.contract import UNIT_BYTES, ChunkedFormat, stamp_in
from connectomics.stages.output.formats.level_array import LevelArray, open_driver
from connectomics.stages.output.shards import ShardWriter
from connectomics.stages.output.size import FILE_BYTES, OutputSize, clipped, sharded_size
from connectomics.volumes.levels import Level, grown, plan_levels
from connectomics.volumes.store import ATTRIBUTES, METADATA, array_metadata, group_metadata
from connectomics.volumes.volume import VolumeInfo

STAMP = "stamp"
BLOCKS_A_SHARD = 4
"""Blocks that a shard covers at least, so that all levels together are fewer files than blocks."""


@dataclass(frozen=True, slots=True)
class Zarr3Levels:
    """OME-Zarr 0.5: sharded arrays, whose shards are whole blocks of the run, however large these are."""

    info: VolumeInfo
    levels: tuple[Level, ...]
    block_shape: Vec3
    unit_bytes: int = UNIT_BYTES

    def files(self) -> dict[str, str]:
        """The arrays; the group has no metadata before it is stamped."""
        arrays = [array_metadata(info_of_level(self.info, level), self._shard(level)) for level in self.levels]
        return {f"{k}/{METADATA}": json.dumps(metadata, indent=2) for k, metadata in enumerate(arrays)}

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; chunks of zeros are left out."""
        place, info = folder / str(level), info_of_level(self.info, self.levels[level])
        shards = ShardWriter(place, info, self._shard(self.levels[level]))
        return LevelArray(folder, open_driver("zarr3", place), shards=shards)

    def stamped(self, stamp: dict[str, object], name: str) -> tuple[str, str]:
        """The group's metadata, which name the levels and the image and keep the stamp."""
        metadata = group_metadata(name, self.info, self.levels, {STAMP: stamp})
        return METADATA, json.dumps(metadata, indent=2, allow_nan=False)

    def level_size(self, level: Level) -> OutputSize:
        """Upper bound of a level with its metadata."""
        return sharded_size(self.info, level.extent, self._shard(level)) + OutputSize(FILE_BYTES, 1)

    def _shard(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the shards of a level: whole blocks, so many of them as are large enough together."""
        info = info_of_level(self.info, level)
        voxel_bytes, block = info.channels * info.dtype.itemsize, self._block(info)
        limit = max(self.unit_bytes, BLOCKS_A_SHARD * math.prod(self._block(self.info)) * voxel_bytes)
        counts = vec3([-(-n // b) for n, b in zip(info.extent, block, strict=True)])
        blocks = grown((1, 1, 1), counts, math.prod(block) * voxel_bytes, limit)
        return vec3([min(m, n) * b for m, n, b in zip(blocks, counts, block, strict=True)])

    def _block(self, info: VolumeInfo) -> Vec3:
        """The run's block within an extent, in whole chunks."""
        lengths = zip(self.block_shape, info.extent, info.chunk_shape, strict=True)
        return vec3([-(-min(b, n) // c) * c for b, n, c in lengths])


def info_of_level(info: VolumeInfo, level: Level) -> VolumeInfo:
    """The description of a level of a volume."""
    chunk = clipped(info.chunk_shape, level.extent)
    return dataclasses.replace(info, shape=(info.channels, *level.extent), chunk_shape=chunk)


def _planned(info: VolumeInfo, block_shape: Vec3, *, labels: bool, levels: int | None) -> Zarr3Levels:
    return Zarr3Levels(info, plan_levels(info)[:levels], block_shape)


ZARR = ChunkedFormat(
    ".zarr",
    _planned,
    stamp_of=lambda folder: stamp_in(folder / METADATA, "attributes", ATTRIBUTES, STAMP),
    held_bytes=lambda section: UNIT_BYTES,  # written part by part, however large its shards are
)
