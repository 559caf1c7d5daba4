"""The list of real files, ``tests/real_files.tsv``: its columns, and the digest of what a row names.

``check_real_files.py`` and ``fetch_real_files.py`` use it. A cell is ``-`` where there is nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).resolve().parents[1] / "tests" / "real_files.tsv"
NOTHING, UNKNOWN, REFUSED = "-", "?", "refused: "


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file or store comes from."""

    repository: str  # OWNER/NAME
    commit: str
    path: str
    also: str  # further paths that belong to it, separated by blanks
    licence: str  # of the repository
    sha256: str
    bytes: str


@dataclass(frozen=True, slots=True)
class Opening:
    """How it is opened and by what other library, and whether it is ``read`` or ``refused: PART OF THE SENTENCE``."""

    inner: str  # what stands behind ::
    axes: str  # stored axes that the file does not state
    format: str
    reader: str
    expected: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What the file holds, as the other library or the format's text has it; lengths are (z, y, x)."""

    dtype: str
    shape: str  # (c, z, y, x)
    voxel_size_nm: str  # - means that the file states none
    origin_nm: str  # - means not compared: the format has no position along its own axes
    spacing: str  # as nnU-Net's reader states it, without a unit; - means not compared
    values: str  # sha256 of the voxels in C order, little-endian


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the list."""

    origin: Origin
    opening: Opening
    contents: Contents

    @property
    def name(self) -> str:
        """What is opened, as a person writes it."""
        inner = "" if self.opening.inner == NOTHING else f"::{self.opening.inner}"
        axes = "" if self.opening.axes == NOTHING else f" axes={self.opening.axes}"
        return f"{self.origin.repository}/{self.origin.path}{inner}{axes}"


def columns() -> list[str]:
    """The names in the first line."""
    return [field.name for part in (Origin, Opening, Contents) for field in dataclasses.fields(part)]


def rows(path: Path = LIST) -> list[Row]:
    """All rows of a list.

    Raises
    ------
    ValueError
        If its columns are others.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        lines = list(csv.reader(stream, delimiter="\t"))
    if lines[0] != columns() or {len(line) for line in lines} != {len(columns())}:
        raise ValueError(f"{path} has other columns than {columns()}")
    first, second = len(dataclasses.fields(Origin)), -len(dataclasses.fields(Contents))
    return [Row(Origin(*n[:first]), Opening(*n[first:second]), Contents(*n[second:])) for n in lines[1:]]


def write(found: Sequence[Row], path: Path = LIST) -> None:
    """Write a list anew."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns())
        writer.writerows(
            [*dataclasses.astuple(row.origin), *dataclasses.astuple(row.opening), *dataclasses.astuple(row.contents)]
            for row in found
        )


def paths(origin: Origin) -> list[str]:
    """The files and folders of a row, by their paths in the repository."""
    return [origin.path, *([] if origin.also == NOTHING else origin.also.split(" "))]


def digest(folder: Path, origin: Origin) -> tuple[str, int]:
    """The sha256 and bytes of a file; of several files that of the lines ``SHA256  PATH``, sorted by path."""
    found = dict(_files(folder / origin.repository, origin))
    parts = [(name, hashlib.sha256(found[name].read_bytes()).hexdigest()) for name in sorted(found)]
    total = sum(path.stat().st_size for path in found.values())
    if list(found) == [origin.path]:
        return parts[0][1], total
    listing = "".join(f"{sha}  {name}\n" for name, sha in parts)
    return hashlib.sha256(listing.encode()).hexdigest(), total


def _files(root: Path, origin: Origin) -> Iterator[tuple[str, Path]]:
    """The files of a row with their paths in the repository; links are followed."""
    for name in paths(origin):
        if (root / name).is_dir():
            for folder, _, files in os.walk(root / name, followlinks=True):
                for file in files:
                    yield str(Path(folder, file).relative_to(root)), Path(folder, file)
        else:
            yield name, root / name
