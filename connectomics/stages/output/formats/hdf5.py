"""The output format ``h5``: one dataset ``main`` of compressed chunks."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from connectomics.stages.output.formats.contract import FileFormat, WholeVolume
from connectomics.stages.output.size import FILE_BYTES, STAMP_BYTES, OutputSize, cells, packed
from connectomics.stages.output.slabs import whole_chunks
from connectomics.volumes.formats.hdf5 import DEFAULT_DATASET, open_hdf5
from connectomics.volumes.metadata.hdf5_parts import opened_file
from connectomics.volumes.volume import VolumeInfo

STAMP = "connectomics"


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


def _write_hdf5(source: WholeVolume, path: Path, stamp: dict[str, object]) -> None:
    """Pieces that are all zero are left out: HDF5 gives zeros where a chunk was never written."""
    info = source.info
    several = info.channels > 1
    shape = info.shape if several else info.extent
    chunks = tuple(min(n, c) for n, c in zip(shape, (*(1,) * several, *info.chunk_shape), strict=True))
    with _Sink(path) as sink:
        with h5py.File(sink, "w") as file:
            dataset = file.create_dataset(
                DEFAULT_DATASET, shape, info.dtype, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True
            )
            for holder in (file, dataset):
                holder.attrs[STAMP] = json.dumps(stamp, allow_nan=False)
                if info.voxel_size_nm is not None:
                    holder.attrs["voxel_size_nm"] = np.array(info.voxel_size_nm)
            for box in whole_chunks(info):
                voxels = source.read(box)
                if voxels.any():
                    dataset[(..., *box.slices)] = voxels if several else voxels[0]
                sink.require_written()
        sink.require_written()


def _stamp_of(path: Path) -> object:
    with opened_file(path) as file:
        return json.loads(file.attrs[STAMP])


def _largest_size(info: VolumeInfo) -> OutputSize:
    chunks = cells(info.extent, info.chunk_shape) * info.channels
    chunk_bytes = math.prod(info.chunk_shape) * info.dtype.itemsize
    return OutputSize(packed(chunks * chunk_bytes, chunks) + 2 * STAMP_BYTES + FILE_BYTES, 1)


HDF5 = FileFormat(".h5", _write_hdf5, open_hdf5, whole_chunks, stamp_of=_stamp_of, largest_size=_largest_size)
