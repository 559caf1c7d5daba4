"""OME-Zarr pyramids: 0.5 grown onto the working store, and 0.4 (Zarr v2) written anew."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from connectomics.geometry import Vec3, vec3
from connectomics.io.atomic import replacing, write_text
from connectomics.io.levels import Level, grown
from connectomics.io.multiscale import CHUNK_BYTES, UNIT_BYTES, LevelArray, open_driver
from connectomics.io.ome import multiscale
from connectomics.io.store import ATTRIBUTES, METADATA, STAMP, array_metadata, stamp_store
from connectomics.io.volume import VolumeInfo


@dataclass(frozen=True, slots=True)
class StoreLevels:
    """OME-Zarr 0.5: the working store is level 0, further sharded arrays are made beside it.

    Parameters
    ----------
    info
        Level 0.
    levels
        From level 0 on.
    unit_bytes
        Uncompressed size of a shard.
    """

    info: VolumeInfo
    levels: tuple[Level, ...]
    unit_bytes: int = UNIT_BYTES

    def exists(self, folder: Path) -> bool:
        """Whether all levels but the store's own have their metadata."""
        return all((folder / str(k) / METADATA).exists() for k in range(1, len(self.levels)))

    def create(self, folder: Path) -> None:
        """Make the arrays of all levels but the store's own."""
        for k, level in enumerate(self.levels[1:], 1):
            info = _of_level(self.info, level)
            shard = self.shard(level)
            with replacing(folder / str(k)) as temporary:
                temporary.mkdir()
                (temporary / METADATA).write_text(json.dumps(array_metadata(info, shard), indent=2))

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing."""
        return LevelArray(folder, open_driver("zarr3", folder / str(level)))

    def stamp(self, folder: Path, stamp: dict[str, object], name: str) -> None:
        """Name the levels and the image, and keep the stamp."""
        stamp_store(folder, stamp, name, self.levels)

    def shard(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the shards of a level but the store's own."""
        info = _of_level(self.info, level)
        return grown(info.chunk_shape, info.extent, _voxel_bytes(info), self.unit_bytes)


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
