"""Final outputs: a working store becomes HDF5, TIFF, a PNG stack or OME-Zarr, verified and stamped.

Everything is written under a temporary name, read back, compared with the store and renamed; memory holds a
slab at most. The stamp (the result key and what belongs to it) alone says what a finished output is.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
from PIL import Image

from connectomics.errors import OutputError
from connectomics.geometry import BlockGrid, Box, Vec3, pieces
from connectomics.io.atomic import put_in_place, replacing
from connectomics.io.hdf5 import DEFAULT_DATASET, open_hdf5
from connectomics.io.images import open_stack
from connectomics.io.source import READ_ERRORS, Source, reason
from connectomics.io.store import Store, stamp_of_store, stamp_store
from connectomics.io.tiff import open_tiff
from connectomics.io.volume import Array, VolumeInfo, VolumeReader

FORMATS = ("h5", "tiff", "png", "zarr")
STAMP = "connectomics"
STAMP_FILE = "connectomics.json"
SLAB_BYTES = 64 << 20
EXPORT_COPIES = 4  # of a slab: as stored, as written, encoded, compared
CLASSIC_TIFF_BYTES = 3_500_000_000


def export_path(folder: Path, stem: str, format: str) -> Path:
    """The final name of an output.

    Examples
    --------
    >>> export_path(Path("out"), "a_seg", "tiff").as_posix()
    'out/a_seg.tif'
    """
    return folder / (stem + {"h5": ".h5", "tiff": ".tif", "png": "_png", "zarr": ".zarr"}[_known(format)])


def require_exportable(info: VolumeInfo, path: Path, format: str) -> None:
    """Make sure that ``format`` can hold such a volume; worth asking before hours of computing.

    Raises
    ------
    OutputError
        Saying which formats can.
    """
    labels = info.channels == 1 and info.dtype in (np.uint8, np.uint16)
    if _known(format) == "png" and not labels:
        raise OutputError(
            f"{path}: png holds one channel of uint8 or uint16, not {info.channels} of {info.dtype}; use "
            "h5, tiff or zarr."
        )


def export_volume(source: Store, path: Path, format: str, stamp: dict[str, object]) -> None:
    """Write the store as its final output, verified, under a name that appears only when complete.

    Parameters
    ----------
    source
        The complete working store. With format "zarr" it is consumed, being renamed to
        ``path``, so this comes last.
    path
        Final name, see ``export_path``; what stands there is replaced.
    format
        One of ``FORMATS``.
    stamp
        JSON-able facts that ``read_stamp`` gives back.

    Raises
    ------
    OutputError
        If the format cannot hold the volume, the storage refuses, or reading back gives other voxels.
    """
    require_exportable(source.info, path, format)
    try:
        if format == "zarr":
            _finish_zarr(source, path, stamp)
            return
        write, reopen = _FILES[format]
        with replacing(path) as temporary:
            write(source, temporary, stamp)
            _verify(source, reopen(Source(str(temporary), temporary, axes=_axes(source.info))), path)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run "
            f"again; the computed blocks are kept in {source.path}."
        ) from error


def read_stamp(path: Path, format: str) -> dict[str, object] | None:
    """The stamp of a finished output, or None where the output or its stamp is absent or unreadable."""
    readers: dict[str, Callable[[Path], object]] = {
        "h5": _hdf5_stamp,
        "tiff": _tiff_stamp,
        "png": lambda folder: json.loads((folder / STAMP_FILE).read_text()),
        "zarr": stamp_of_store,
    }
    try:
        stamp = readers[_known(format)](path)
    except READ_ERRORS:
        return None
    return stamp if isinstance(stamp, dict) else None


def _known(format: str) -> str:
    if format not in FORMATS:
        raise OutputError(f"unknown output format {format!r}; known are {', '.join(FORMATS)}.")
    return format


def _axes(info: VolumeInfo) -> str:
    return "zyx" if info.channels == 1 else "czyx"


def _planes(info: VolumeInfo) -> Iterator[Box]:
    """Slabs of whole sections, as deep as a chunk unless that is too much memory."""
    _, height, width = info.extent
    section_bytes = info.channels * height * width * info.dtype.itemsize
    depth = max(1, min(info.chunk_shape[0], SLAB_BYTES // section_bytes))
    return (block.core for block in BlockGrid(info.extent, (depth, height, width)))


def exporting_bytes(extent: Vec3, voxel_bytes: int, formats: Sequence[str]) -> int:
    """Most memory that writing and comparing exports takes; PNG and TIFF pages are written as whole sections.

    The working store becomes the Zarr output as it is.
    """
    if not set(formats) - {"zarr"}:
        return 0
    section = extent[1] * extent[2] * voxel_bytes
    least = section if {"tiff", "png"} & set(formats) else 0
    return EXPORT_COPIES * min(extent[0] * section, max(SLAB_BYTES, least))


def _slabs(info: VolumeInfo) -> Iterator[Box]:
    """Whole sections as of ``_planes``, cut where one alone is too much memory."""
    most = SLAB_BYTES // (info.channels * info.dtype.itemsize)
    for plane in _planes(info):
        yield from pieces(plane, (plane.shape[0], *info.chunk_shape[1:]), most)


def _sections(source: Store, channel: int) -> Iterator[Array]:
    for slab in _planes(source.info):
        yield from source.read(slab)[channel]


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
            for block in BlockGrid(info.extent, source.shard_shape):
                voxels = source.read(block.core)
                dataset[(..., *block.core.slices)] = voxels if several else voxels[0]
                sink.require_written()
        sink.require_written()


def _write_tiff(source: Store, path: Path, stamp: dict[str, object]) -> None:
    info = source.info
    several = info.channels > 1
    raw_bytes = int(np.prod(info.shape)) * info.dtype.itemsize
    metadata: dict[str, object] = {"axes": _axes(info).upper(), STAMP: stamp}
    if info.voxel_size_nm is not None:
        metadata["voxel_size_nm"] = list(info.voxel_size_nm)
    pages = (page for channel in range(info.channels) for page in _sections(source, channel))
    with tifffile.TiffWriter(path, bigtiff=raw_bytes > CLASSIC_TIFF_BYTES) as writer:
        writer.write(
            pages,
            shape=info.shape if several else info.extent,
            dtype=info.dtype,
            photometric="minisblack",
            compression="zlib",
            metadata=metadata,
        )


def _write_png(source: Store, path: Path, stamp: dict[str, object]) -> None:
    path.mkdir()
    digits = max(4, len(str(source.info.extent[0] - 1)))
    for z, section in enumerate(_sections(source, 0)):
        Image.fromarray(section).save(path / f"{z:0{digits}}.png", compress_level=3)
    (path / STAMP_FILE).write_text(json.dumps(stamp, allow_nan=False))


_FILES: dict[str, tuple[Callable[[Store, Path, dict[str, object]], None], Callable[[Source], VolumeReader]]] = {
    "h5": (_write_hdf5, open_hdf5),
    "tiff": (_write_tiff, open_tiff),
    "png": (_write_png, open_stack),
}


def _verify(source: Store, written: VolumeReader, path: Path) -> None:
    """Compare every voxel, bit for bit, with the store."""
    try:
        expected = (source.info.shape, source.info.dtype)
        if (written.info.shape, written.info.dtype) != expected:
            raise OutputError(f"{path} reads back as {written.info.shape} {written.info.dtype}, expected {expected}.")
        for slab in _slabs(source.info):
            ours, theirs = (volume.read(slab).view(np.uint8) for volume in (source, written))
            if not np.array_equal(ours, theirs):
                raise OutputError(
                    f"{path} reads back with other voxels in {slab.start} to {slab.stop} than were "
                    f"written; check the disk and run again, the computed blocks are kept in {source.path}."
                )
    finally:
        written.close()


def _finish_zarr(source: Store, path: Path, stamp: dict[str, object]) -> None:
    """Make the store itself the output: stamp its attributes, then rename its folder."""
    source.close()
    stamp_store(source.path, stamp, path.stem)
    put_in_place(source.path, path)


def _hdf5_stamp(path: Path) -> object:
    with h5py.File(path, "r", locking="best-effort") as file:
        return json.loads(file.attrs[STAMP])


def _tiff_stamp(path: Path) -> object:
    with tifffile.TiffFile(path) as tif:
        description: Any = json.loads(tif.pages.first.description)
        return description[STAMP]
