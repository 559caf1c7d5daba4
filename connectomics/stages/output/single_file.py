"""Exports that are a file or a stack of images: HDF5, TIFF, PNG; written and compared in pieces, for ``export``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
from PIL import Image

from connectomics.core.errors import OutputError
from connectomics.core.geometry import BlockGrid, Box
from connectomics.stages.output.multiscale.contract import STAMP_FILE
from connectomics.volumes.formats.hdf5 import DEFAULT_DATASET, open_hdf5
from connectomics.volumes.formats.images import open_stack
from connectomics.volumes.formats.tiff import open_tiff
from connectomics.volumes.levels import grown
from connectomics.volumes.source import Source
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

STAMP = "connectomics"
SLAB_BYTES = 64 << 20
"""What is held at once; of TIFF, larger sections are written in tiles."""
TILE = 512
CLASSIC_TIFF_BYTES = 3_500_000_000


def write_file(source: Store, temporary: Path, format: str, stamp: dict[str, object]) -> None:
    """Write the store as h5, tiff or png."""
    _FILES[format][0](source, temporary, stamp)


def compare_file(source: Store, temporary: Path, format: str, path: Path) -> None:
    """Read a written file back and compare every voxel, bit for bit, with the store.

    Parameters
    ----------
    path
        Its final name, for the message.

    Raises
    ------
    OutputError
        If it differs.
    """
    info = source.info
    written = _FILES[format][1](Source(str(temporary), temporary, axes=_axes(info)))
    try:
        expected = (info.shape, info.dtype)
        if (written.info.shape, written.info.dtype) != expected:
            raise OutputError(f"{path} reads back as {written.info.shape} {written.info.dtype}, expected {expected}.")
        for slab in _pieces(info) if format == "h5" else _planes(info):
            if source.read(slab).tobytes() != written.read(slab).tobytes():
                raise OutputError(
                    f"{path} reads back with other voxels in {slab.start} to {slab.stop} than were "
                    f"written; check the disk and run again, the computed blocks are kept in {source.path}."
                )
    finally:
        written.close()


def section_bytes(info: VolumeInfo) -> int:
    """Size of one section with all its channels."""
    return info.channels * info.extent[1] * info.extent[2] * info.dtype.itemsize


def _axes(info: VolumeInfo) -> str:
    return "zyx" if info.channels == 1 else "czyx"


def _pieces(info: VolumeInfo) -> Iterator[Box]:
    """Boxes of whole chunks."""
    shape = grown(info.chunk_shape, info.extent, info.channels * info.dtype.itemsize, SLAB_BYTES)
    return (block.core for block in BlockGrid(info.extent, shape))


def _planes(info: VolumeInfo) -> Iterator[Box]:
    """Whole sections, as many as a chunk is deep unless that is too much memory; parts of those that are tiled."""
    _, height, width = info.extent
    if is_tiled(info):
        return _pieces(info)
    depth = max(1, min(info.chunk_shape[0], SLAB_BYTES // section_bytes(info)))
    return (block.core for block in BlockGrid(info.extent, (depth, height, width)))


def is_tiled(info: VolumeInfo) -> bool:
    """Whether a TIFF's sections are cut into tiles."""
    return section_bytes(info) > SLAB_BYTES


def _sections(source: Store, channel: int) -> Iterator[Array]:
    for slab in _planes(source.info):
        yield from source.read(slab)[channel]


def _tiles(source: Store, channel: int) -> Iterator[Array]:
    """Tiles of each section in raster order, those at the far faces padded; read by rows of tiles that fit."""
    info = source.info
    width = info.extent[2] if section_bytes(info) // info.extent[1] * TILE <= SLAB_BYTES else TILE
    for row in BlockGrid(info.extent, (1, TILE, width)):
        voxels = source.read(row.core)[channel, 0]
        for x in range(0, voxels.shape[1], TILE):
            tile = np.zeros((TILE, TILE), info.dtype)
            part = voxels[:, x : x + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


class _Sink(io.FileIO):
    """The file below HDF5, whose library crashes the process after a failed write: it never hears of one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or remember why not and write no more."""
        rest = memoryview(data).cast("B")
        try:
            while self.error is None and rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend the file, or remember why not."""
        try:
            return super().truncate(size) if self.error is None else 0
        except OSError as error:
            self.error = error
            return 0

    def require_written(self) -> None:
        """Raise what a write met."""
        if self.error is not None:
            raise self.error


def _write_hdf5(source: Store, path: Path, stamp: dict[str, object]) -> None:
    """Pieces that are all zero are left out: HDF5 gives zeros where a chunk was never written."""
    info = source.info
    several = info.channels > 1
    shape = info.shape if several else info.extent
    chunks = tuple(min(n, c) for n, c in zip(shape, (*(1,) * several, *info.chunk_shape), strict=True))
    with _Sink(path) as sink:
        with h5py.File(sink, "w") as file:
            dataset = file.create_dataset(
                DEFAULT_DATASET,
                shape,
                info.dtype,
                chunks=chunks,
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
            for holder in (file, dataset):
                holder.attrs[STAMP] = json.dumps(stamp, allow_nan=False)
                if info.voxel_size_nm is not None:
                    holder.attrs["voxel_size_nm"] = np.array(info.voxel_size_nm)
            for box in _pieces(info):
                voxels = source.read(box)
                if voxels.any():
                    dataset[(..., *box.slices)] = voxels if several else voxels[0]
                sink.require_written()
        sink.require_written()


def _write_tiff(source: Store, path: Path, stamp: dict[str, object]) -> None:
    info = source.info
    several = info.channels > 1
    raw_bytes = int(np.prod(info.shape)) * info.dtype.itemsize
    metadata: dict[str, object] = {"axes": _axes(info).upper(), STAMP: stamp}
    if info.voxel_size_nm is not None:
        metadata["voxel_size_nm"] = list(info.voxel_size_nm)
    tiled = is_tiled(info)
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


def _write_png(source: Store, path: Path, stamp: dict[str, object]) -> None:
    path.mkdir()
    info = source.info
    digits = max(4, len(str(info.extent[0] - 1)))
    for z in range(info.extent[0]):
        section = source.read(Box((z, 0, 0), (z + 1, *info.extent[1:])))[0, 0]
        Image.fromarray(section).save(path / f"{z:0{digits}}.png", compress_level=3)
    (path / STAMP_FILE).write_text(json.dumps(stamp, allow_nan=False))


_FILES: dict[str, tuple[Callable[[Store, Path, dict[str, object]], None], Callable[[Source], VolumeReader]]] = {
    "h5": (_write_hdf5, open_hdf5),
    "tiff": (_write_tiff, open_tiff),
    "png": (_write_png, open_stack),
}


def stamp_of_hdf5(path: Path) -> object:
    """What was kept in an HDF5 file; errors are those of reading it."""
    with h5py.File(path, "r", locking="best-effort") as file:
        return json.loads(file.attrs[STAMP])


def stamp_of_tiff(path: Path) -> object:
    """What was kept in a TIFF file; errors are those of reading it."""
    with tifffile.TiffFile(path) as tif:
        description: Any = json.loads(tif.pages.first.description)
        return description[STAMP]


def stamp_of_png(folder: Path) -> object:
    """What was kept beside the images; errors are those of reading it."""
    return json.loads((folder / STAMP_FILE).read_text())
