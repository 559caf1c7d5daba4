"""The output format ``precomputed`` of Neuroglancer, sharded: ids as compressed segmentation, all else raw."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.output.formats.contract import STAMP_FILE, UNIT_BYTES, ChunkedFormat, stamp_in
from connectomics.stages.output.formats.level_array import LevelArray, open_driver
from connectomics.stages.output.size import FILE_BYTES, OutputSize, cells, clipped, packed, widened
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

    def files(self) -> dict[str, str]:
        """The info file and the folders of the scales."""
        content = {
            "@type": "neuroglancer_multiscale_volume",
            "type": "segmentation" if self.labels else "image",
            "data_type": self._dtype.name,
            "num_channels": self.info.channels,
            "scales": [self._scale(level) for level in self.levels],
        }
        return {"info": json.dumps(content, indent=1)} | {f"{self._key(level)}/": "" for level in self.levels}

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; chunks of zeros are left out."""
        stored = open_driver("neuroglancer_precomputed", folder, scale_index=level).T
        return LevelArray(folder, stored[ts.d[:].translate_to[0]])

    def stamped(self, stamp: dict[str, object], name: str) -> tuple[str, str]:
        """The stamp's file; the format has no place for a name."""
        return STAMP_FILE, json.dumps(stamp, allow_nan=False)

    def level_size(self, level: Level) -> OutputSize:
        """Upper bound of a level."""
        chunk = self._chunk(level)
        chunks = cells(level.extent, chunk)
        files = min(chunks, 1 << self._bits(level)[0])
        item = self._dtype.itemsize * (2 if self._compressed else 1)  # of blocks that hold many ids
        nbytes = chunks * math.prod(chunk) * self.info.channels * item
        return OutputSize(packed(nbytes, chunks) + files * FILE_BYTES, files)

    @property
    def _dtype(self) -> np.dtype[np.generic]:
        return widened(self.info.dtype)

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
        if self._compressed:
            scale["encoding"] = "compressed_segmentation"
            scale["compressed_segmentation_block_size"] = [8, 8, min(8, chunk[0])]
        return scale

    @property
    def _compressed(self) -> bool:
        """Whether it is stored as compressed segmentation."""
        return self.labels and self._dtype.itemsize * 8 >= ID_BITS

    def _chunk(self, level: Level) -> Vec3:
        return clipped(self.info.chunk_shape, level.extent)

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


def _planned(info: VolumeInfo, block_shape: Vec3, *, labels: bool, levels: int | None) -> PrecomputedLevels:
    """Levels whose first voxel is counted from the origin, to the nearest whole voxel."""
    size = info.voxel_size_nm
    assert size is not None, "a volume without voxel size is refused"
    offset = vec3([round(o / s) for o, s in zip(info.origin_nm, size, strict=True)])
    return PrecomputedLevels(info, size, plan_levels(info, offset)[:levels], labels)


def _refusal(info: VolumeInfo, budget_bytes: int | None) -> str:
    if info.voxel_size_nm is not None:
        return ""
    return (
        "precomputed states voxel sizes in nanometres, and the volume states none; set inference.voxel_size_nm=[z,y,x]."
    )


PRECOMPUTED = ChunkedFormat(
    ".precomputed", _planned, stamp_of=lambda folder: stamp_in(folder / STAMP_FILE), refusal=_refusal
)
