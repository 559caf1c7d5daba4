"""A format of another package, read and written: a line of JSON, then the voxels (z, y, x), or (c, z, y, x)."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.geometry import Box
from connectomics.stages.output.formats.contract import FileFormat, WholeVolume
from connectomics.stages.output.size import FILE_BYTES, STAMP_BYTES, OutputSize
from connectomics.stages.output.slabs import sections
from connectomics.volumes.formats.mapped import MappedArray
from connectomics.volumes.input_formats import InputFormat
from connectomics.volumes.source import READ_ERRORS, Source, file_identity, refuse_inner, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of
from connectomics.volumes.volume import VolumeInfo

LONGEST_HEADER = 1 << 20


def open_voxels(source: Source) -> StoredVolume:
    """Open a volume for lazy reading."""
    refuse_inner(source)
    try:
        with contextlib.ExitStack() as opened:
            identity = file_identity(source.path)
            stream = opened.enter_context(source.path.open("rb"))
            header = json.loads(stream.readline(LONGEST_HEADER))
            array = MappedArray(stream, np.dtype(header["dtype"]), header["shape"], stream.tell())
            layout = layout_of(source, header["shape"], None)
            size = header.get("voxel_size_nm")
            info = info_of(source, layout, np.dtype(header["dtype"]), array.chunk, voxel_size_nm=size and tuple(size))
            release = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "voxels", error) from error
    return StoredVolume(source, info, layout, fetch=array.fetch, identity=lambda: identity, release=release)


def _write(volume: WholeVolume, path: Path, stamp: dict[str, object]) -> None:
    info = volume.info
    header: dict[str, Any] = {
        "dtype": info.dtype.str,
        "shape": info.shape if info.channels > 1 else info.extent,
        "stamp": stamp,
    }
    if info.voxel_size_nm is not None:
        header["voxel_size_nm"] = info.voxel_size_nm
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for channel in range(info.channels):
            for z in range(info.extent[0]):
                box = Box((z, 0, 0), (z + 1, *info.extent[1:]))
                file.write(volume.read(box)[channel].tobytes())


def _stamp_of(path: Path) -> object:
    with path.open("rb") as file:
        return json.loads(file.readline(LONGEST_HEADER))["stamp"]


def _largest_size(info: VolumeInfo) -> OutputSize:
    return OutputSize(math.prod(info.shape) * info.dtype.itemsize + STAMP_BYTES + FILE_BYTES, 1)


INPUT = InputFormat((".voxels",), f"{__name__}:open_voxels")
OUTPUT = FileFormat(".voxels", _write, open_voxels, sections, stamp_of=_stamp_of, largest_size=_largest_size)
