"""MetaImage (``.mha``, ``.mhd``) and GIPL (``.gipl``) volumes, as nnU-Net's SimpleITKIO reads them; for ``opening``.

Raw voxels are memory-mapped; packed ones are unpacked once into an anonymous temporary file. Neither has a unit.
"""

from __future__ import annotations

import contextlib
import gzip
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.medical.raw_array import (
    FROM_THE_END,
    RawArray,
    beside,
    text_before,
    watched_files,
)
from connectomics.volumes.source import READ_ERRORS, Source, refuse_inner, three_positive, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, native_dtype, row_chunk
from connectomics.volumes.volume import Spacing

META_TYPES = {
    "CHAR": "i1",
    "UCHAR": "u1",
    "SHORT": "i2",
    "USHORT": "u2",
    "INT": "i4",
    "UINT": "u4",
    "LONG": "i4",
    "ULONG": "u4",
    "LONG_LONG": "i8",
    "ULONG_LONG": "u8",
    "FLOAT": "f4",
    "DOUBLE": "f8",
}
GIPL_TYPES = {1: "u1", 7: "i1", 8: "u1", 15: "i2", 16: "u2", 31: "u4", 32: "i4", 64: "f4", 65: "f8"}
GIPL_HEADER_BYTES, GIPL_MAGIC_AT, GIPL_MAGICS = 256, 252, (0xEFFFE9B0, 0x2AE389B8)
LETTERS = {2: "xy", 3: "xyz", 4: "xyzc"}
"""Stored axes, the fastest first; the fourth holds channels, as nnU-Net's SimpleITKIO takes it."""


def open_metaimage(source: Source) -> StoredVolume:
    """Open a MetaImage file for lazy reading.

    Raises
    ------
    VolumeError
        If the header is damaged, or the voxels are cut short, in several files or of a type that is no number.
    """
    refuse_inner(source)
    try:
        fields, header_bytes = _meta_fields(source)
        array, channels = _meta_array(source, fields, header_bytes)
        letters = ("c" if channels > 1 else "") + LETTERS.get(len(array.shape) - (channels > 1), "?")
        stated = fields.get("ElementSpacing", fields.get("ElementSize", "")).split()
        return _volume(source, array, letters, [float(n) for n in stated])
    except READ_ERRORS as error:
        raise unreadable(source, "MetaImage", error) from error


def open_gipl(source: Source) -> StoredVolume:
    """Open a GIPL file for lazy reading; see ``open_metaimage``."""
    refuse_inner(source)
    packed = source.path.name.lower().endswith(".gz")
    try:
        with gzip.open(source.path) if packed else source.path.open("rb") as stream:
            block = stream.read(GIPL_HEADER_BYTES)
        if len(block) < GIPL_HEADER_BYTES or struct.unpack_from(">I", block, GIPL_MAGIC_AT)[0] not in GIPL_MAGICS:
            raise ValueError("it does not start with a GIPL header")
        *sizes, kind = struct.unpack_from(">5H", block)
        if kind not in GIPL_TYPES:
            raise ValueError(f"voxels of GIPL's type {kind} are no plain numbers")
        dimensions = 2 if max(sizes[2:]) <= 1 else 3 if sizes[3] <= 1 else 4
        dtype, shape = np.dtype(f">{GIPL_TYPES[kind]}"), tuple(sizes[:dimensions])
        if packed:
            array = RawArray(source.path, dtype, shape, 0, packing="gzip", skipped=GIPL_HEADER_BYTES)
        else:
            array = RawArray(source.path, dtype, shape, GIPL_HEADER_BYTES)
        return _volume(source, array, LETTERS[dimensions], struct.unpack_from(">4f", block, 10)[:dimensions])
    except READ_ERRORS as error:
        raise unreadable(source, "GIPL", error) from error


def _volume(source: Source, array: RawArray, letters: str, spacing: Sequence[float]) -> StoredVolume:
    with contextlib.ExitStack() as opened:
        watched = watched_files(source, array)
        native_dtype(source, array.dtype)
        layout = layout_of(source, array.shape, letters, "the format's own order")
        fetch = array.open(source, opened)
        chunk = row_chunk(array.shape[::-1], array.dtype.itemsize)[::-1]
        info = info_of(source, layout, array.dtype, chunk, spacing=_spacing(spacing), found={"spacing": "its header"})
        release = opened.pop_all().close
    return StoredVolume(
        source, info, layout, fetch=fetch, identity=lambda: watched.identity, release=release, watched=watched
    )


def _spacing(found: Sequence[float]) -> Spacing | None:
    """As SimpleITKIO states it (z, y, x)."""
    if len(found) == 2:
        return three_positive([999 * max(found), found[1], found[0]])
    return three_positive(list(found[2::-1]))


def _meta_fields(source: Source) -> tuple[dict[str, str], int]:
    lines, taken = text_before(source.path, lambda line: line.replace(b" ", b"").startswith(b"ElementDataFile="))
    fields = {}
    for line in lines:
        name, mark, value = line.partition("=")
        if mark:
            fields[name.strip()] = value.strip()
    if "DimSize" not in fields or "ElementDataFile" not in fields:
        raise ValueError("its header lacks DimSize or ElementDataFile")
    return fields, taken


def _meta_array(source: Source, fields: dict[str, Any], header_bytes: int) -> tuple[RawArray, int]:
    kind = fields.get("ElementType", "").removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in META_TYPES:
        raise VolumeError(
            f"{source.uri}: voxels of type {fields.get('ElementType')!r:.40} cannot be read as intensities or labels; "
            "expected numbers. Write it again, for example by SimpleITK's WriteImage."
        )
    big = "true" in (fields.get("BinaryDataByteOrderMSB", "").lower(), fields.get("ElementByteOrderMSB", "").lower())
    dtype = np.dtype((">" if big else "<") + META_TYPES[kind])
    shape = tuple(int(n) for n in fields["DimSize"].split())
    channels = int(fields.get("ElementNumberOfChannels", 1))
    if channels > 1:
        shape = (channels, *shape)
    name = fields["ElementDataFile"]
    local = name.upper() == "LOCAL"
    path = source.path if local else beside(source, name)
    skip = int(fields.get("HeaderSize", 0))
    if skip < FROM_THE_END:
        raise ValueError(f"its header states HeaderSize = {skip}")
    offset = header_bytes if local else skip
    if fields.get("CompressedData", "").lower() == "true":
        return RawArray(path, dtype, shape, max(0, offset), packing="zlib"), channels
    packing = "raw" if fields.get("BinaryData", "true").lower() == "true" else "text"
    return RawArray(path, dtype, shape, offset, packing=packing), channels
