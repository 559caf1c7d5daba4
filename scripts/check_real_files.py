"""Read files that other programs wrote, beside an independent reader: ``python scripts/check_real_files.py FOLDER``.

``tests/real_files.tsv`` says which files, from which public repositories, and what is right; they lie in FOLDER as
OWNER/REPOSITORY/PATH (``scripts/fetch_real_files.py`` fills it). The exit code is 1 if anything differs or nothing was
checked. With ``--fill`` the cells that are ``?`` are written, from the files and the independent readers alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from independent_readers import READERS, Array, Reading, Triple
from real_file_list import LIST, NOTHING, REFUSED, UNKNOWN, Contents, Row, digest, rows, write

from connectomics import Box, ConnectomicsError, open_volume

NOT_READ_YET: frozenset[str] = frozenset()
"""Formats of the list that the package does not read; one that is read and still stands here is a difference."""
RAW_TEXT = ("FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "DATA_LOSS", "tensorstore", "Unable to synchron")
"""Words of storage libraries that no message of ours may contain."""
MISSING = "needs the package"
"""What a message of ours says where an extra is not installed."""
ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
SAME, DIFFERS, ABSENT, UNREAD, UNCHECKED = "same", "DIFFERS", "absent", "not read yet", "not checked"


def contents_of(reading: Reading) -> Contents:
    """What a reading says, as the list writes it."""
    return Contents(
        reading.voxels.dtype.newbyteorder("=").name,
        ",".join(map(str, reading.voxels.shape)),
        voxel_size_nm=_text(reading.voxel_size_nm),
        origin_nm=_text(reading.origin_nm),
        spacing=_text(reading.spacing),
        values=_sha256(reading.voxels),
    )


def _text(values: Triple | None) -> str:
    return NOTHING if values is None else ",".join(f"{value:.9g}" for value in values)


def _sha256(voxels: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _differences(expected: Contents, found: Contents) -> str:
    """What of the contents is not as expected, in words; the values only where all else is."""
    names = ["dtype", "shape", "voxel_size_nm"]
    names += [name for name in ("origin_nm", "spacing") if getattr(expected, name) != NOTHING]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    wrong = [f"{name} {ours}, expected {theirs}" for name, ours, theirs in pairs if not _agree(ours, theirs)]
    return "; ".join(wrong) or ("" if found.values == expected.values else "other values")


def _agree(first: str, second: str) -> bool:
    if first == second or "," not in first or "," not in second:
        return first == second
    return np.allclose([float(n) for n in first.split(",")], [float(n) for n in second.split(",")], rtol=1e-6, atol=0)


def _ours(path: Path, row: Row) -> Reading:
    """What this package says of the volume.

    Raises
    ------
    ConnectomicsError
        If it refuses it.
    """
    inner, axes = _stated(row)
    volume = open_volume(f"{path}::{inner}" if inner else str(path), axes=axes)
    try:
        info = volume.info
        return Reading(volume.read(Box.of_shape(info.extent)), info.voxel_size_nm, info.origin_nm, info.spacing)
    finally:
        volume.close()


def _theirs(path: Path, row: Row) -> Reading:
    return READERS[row.opening.reader](path, *_stated(row))


def _stated(row: Row) -> tuple[str | None, str | None]:
    inner, axes = (None if cell == NOTHING else cell for cell in (row.opening.inner, row.opening.axes))
    return inner, axes


def check(folder: Path, row: Row) -> tuple[str, str]:
    """Compare one file; the verdict, and a sentence where there is something to say."""
    path = folder / row.origin.repository / row.origin.path
    if not path.exists():
        return ABSENT, ""
    found, _ = digest(folder, row.origin)
    if found != row.origin.sha256:
        return DIFFERS, f"it has sha256 {found}, the list {row.origin.sha256}; fetch it again"
    reading, refusal = None, ""
    try:
        reading = _ours(path, row)
    except ConnectomicsError as error:
        refusal = str(error).replace(f"{folder}{os.sep}", "")
    except ERRORS as error:
        return DIFFERS, f"fails with {type(error).__name__}: {error}"
    if row.opening.format in NOT_READ_YET:
        if reading is None:
            return UNREAD, ""
        return DIFFERS, f"{row.opening.format} is read; take it out of NOT_READ_YET in {Path(__file__).name}"
    if row.opening.expected.startswith(REFUSED):
        return _refused_rightly(row, reading, refusal)
    if reading is None:
        return UNCHECKED if MISSING in refusal else DIFFERS, f"refused: {refusal}"
    wrong = _differences(row.contents, contents_of(reading))
    return (DIFFERS, wrong) if wrong else _beside(path, row)


def _refused_rightly(row: Row, reading: Reading | None, refusal: str) -> tuple[str, str]:
    part = row.opening.expected.removeprefix(REFUSED)
    if reading is not None:
        return DIFFERS, f"read as {reading.voxels.dtype} {reading.voxels.shape}, expected a refusal with {part!r}"
    raw = [word for word in RAW_TEXT if word in refusal.replace(row.name, "")]
    if raw:
        return DIFFERS, f"the message has text of a library ({raw[0]}): {refusal}"
    return (SAME, "") if part in refusal else (DIFFERS, f"refused without {part!r}: {refusal}")


def _beside(path: Path, row: Row) -> tuple[str, str]:
    """Read the file with the independent reader as well."""
    try:
        wrong = _differences(row.contents, contents_of(_theirs(path, row)))
    except ImportError as error:
        return UNCHECKED, f"{row.opening.reader} is missing: {error}"
    except ERRORS as error:
        return DIFFERS, f"{row.opening.reader} fails with {type(error).__name__}: {error}"
    return (DIFFERS, f"{row.opening.reader} says {wrong}") if wrong else (SAME, "")


def fill(folder: Path, found: Sequence[Row]) -> list[Row]:
    """The rows with every ``?`` replaced by what the file and its independent reader say."""
    return [_filled(folder, row) for row in found]


def _filled(folder: Path, row: Row) -> Row:
    if UNKNOWN in (row.origin.sha256, row.origin.bytes):
        sha, size = digest(folder, row.origin)
        row = dataclasses.replace(row, origin=dataclasses.replace(row.origin, sha256=sha, bytes=str(size)))
    if row.contents.values == UNKNOWN:
        nothing = Contents(*[NOTHING] * len(dataclasses.fields(Contents)))
        refused = row.opening.expected.startswith(REFUSED)
        path = folder / row.origin.repository / row.origin.path
        row = dataclasses.replace(row, contents=nothing if refused else contents_of(_theirs(path, row)))
    return row


def main(words: Sequence[str] | None = None) -> int:
    """Check all rows, print a table and a count; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", type=Path, default=LIST, help="instead of tests/real_files.tsv")
    parser.add_argument("--fill", action="store_true", help="write the cells of the list that are ?")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args(words)
    listed = rows(arguments.list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other libraries warn of what they mend
        if arguments.fill:
            write(fill(arguments.folder, listed), arguments.list)
            return 0
        counts: collections.Counter[str] = collections.Counter()
        for row in listed:
            if arguments.only in row.name:
                verdict, why = check(arguments.folder, row)
                counts[verdict] += 1
                print(f"{verdict:12}  {row.opening.format:11}  {row.name}" + (f"\n{'':14}{why}" if why else ""))
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in (SAME, DIFFERS, UNREAD, UNCHECKED, ABSENT)))
    return int(counts[DIFFERS] > 0 or counts[SAME] == 0)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
