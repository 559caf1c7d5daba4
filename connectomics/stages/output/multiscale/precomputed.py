"""Neuroglancer precomputed pyramids, sharded: ids as compressed segmentation, other labels and intensities raw."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from connectomics.core.files import replacing, write_text
from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.output.multiscale.contract import STAMP_FILE, UNIT_BYTES, LevelArray, open_driver
from connectomics.volumes.levels import Level, plan_levels
from connectomics.volumes.volume import Nanometres, VolumeInfo

ID_BITS = 32
"""Labels of so many bits or more are compressed segmentation, which neither knows shorter ones."""


@dataclass(frozen=True, slots=True)
class PrecomputedLevels:
    """A volume with a voxel size, its corner on whole voxels; chunks in shards along a Z-order curve.

    Parameters
    ----------
    info
        Level 0; float16 widens to float32.
    voxel_size_nm
        (z, y, x), which the format cannot do without.
    levels
        From level 0 on, with the offset of the volume.
    labels
        Whether it is a segmentation.
    unit_bytes
        Uncompressed size of a shard.
    """

    info: VolumeInfo
    voxel_size_nm: Nanometres
    levels: tuple[Level, ...]
    labels: bool
    unit_bytes: int = UNIT_BYTES

    def exists(self, folder: Path) -> bool:
        """Whether the folder is there, being made whole."""
        return folder.is_dir()

    def create(self, folder: Path) -> None:
        """Make the info file and the folders of the scales."""
        content = {
            "@type": "neuroglancer_multiscale_volume",
            "type": "segmentation" if self.labels else "image",
            "data_type": self._dtype.name,
            "num_channels": self.info.channels,
            "scales": [self._scale(level) for level in self.levels],
        }
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / "info").write_text(json.dumps(content, indent=1))
            for level in self.levels:
                (temporary / self._key(level)).mkdir()

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; chunks of zeros are left out."""
        stored = open_driver("neuroglancer_precomputed", folder, scale_index=level).T
        return LevelArray(folder, stored[ts.d[:].translate_to[0]])

    def stamp(self, folder: Path, stamp: dict[str, object], name: str) -> None:
        """Write the stamp's file; the format has no place for a name."""
        write_text(folder / STAMP_FILE, json.dumps(stamp, allow_nan=False))

    @property
    def _dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.float32) if self.info.dtype == np.float16 else self.info.dtype

    def _key(self, level: Level) -> str:
        return "_".join(f"{length:.10g}" for length in level.scale(self.voxel_size_nm)[::-1])

    def _scale(self, level: Level) -> dict[str, object]:
        chunk = self._chunk(level)
        scale: dict[str, object] = {
            "key": self._key(level),
            "size": list(level.extent[::-1]),
            "resolution": list(level.scale(self.voxel_size_nm)[::-1]),
            "voxel_offset": list(level.offset[::-1]),
            "chunk_sizes": [list(chunk[::-1])],
            "encoding": "raw",
            "sharding": self._sharding(level),
        }
        if self.compressed:
            scale["encoding"] = "compressed_segmentation"
            scale["compressed_segmentation_block_size"] = [8, 8, min(8, chunk[0])]
        return scale

    @property
    def compressed(self) -> bool:
        """Whether it is stored as compressed segmentation."""
        return self.labels and self._dtype.itemsize * 8 >= ID_BITS

    def shards(self, level: Level) -> int:
        """How many shards a level has at most."""
        shard_bits, _ = self._bits(level)
        return 1 << shard_bits

    def _chunk(self, level: Level) -> Vec3:
        return vec3([min(c, n) for c, n in zip(self.info.chunk_shape, level.extent, strict=True)])

    def _bits(self, level: Level) -> tuple[int, int]:
        """Bits of a chunk's number that say its shard, and its place within that: as many as ``unit_bytes`` holds."""
        chunk = self._chunk(level)
        grid = [-(-n // c) for n, c in zip(level.extent, chunk, strict=True)]
        bits = sum((n - 1).bit_length() for n in grid)
        chunk_bytes = math.prod(chunk) * self.info.channels * self._dtype.itemsize
        within = min(bits, max(0, (self.unit_bytes // chunk_bytes).bit_length() - 1))
        return bits - within, within

    def _sharding(self, level: Level) -> dict[str, object]:
        shard_bits, within = self._bits(level)
        return {
            "@type": "neuroglancer_uint64_sharded_v1",
            "hash": "identity",
            "preshift_bits": within,
            "minishard_bits": 0,
            "shard_bits": shard_bits,
            "minishard_index_encoding": "gzip",
            "data_encoding": "gzip",
        }


def precomputed_levels(info: VolumeInfo, size: Nanometres) -> tuple[Level, ...]:
    """Levels whose first voxel is counted from the origin, to the nearest whole voxel."""
    return plan_levels(info, vec3([round(o / s) for o, s in zip(info.origin_nm, size, strict=True)]))


def stamp_of_precomputed(folder: Path) -> object:
    """What ``PrecomputedLevels.stamp`` kept; errors are those of reading files and JSON."""
    return json.loads((folder / STAMP_FILE).read_text())
