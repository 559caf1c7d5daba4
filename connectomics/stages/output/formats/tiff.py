"""The output format ``tiff``: a page for each section, in tiles where sections are large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from connectomics.core.geometry import BlockGrid
from connectomics.stages.output.formats.contract import FileFormat, WholeVolume
from connectomics.stages.output.size import FILE_BYTES, STAMP_BYTES, OutputSize, cells, packed
from connectomics.stages.output.slabs import fits_slab, section_bytes, sections
from connectomics.volumes.formats.tiff import open_tiff
from connectomics.volumes.volume import Array, VolumeInfo

STAMP = "connectomics"
TILE = 512
CLASSIC_TIFF_BYTES = 3_500_000_000
STRIP_BYTES = 1 << 16  # of strips, at least, where a row is not longer


def _is_tiled(info: VolumeInfo) -> bool:
    return not fits_slab(section_bytes(info))


def _sections(source: WholeVolume, channel: int) -> Iterator[Array]:
    for slab in sections(source.info):
        yield from source.read(slab)[channel]


def _tiles(source: WholeVolume, channel: int) -> Iterator[Array]:
    """Tiles of each section in raster order, those at the far faces padded; read by rows of tiles that fit."""
    info = source.info
    width = info.extent[2] if fits_slab(section_bytes(info) // info.extent[1] * TILE) else TILE
    for row in BlockGrid(info.extent, (1, TILE, width)):
        voxels = source.read(row.core)[channel, 0]
        for x in range(0, voxels.shape[1], TILE):
            tile = np.zeros((TILE, TILE), info.dtype)
            part = voxels[:, x : x + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _write_tiff(source: WholeVolume, path: Path, stamp: dict[str, object]) -> None:
    info = source.info
    several = info.channels > 1
    raw_bytes = int(np.prod(info.shape)) * info.dtype.itemsize
    metadata: dict[str, object] = {"axes": "CZYX" if several else "ZYX", STAMP: stamp}
    if info.voxel_size_nm is not None:
        metadata["voxel_size_nm"] = list(info.voxel_size_nm)
    tiled = _is_tiled(info)
    parts = _tiles if tiled else _sections
    with tifffile.TiffWriter(path, bigtiff=raw_bytes > CLASSIC_TIFF_BYTES) as writer:
        writer.write(
            (part for channel in range(info.channels) for part in parts(source, channel)),
            shape=info.shape if several else info.extent,
            dtype=info.dtype,
            photometric="minisblack",
            compression="zlib",
            tile=(TILE, TILE) if tiled else None,
            metadata=metadata,
        )


def _stamp_of(path: Path) -> object:
    with tifffile.TiffFile(path) as tif:
        description: Any = json.loads(tif.pages.first.description)
        return description[STAMP]


def _largest_size(info: VolumeInfo) -> OutputSize:
    pages = info.extent[0] * info.channels
    plane = section_bytes(info) // info.channels
    parts = min(info.extent[1], -(-plane // STRIP_BYTES) + 1)
    if _is_tiled(info):
        parts = cells((1, *info.extent[1:]), (1, TILE, TILE))
        plane = parts * TILE * TILE * info.dtype.itemsize
    return OutputSize(packed(pages * plane, pages * parts) + pages * FILE_BYTES + STAMP_BYTES, 1)


TIFF = FileFormat(".tif", _write_tiff, open_tiff, sections, stamp_of=_stamp_of, largest_size=_largest_size)
