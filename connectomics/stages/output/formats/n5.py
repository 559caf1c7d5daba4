"""The output format ``n5`` as BigDataViewer and Neuroglancer read it: s0, s1, … with ``downsamplingFactors``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.geometry import Box, Vec3
from connectomics.stages.output.formats.chunk_files import ChunkFiles
from connectomics.stages.output.formats.contract import UNIT_BYTES, ChunkedFormat, stamp_in
from connectomics.stages.output.formats.level_array import LevelArray, open_driver
from connectomics.stages.output.size import OutputSize, widened
from connectomics.volumes.formats.chunked import touched
from connectomics.volumes.formats.n5 import ATTRIBUTES
from connectomics.volumes.levels import Level, plan_levels
from connectomics.volumes.volume import VolumeInfo

STAMP = "connectomics"


@dataclass(frozen=True, slots=True)
class N5Levels:
    """N5 has no shards, so chunks are large and files; channels are the slowest axis; float16 widens to float32."""

    info: VolumeInfo
    levels: tuple[Level, ...]
    unit_bytes: int = UNIT_BYTES

    def files(self) -> dict[str, str]:
        """The container and its arrays."""
        arrays = {f"s{k}/{ATTRIBUTES}": json.dumps(self._attributes(v), indent=1) for k, v in enumerate(self.levels)}
        return {ATTRIBUTES: json.dumps({"n5": "4.0.0"})} | arrays

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; the folders of its chunks are called by x, y and, with channels, z."""
        place, chunk = folder / f"s{level}", self._chunks.chunk(self.levels[level])
        depth = 3 if self.info.channels > 1 else 2

        def folders(box: Box) -> set[Path]:
            return {place.joinpath(*map(str, number[::-1][:depth])) for number in touched(box, chunk)}

        unit = self._chunks.unit(self.levels[level])
        return LevelArray(folder, open_driver("n5", place).T, unit, folders=folders)

    def level_size(self, level: Level) -> OutputSize:
        """Upper bound of a level with its metadata."""
        return self._chunks.size(level)

    def stamped(self, stamp: dict[str, object], name: str) -> tuple[str, str]:
        """The container's attributes."""
        factors = [self._factors(level) for level in self.levels]
        attributes: dict[str, object] = {"n5": "4.0.0", "name": name, "downsamplingFactors": factors, STAMP: stamp}
        if self.info.voxel_size_nm is not None:
            size, several = list(self.info.voxel_size_nm[::-1]), self.info.channels > 1
            attributes |= {
                "axes": ["x", "y", "z"] + ["c"] * several,
                "units": ["nm"] * 3 + [""] * several,
                "resolution": size + [1.0] * several,
                "pixelResolution": {"unit": "nm", "dimensions": size},
            }
        return ATTRIBUTES, json.dumps(attributes, indent=1, allow_nan=False)

    @property
    def _dtype(self) -> np.dtype[np.generic]:
        return widened(self.info.dtype)

    @property
    def _chunks(self) -> ChunkFiles:
        return ChunkFiles(self.info.chunk_shape, self.info.channels * self._dtype.itemsize, self.unit_bytes)

    def _factors(self, level: Level) -> list[int]:
        return [*level.factor[::-1], *[1] * (self.info.channels > 1)]

    def _attributes(self, level: Level) -> dict[str, object]:
        channels = [self.info.channels] * (self.info.channels > 1)
        attributes: dict[str, object] = {
            "dimensions": [*level.extent[::-1], *channels],
            "blockSize": [*self._chunks.chunk(level)[::-1], *channels],
            "dataType": self._dtype.name,
            "compression": {"type": "gzip", "level": 5, "useZlib": False},
            "downsamplingFactors": self._factors(level),
        }
        size = self.info.voxel_size_nm
        if size is not None:
            attributes["transform"] = {
                "axes": ["z", "y", "x"],
                "units": ["nm"] * 3,
                "scale": list(level.scale(size)),
                "translate": list(level.translation(size, self.info.origin_nm)),
            }
        return attributes


def _planned(info: VolumeInfo, block_shape: Vec3, *, labels: bool, levels: int | None) -> N5Levels:
    return N5Levels(info, plan_levels(info)[:levels])


N5 = ChunkedFormat(".n5", _planned, stamp_of=lambda folder: stamp_in(folder / ATTRIBUTES, STAMP))
