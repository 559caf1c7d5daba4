"""NRRD volumes (``.nrrd``, ``.nhdr``), as nnU-Net's SimpleITKIO reads them, and pynrrd; for ``opening``.

Raw voxels are memory-mapped; packed ones are unpacked once into an anonymous temporary file.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.medical.raw_array import RawArray, beside, text_before, watched_files
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import READ_ERRORS, Source, refuse_inner, three_positive, unreadable
from connectomics.volumes.stored import Layout, StoredVolume, info_of, layout_of, native_dtype, row_chunk
from connectomics.volumes.volume import Nanometres, Spacing

TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
PACKINGS = {
    "raw": "raw",
    **dict.fromkeys(("txt", "text", "ascii"), "text"),
    **dict.fromkeys(("gz", "gzip"), "gzip"),
    **dict.fromkeys(("bz2", "bzip2"), "bzip2"),
}
SPACE = ("domain", "space")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?nan", re.IGNORECASE)


def open_nrrd(source: Source) -> StoredVolume:
    """Open an NRRD file for lazy reading; axes that are neither of space nor of time are channels.

    Raises
    ------
    VolumeError
        If the header is damaged, the voxels are cut short, in several files or of a type that is no number, or an
        axis is one of time.
    """
    refuse_inner(source)
    try:
        with contextlib.ExitStack() as opened:
            fields, header_bytes = _fields(source.path)
            array = _array(source, fields, header_bytes)
            watched = watched_files(source, array)
            native_dtype(source, array.dtype)
            letters = _letters(fields, len(array.shape))
            layout = layout_of(source, array.shape, letters, "kinds and space directions of its header")
            fetch = array.open(source, opened)
            chunk = row_chunk(array.shape[::-1], array.dtype.itemsize)[::-1]
            size, spacing = _frame(source, fields, layout)
            info = info_of(
                source,
                layout,
                array.dtype,
                chunk,
                voxel_size_nm=size,
                spacing=spacing,
                found={"voxel size": "its header", "spacing": "its header"},
            )
            release = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "NRRD", error) from error
    return StoredVolume(
        source, info, layout, fetch=fetch, identity=lambda: watched.identity, release=release, watched=watched
    )


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of the header by their names without spaces, and the bytes that it takes."""
    lines, taken = text_before(path, lambda line: not line.strip())
    if not lines[0].startswith("NRRD000"):
        raise ValueError("it does not start with NRRD000")
    fields = {}
    for line in lines[1:]:
        name, mark, value = line.partition(": ")
        if mark and not line.startswith("#"):
            fields[name.lower().replace(" ", "")] = value.strip()
    return fields, taken


def _array(source: Source, fields: dict[str, str], header_bytes: int) -> RawArray:
    shape = tuple(int(n) for n in fields["sizes"].split())
    kind, packing = fields["type"].lower(), fields.get("encoding", "raw").lower()
    if kind not in TYPES or packing not in PACKINGS:
        raise VolumeError(
            f"{source.uri}: NRRD voxels of type {kind!r:.40}, encoding {packing!r:.40}, cannot be read; expected "
            "numbers in raw, gzip, bzip2 or text. Write it again, for example by SimpleITK's WriteImage."
        )
    order = ">" if fields.get("endian", "little").lower() == "big" else "<"
    dtype = np.dtype(order + TYPES[kind])
    if int(fields.get("dimension", len(shape))) != len(shape):
        raise ValueError(f"its header states {fields['dimension']} axes, but the sizes {shape}")
    name = fields.get("datafile")
    path = source.path if name is None else beside(source, name)
    offset = 0 if name is not None else header_bytes
    offset += _lines(path, offset, int(fields.get("lineskip", 0)))
    skip = int(fields.get("byteskip", 0))
    if skip < -1:
        raise ValueError(f"its header states byte skip: {skip}")
    if PACKINGS[packing] == "raw":
        return RawArray(path, dtype, shape, skip if skip < 0 else offset + skip)
    return RawArray(path, dtype, shape, offset, packing=PACKINGS[packing], skipped=skip)


def _lines(path: Path, offset: int, count: int) -> int:
    """The bytes of the lines that are left out behind an offset."""
    taken = 0
    with path.open("rb") as stream:
        stream.seek(offset)
        for _ in range(min(count, 10_000)):
            taken += len(stream.readline(1 << 20))
    return taken


def _letters(fields: dict[str, str], dimensions: int) -> str:
    """Stored axes, the fastest first: x, y, z in their order, t of time, c of anything else."""
    kinds = fields.get("kinds", "").lower().split()
    rows = _directions(fields)
    if len(kinds) != dimensions:
        spatial = [row is not None for row in rows] if len(rows) == dimensions else [i < 3 for i in range(dimensions)]
        kinds = ["space" if one else "list" for one in spatial]
    names = {"time": "t"} | dict.fromkeys(SPACE, "s")
    letters = "".join(names.get(kind, "c") for kind in kinds)
    for letter in "xyz":
        letters = letters.replace("s", letter, 1)
    return letters.replace("s", "?")


def _directions(fields: dict[str, str]) -> list[list[float] | None]:
    """The direction of each axis, None for one that is not of space."""
    parts = re.findall(r"\([^)]*\)|none", fields.get("spacedirections", ""), re.IGNORECASE)
    rows = [[float(n) for n in NUMBER.findall(part)] for part in parts]
    return [row if row and all(math.isfinite(n) for n in row) else None for row in rows]


def _frame(source: Source, fields: dict[str, str], layout: Layout) -> tuple[Nanometres | None, Spacing | None]:
    """Voxel size, where its unit is one of length, and spacing as SimpleITK states it."""
    rows = _directions(fields)
    if len(rows) == len(layout.stored):
        factors = _factors(source, fields, "spaceunits", max((len(row) for row in rows if row), default=0))
        lengths = [math.nan if row is None else math.hypot(*row) for row in rows]
        in_nm = [
            math.nan if row is None else math.hypot(*(n * f for n, f in zip(row, factors, strict=False) if n))
            for row in rows
        ]
    else:
        found = [float(word) for word in fields.get("spacings", "").split() if NUMBER.fullmatch(word)]
        lengths = found if len(found) == len(layout.stored) else [math.nan] * len(layout.stored)
        factors = _factors(source, fields, "units", len(layout.stored))
        in_nm = [n * f for n, f in zip(lengths, factors, strict=True)]
    return _zyx(layout.letters, in_nm), _zyx(layout.letters, lengths) or _of_section(layout.letters, lengths)


def _factors(source: Source, fields: dict[str, str], key: str, count: int) -> list[float]:
    """Nanometres in the unit of each axis; not a number where there is none."""
    units = re.findall(r'"([^"]*)"', fields.get(key, ""))
    found = [nanometres(source, unit, f"{key} of its header") for unit in units] if len(units) == count else []
    return [math.nan if factor is None else factor for factor in found] or [math.nan] * count


def _zyx(letters: str, lengths: Sequence[float]) -> Nanometres | None:
    found = dict(zip(letters, lengths, strict=True))
    return three_positive([found.get(letter, math.nan) for letter in "zyx"])


def _of_section(letters: str, lengths: Sequence[float]) -> Spacing | None:
    """The spacing of one section, as SimpleITKIO states it."""
    if "z" in letters:
        return None
    found = dict(zip(letters, lengths, strict=True))
    return three_positive([999 * max(found["y"], found["x"]), found["y"], found["x"]])
