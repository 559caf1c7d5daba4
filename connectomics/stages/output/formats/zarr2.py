"""The output format ``zarr2``: OME-Zarr 0.4, which is Zarr v2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.geometry import Box, Vec3
from connectomics.stages.output.formats.chunk_files import ChunkFiles
from connectomics.stages.output.formats.contract import UNIT_BYTES, ChunkedFormat, stamp_in
from connectomics.stages.output.formats.level_array import LevelArray, open_driver
from connectomics.stages.output.formats.zarr import STAMP, info_of_level
from connectomics.stages.output.size import OutputSize
from connectomics.volumes.formats.chunked import touched
from connectomics.volumes.levels import Level, multiscale, plan_levels
from connectomics.volumes.store import ATTRIBUTES
from connectomics.volumes.volume import VolumeInfo


@dataclass(frozen=True, slots=True)
class Zarr2Levels:
    """OME-Zarr 0.4, for programs that do not read 0.5: Zarr v2 has no shards, so chunks are large and files."""

    info: VolumeInfo
    levels: tuple[Level, ...]
    unit_bytes: int = UNIT_BYTES

    def files(self) -> dict[str, str]:
        """The group and its arrays."""
        arrays = [_array_metadata(info_of_level(self.info, v), self._chunks.chunk(v)) for v in self.levels]
        texts = {f"{k}/.zarray": json.dumps(metadata, indent=2) for k, metadata in enumerate(arrays)}
        return {".zgroup": '{"zarr_format": 2}'} | texts

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing; the folders of its chunks are called by channel, z and y."""
        place, chunk = folder / str(level), self._chunks.chunk(self.levels[level])
        channel = ["0"] if self.info.channels > 1 else []

        def folders(box: Box) -> set[Path]:
            return {place.joinpath(*channel, str(z), str(y)) for z, y, _ in touched(box, chunk)}

        unit = self._chunks.unit(self.levels[level])
        return LevelArray(folder, open_driver("zarr", place), unit, folders=folders)

    def level_size(self, level: Level) -> OutputSize:
        """Upper bound of a level with its metadata."""
        return self._chunks.size(level)

    def stamped(self, stamp: dict[str, object], name: str) -> tuple[str, str]:
        """The group's attributes."""
        image = multiscale(name, self.info, self.levels) | {"version": "0.4"}
        attributes = {"multiscales": [image], ATTRIBUTES: {STAMP: stamp}}
        return ".zattrs", json.dumps(attributes, indent=2, allow_nan=False)

    @property
    def _chunks(self) -> ChunkFiles:
        return ChunkFiles(self.info.chunk_shape, self.info.channels * self.info.dtype.itemsize, self.unit_bytes)


def _array_metadata(info: VolumeInfo, chunk: Vec3) -> dict[str, object]:
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


def _planned(info: VolumeInfo, block_shape: Vec3, *, labels: bool, levels: int | None) -> Zarr2Levels:
    return Zarr2Levels(info, plan_levels(info)[:levels])


ZARR2 = ChunkedFormat(".v2.zarr", _planned, stamp_of=lambda folder: stamp_in(folder / ".zattrs", ATTRIBUTES, STAMP))
