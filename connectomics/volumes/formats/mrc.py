"""MRC volumes (``.mrc``, ``.rec``, ``.map``), memory-mapped; needs the extra ``mrc``; for ``opening``."""

from __future__ import annotations

import contextlib
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.installation import install_command
from connectomics.volumes.formats.mapped import MappedArray
from connectomics.volumes.source import (
    READ_ERRORS,
    Source,
    refuse_inner,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, info_of, layout_of
from connectomics.volumes.volume import Nanometres
from connectomics.volumes.watched import WatchedFiles

IMOD_STAMP = 1146047817
IMOD_SIGNED_BYTES = 1
IMOD_HALF_BYTES = 16
MODE_AT, EXTENDED_BYTES_AT, MAP_AT, BYTE_ORDER_AT = 12, 92, 208, 212
MODES = (0, 1, 2, 3, 4, 6, 12, 101)
NM_PER_ANGSTROM = 0.1
BIG_ENDIAN_STAMP = 0x11
"""Offsets of mode, extended header's length, the word MAP and machine stamp, whose first byte tells the order."""
IMOD_FIELDS = slice(10, 12)
"""Where IMOD's stamp and flags stand among the integers of the header field ``extra2``."""


def open_mrc(source: Source) -> StoredVolume:
    """Open an MRC file for lazy reading; its axes follow ``mapc``, ``mapr`` and ``maps``.

    Bytes are signed as MRC2014 says, unless IMOD wrote the file and says that they are not, or the header's maximum
    is one that signed bytes do not reach.

    Raises
    ------
    VolumeError
        If the file is damaged or cut short, is of a mode that holds no plain numbers, is a stack of volumes, or the
        package mrcfile is missing.
    """
    refuse_inner(source)
    try:
        import mrcfile
    except ImportError as error:
        raise VolumeError(
            f"cannot open {source.uri}: reading MRC needs the package mrcfile: {install_command('mrc')}"
        ) from error
    try:
        with contextlib.ExitStack() as opened:
            watched = WatchedFiles(source.path)
            named = _require_extended_header(source.path)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # about the extended header, and the word MAP that old programs left out
                header = opened.enter_context(mrcfile.open(source.path, header_only=True, permissive=not named)).header
            shape = mrcfile.utils.data_shape_from_header(header)
            dtype = _dtype(source, header, mrcfile.utils.data_dtype_from_header(header))
            layout = layout_of(source, shape, _letters(header, len(shape)), "mapc, mapr and maps of its header")
            stream = opened.enter_context(source.path.open("rb"))
            offset = header.nbytes + max(0, int(header.nsymbt))
            if not named:
                _require_size(source.path, offset + math.prod(shape) * dtype.itemsize)
            array = MappedArray(stream, dtype, shape, offset)
            found = {"voxel size": "cella over mx, my and mz of its header"}
            info = info_of(source, layout, dtype, array.chunk, voxel_size_nm=_voxel_size(header), found=found)
            release = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "MRC", error) from error
    return StoredVolume(source, info, layout, fetch=array.fetch, watched=watched, release=release)


def _require_extended_header(path: Path) -> bool:
    """Whether the header has the word MAP, which old programs left out.

    Raises ValueError if the file is shorter than its extended header: mrcfile would make room for it before it looks.
    """
    with path.open("rb") as stream:
        block = stream.read(BYTE_ORDER_AT + 1)
    if len(block) > BYTE_ORDER_AT:
        orders = "><" if block[BYTE_ORDER_AT] == BIG_ENDIAN_STAMP else "<>"
        known = (o for o in orders if struct.unpack_from(f"{o}i", block, MODE_AT)[0] in MODES)
        (extended,) = struct.unpack_from(f"{next(known, orders[0])}i", block, EXTENDED_BYTES_AT)
        if extended > path.stat().st_size:
            raise ValueError(f"its header promises an extended header of {extended} bytes, more than the file has")
    return block[MAP_AT : MAP_AT + 3] == b"MAP"


def _require_size(path: Path, expected: int) -> None:
    """Refuse a file without the word MAP, by a ValueError, unless its size is what its header promises."""
    found = path.stat().st_size
    if found != expected:
        raise ValueError(f"its header lacks the word MAP and promises {expected} bytes, while the file has {found}")


def _letters(header: Any, dimensions: int) -> str:
    """Stored axes: sections, rows and columns; before them the number in a stack of volumes."""
    order = [int(header.maps), int(header.mapr), int(header.mapc)]
    letters = "".join("xyz"[i - 1] for i in order) if sorted(order) == [1, 2, 3] else "zyx"
    return {2: "yx", 3: letters}.get(dimensions, f"?{letters}")


def _dtype(source: Source, header: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    stamp, flags = (int(n) for n in np.frombuffer(header.extra2.tobytes(), header.mode.dtype)[IMOD_FIELDS])
    if int(header.mode) != 0:
        return dtype
    if stamp != IMOD_STAMP:
        return _by_extremes(source, float(header.dmin), float(header.dmax))
    if flags & IMOD_HALF_BYTES:
        raise VolumeError(
            f"{source.uri}: two voxels of 4 bit in a byte cannot be read; convert them with IMOD's newstack -mode 0."
        )
    return dtype if flags & IMOD_SIGNED_BYTES else np.dtype(np.uint8)


def _by_extremes(source: Source, least: float, most: float) -> np.dtype[Any]:
    """Signed bytes, as MRC2014 says, unless the header's maximum is one that only unsigned ones reach.

    A maximum below the minimum says that neither is known.
    """
    if least < 0 and most > np.iinfo(np.int8).max:
        raise VolumeError(
            f"{source.uri}: its header says that bytes reach from {least:g} to {most:g}, which neither signed nor "
            "unsigned ones do; write the right minimum and maximum (mrcfile's update_header_stats, IMOD's alterheader)."
        )
    return np.dtype(np.uint8) if least <= most and most > np.iinfo(np.int8).max else np.dtype(np.int8)


def _voxel_size(header: Any) -> Nanometres | None:
    """Cell size over sampling in ångström, as (z, y, x) in nanometres."""
    cell = [float(header.cella[letter]) for letter in "zyx"]
    sampling = [int(header[f"m{letter}"]) for letter in "zyx"]
    if min(sampling) < 1:
        return None
    return three_positive(np.divide(cell, sampling), NM_PER_ANGSTROM)
