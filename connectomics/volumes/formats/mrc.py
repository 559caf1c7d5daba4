"""MRC volumes (also RELION's ``.mrcs`` and IMOD's endings), memory-mapped; needs the extra ``mrc``; for ``opening``."""

from __future__ import annotations

import contextlib
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.installation import install_command
from connectomics.volumes.mapped import MappedArray
from connectomics.volumes.source import (
    NM_PER_UNIT,
    READ_ERRORS,
    Source,
    file_identity,
    refuse_inner,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, info_of, layout_of
from connectomics.volumes.volume import Nanometres

IMOD_STAMP = 1146047817
IMOD_SIGNED_BYTES = 1
IMOD_HALF_BYTES = 16
EXTENDED_BYTES_AT, MAP_AT, BYTE_ORDER_AT = 92, 208, 212
BIG_ENDIAN_STAMP = 0x11
"""Offsets of the extended header's length, the word MAP and the machine stamp, whose first byte tells the order."""
LONGEST_AXIS, PLAIN_MODES = 1 << 22, (0, 1, 2, 6, 12)
"""What is possible in a header that nothing else marks."""
IMOD_FIELDS = slice(10, 12)
"""Where IMOD's stamp and flags stand among the integers of the header field ``extra2``."""


def open_mrc(source: Source) -> StoredVolume:
    """Open an MRC file for lazy reading; its axes follow ``mapc``, ``mapr`` and ``maps``.

    Bytes are signed as MRC2014 says, unless IMOD wrote the file and says that they are not.

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
            identity = file_identity(source.path)
            _require_extended_header(source.path)
            header = _header_without_name(source.path, mrcfile.dtypes.HEADER_DTYPE)
            if header is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about the extended header, which is not used
                    header = opened.enter_context(mrcfile.open(source.path, header_only=True)).header
            shape = mrcfile.utils.data_shape_from_header(header)
            dtype = _dtype(source, header, mrcfile.utils.data_dtype_from_header(header))
            layout = layout_of(source, shape, _letters(header, len(shape)))
            stream = opened.enter_context(source.path.open("rb"))
            array = MappedArray(stream, dtype, shape, header.nbytes + max(0, int(header.nsymbt)))
            info = info_of(source, layout, dtype, array.chunk, voxel_size_nm=_voxel_size(header))
            release = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "MRC", error) from error
    return StoredVolume(source, info, layout, fetch=array.fetch, identity=lambda: identity, release=release)


def _require_extended_header(path: Path) -> None:
    """Refuse a file that is shorter than its extended header: mrcfile would make room for it before it looks."""
    with path.open("rb") as stream:
        block = stream.read(BYTE_ORDER_AT + 1)
    if block[MAP_AT:BYTE_ORDER_AT].startswith(b"MAP") and len(block) > BYTE_ORDER_AT:
        order = ">" if block[BYTE_ORDER_AT] == BIG_ENDIAN_STAMP else "<"
        (extended,) = struct.unpack_from(f"{order}i", block, EXTENDED_BYTES_AT)
        if extended > path.stat().st_size:
            raise ValueError(f"its header promises an extended header of {extended} bytes, more than the file has")


def _header_without_name(path: Path, form: np.dtype[Any]) -> Any:
    """The header of a file without the word MAP, as IMOD before 2000 and others leave it out; None where it stands.

    The byte order is the one in which axes and mode are possible. None also where neither is, so that mrcfile
    complains.
    """
    with path.open("rb") as stream:
        block = stream.read(form.itemsize)
    if len(block) < form.itemsize or block[MAP_AT : MAP_AT + 3] == b"MAP":
        return None
    for ordered in (form.newbyteorder("<"), form.newbyteorder(">")):
        header = np.frombuffer(block, ordered).reshape(()).view(np.recarray)
        lengths = [int(header[name]) for name in ("nx", "ny", "nz")]
        if min(lengths) >= 1 and max(lengths) <= LONGEST_AXIS and int(header.mode) in PLAIN_MODES:
            return header
    return None


def _letters(header: Any, dimensions: int) -> str:
    """Stored axes: sections, rows and columns; before them the number in a stack of volumes."""
    order = [int(header.maps), int(header.mapr), int(header.mapc)]
    letters = "".join("xyz"[i - 1] for i in order) if sorted(order) == [1, 2, 3] else "zyx"
    return {2: "yx", 3: letters}.get(dimensions, f"?{letters}")


def _dtype(source: Source, header: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    stamp, flags = (int(n) for n in np.frombuffer(header.extra2.tobytes(), header.mode.dtype)[IMOD_FIELDS])
    if stamp != IMOD_STAMP or int(header.mode) != 0:
        return dtype
    if flags & IMOD_HALF_BYTES:
        raise VolumeError(
            f"{source.uri}: two voxels of 4 bit in a byte cannot be read; convert them with IMOD's newstack -mode 0."
        )
    return dtype if flags & IMOD_SIGNED_BYTES else np.dtype(np.uint8)


def _voxel_size(header: Any) -> Nanometres | None:
    """Cell size over sampling in ångström, as (z, y, x) in nanometres."""
    cell = [float(header.cella[letter]) for letter in "zyx"]
    sampling = [int(header[f"m{letter}"]) for letter in "zyx"]
    if min(sampling) < 1:
        return None
    return three_positive(np.divide(cell, sampling), NM_PER_UNIT["angstrom"])
