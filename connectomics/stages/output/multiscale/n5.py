"""N5 pyramids as BigDataViewer and Neuroglancer read them: arrays s0, s1, … with ``downsamplingFactors``, x first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.files import replacing, write_text
from connectomics.core.geometry import Vec3
from connectomics.stages.output.multiscale.contract import CHUNK_BYTES, UNIT_BYTES, LevelArray, open_driver
from connectomics.volumes.formats.n5 import ATTRIBUTES
from connectomics.volumes.levels import Level, grown
from connectomics.volumes.volume import VolumeInfo

STAMP = "connectomics"


@dataclass(frozen=True, slots=True)
class N5Levels:
    """N5 has no shards, so chunks are large and files; channels are the slowest axis; float16 widens to float32.

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
        """Make the container and its arrays."""
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / ATTRIBUTES).write_text(json.dumps({"n5": "4.0.0"}))
            for k, level in enumerate(self.levels):
                (temporary / f"s{k}").mkdir()
                (temporary / f"s{k}" / ATTRIBUTES).write_text(json.dumps(self._attributes(level), indent=1))

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing."""
        extent = self.levels[level].extent
        unit = grown(self.chunk(self.levels[level]), extent, self._voxel_bytes, self.unit_bytes)
        return LevelArray(folder, open_driver("n5", folder / f"s{level}").T, unit)

    def stamp(self, folder: Path, stamp: dict[str, object], name: str) -> None:
        """Write the container's attributes."""
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
        write_text(folder / ATTRIBUTES, json.dumps(attributes, indent=1, allow_nan=False))

    @property
    def _dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.float32) if self.info.dtype == np.float16 else self.info.dtype

    @property
    def _voxel_bytes(self) -> int:
        return self.info.channels * self._dtype.itemsize

    def chunk(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the chunks of a level."""
        limit = min(CHUNK_BYTES, self.unit_bytes)
        return grown(self.info.chunk_shape, level.extent, self._voxel_bytes, limit)

    def _factors(self, level: Level) -> list[int]:
        return [*level.factor[::-1], *[1] * (self.info.channels > 1)]

    def _attributes(self, level: Level) -> dict[str, object]:
        channels = [self.info.channels] * (self.info.channels > 1)
        attributes: dict[str, object] = {
            "dimensions": [*level.extent[::-1], *channels],
            "blockSize": [*self.chunk(level)[::-1], *channels],
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


def stamp_of_n5(folder: Path) -> object:
    """What ``N5Levels.stamp`` kept; errors are those of reading files and JSON."""
    return json.loads((folder / ATTRIBUTES).read_text())[STAMP]
