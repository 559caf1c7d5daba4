"""OME-Zarr pyramids: 0.5, which is sharded Zarr v3, and 0.4, which is Zarr v2."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.files import replacing, write_text
from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.output.multiscale.contract import CHUNK_BYTES, UNIT_BYTES, LevelArray, open_driver
from connectomics.stages.output.shards import ShardWriter
from connectomics.volumes.levels import Level, grown
from connectomics.volumes.ome import multiscale
from connectomics.volumes.store import ATTRIBUTES, METADATA, array_metadata, group_metadata
from connectomics.volumes.volume import VolumeInfo

STAMP = "stamp"
BLOCKS_A_SHARD = 4
"""Blocks that a shard covers at least, so that all levels together are fewer files than blocks."""


@dataclass(frozen=True, slots=True)
class Zarr3Levels:
    """OME-Zarr 0.5: sharded arrays, whose shards are whole blocks of the run, however large these are.

    Parameters
    ----------
    info
        Level 0.
    levels
        From level 0 on.
    block_shape
        (z, y, x) of the run's blocks.
    unit_bytes
        Uncompressed size of a shard, more where blocks are large.
    """

    info: VolumeInfo
    levels: tuple[Level, ...]
    block_shape: Vec3
    unit_bytes: int = UNIT_BYTES

    def exists(self, folder: Path) -> bool:
        """Whether the folder is there, being made whole."""
        return folder.is_dir()

    def create(self, folder: Path) -> None:
        """Make the arrays; the group has no metadata before it is stamped."""
        with replacing(folder) as temporary:
            for k, level in enumerate(self.levels):
                (temporary / str(k)).mkdir(parents=True)
                metadata = array_metadata(_of_level(self.info, level), self.shard(level))
                (temporary / str(k) / METADATA).write_text(json.dumps(metadata, indent=2))

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; chunks of zeros are left out."""
        place, info = folder / str(level), _of_level(self.info, self.levels[level])
        shards = ShardWriter(place, info, self.shard(self.levels[level]))
        return LevelArray(folder, open_driver("zarr3", place), shards=shards)

    def stamp(self, folder: Path, stamp: dict[str, object], name: str) -> None:
        """Write the group's metadata, which name the levels and the image and keep the stamp."""
        metadata = group_metadata(name, self.info, self.levels, {STAMP: stamp})
        write_text(folder / METADATA, json.dumps(metadata, indent=2, allow_nan=False))

    def shard(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the shards of a level: whole blocks, so many of them as are large enough together."""
        info = _of_level(self.info, level)
        block = self._block(info)
        limit = max(self.unit_bytes, BLOCKS_A_SHARD * math.prod(self._block(self.info)) * _voxel_bytes(info))
        counts = vec3([-(-n // b) for n, b in zip(info.extent, block, strict=True)])
        blocks = grown((1, 1, 1), counts, math.prod(block) * _voxel_bytes(info), limit)
        return vec3([min(m, n) * b for m, n, b in zip(blocks, counts, block, strict=True)])

    def _block(self, info: VolumeInfo) -> Vec3:
        """The run's block within an extent, in whole chunks."""
        lengths = zip(self.block_shape, info.extent, info.chunk_shape, strict=True)
        return vec3([-(-min(b, n) // c) * c for b, n, c in lengths])


def stamp_of_zarr3(folder: Path) -> object:
    """What ``Zarr3Levels.stamp`` kept; errors are those of reading files and JSON."""
    return json.loads((folder / METADATA).read_text())["attributes"][ATTRIBUTES][STAMP]


@dataclass(frozen=True, slots=True)
class Zarr2Levels:
    """OME-Zarr 0.4, for programs that do not read 0.5: Zarr v2 has no shards, so chunks are large and files.

    Parameters
    ----------
    info
        Level 0.
    levels
        From level 0 on.
    unit_bytes
        Uncompressed size of what is written at once.
    """

    info: VolumeInfo
    levels: tuple[Level, ...]
    unit_bytes: int = UNIT_BYTES

    def exists(self, folder: Path) -> bool:
        """Whether the folder is there, being made whole."""
        return folder.is_dir()

    def create(self, folder: Path) -> None:
        """Make the group and its arrays."""
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / ".zgroup").write_text('{"zarr_format": 2}')
            for k, level in enumerate(self.levels):
                (temporary / str(k)).mkdir()
                metadata = _array2_metadata(_of_level(self.info, level), self.chunk(level))
                (temporary / str(k) / ".zarray").write_text(json.dumps(metadata, indent=2))

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing."""
        extent = self.levels[level].extent
        unit = grown(self.chunk(self.levels[level]), extent, _voxel_bytes(self.info), self.unit_bytes)
        return LevelArray(folder, open_driver("zarr", folder / str(level)), unit)

    def stamp(self, folder: Path, stamp: dict[str, object], name: str) -> None:
        """Write the group's attributes."""
        image = multiscale(name, self.info, self.levels) | {"version": "0.4"}
        attributes = {"multiscales": [image], ATTRIBUTES: {STAMP: stamp}}
        write_text(folder / ".zattrs", json.dumps(attributes, indent=2, allow_nan=False))

    def chunk(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the chunks of a level."""
        limit = min(CHUNK_BYTES, self.unit_bytes)
        return grown(self.info.chunk_shape, level.extent, _voxel_bytes(self.info), limit)


def stamp_of_zarr2(folder: Path) -> object:
    """What ``Zarr2Levels.stamp`` kept; errors are those of reading files and JSON."""
    return json.loads((folder / ".zattrs").read_text())[ATTRIBUTES][STAMP]


def _of_level(info: VolumeInfo, level: Level) -> VolumeInfo:
    chunk = vec3([min(c, n) for c, n in zip(info.chunk_shape, level.extent, strict=True)])
    return dataclasses.replace(info, shape=(info.channels, *level.extent), chunk_shape=chunk)


def _voxel_bytes(info: VolumeInfo) -> int:
    return info.channels * info.dtype.itemsize


def _array2_metadata(info: VolumeInfo, chunk: Vec3) -> dict[str, object]:
    several = info.channels > 1
    shuffle = 1 if info.dtype.itemsize > 1 else 0
    return {
        "zarr_format": 2,
        "shape": list(info.shape if several else info.extent),
        "chunks": [info.channels] * several + list(chunk),
        "dtype": info.dtype.newbyteorder("<").str,
        "compressor": {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": shuffle, "blocksize": 0},
        "fill_value": 0 if info.dtype.kind in "iu" else 0.0,
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
    }
