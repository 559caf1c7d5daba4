"""Which objects stay, judged by their rows, and what is painted for them; on whole objects, after joining.

``runs.decoding_run`` applies it to the tables that ``merge`` leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from connectomics.objects.mapped_tables import changeable, flush, mapped, table
from connectomics.objects.merge import AT_ONCE, FIRST_ID, IDS, OBJECTS, spans
from connectomics.objects.pieces import PIECE, merged, together
from connectomics.volumes.volume import Array

NUMBERS = "numbers.npy"


class Rule(Protocol):
    """Which objects stay, and what is painted for them."""

    @property
    def largest(self) -> int | None: ...

    @property
    def by_value(self) -> bool:
        """Whether what is painted does not depend on the objects' ids."""
        ...

    def fits(self, rows: Array) -> Array:
        """Which of the objects fulfil all but ``largest``; bool [n]."""
        ...

    def paint(self, rows: Array, ids: Array) -> Array:
        """What is painted for the objects, u8 [n]."""
        ...


@dataclass(frozen=True, slots=True)
class Selection:
    """What an object must be to stay.

    Parameters
    ----------
    minimum_voxels, maximum_voxels
        Its size, both included; None for any.
    off_border
        Whether it must not touch the volume's border; an axis of one voxel has none, and of objects in sections
        z has none.
    largest
        Of all that stay so far, how many: the largest, of equal ones those with the lower id. None for all.
    by_value
        Whether an object's value is painted, not its id.
    """

    minimum_voxels: int = 0
    maximum_voxels: int | None = None
    off_border: bool = False
    largest: int | None = None
    by_value: bool = False

    @property
    def active(self) -> bool:
        """Whether any object may be dropped."""
        sized = self.minimum_voxels > 0 or self.maximum_voxels is not None
        return sized or self.off_border or self.largest is not None

    def fits(self, rows: Array) -> Array:
        """Which of the objects fulfil all but ``largest``; bool [n]."""
        fits: Array = rows["voxels"] >= self.minimum_voxels
        if self.maximum_voxels is not None:
            fits &= rows["voxels"] <= self.maximum_voxels
        if self.off_border:
            fits &= ~rows["border"]
        return fits

    def paint(self, rows: Array, ids: Array) -> Array:
        """Values or ids, u8 [n]."""
        painted: Array = rows["value"] if self.by_value else ids
        return painted


@dataclass(frozen=True, slots=True)
class Holes:
    """Components of the background that lie within one object and are painted like it.

    A hole does not touch the volume's border, and all voxels beside it that are not background are of one object.
    """

    largest: int | None = None
    by_value: bool = True

    def fits(self, rows: Array) -> Array:
        """Which are holes; bool [n]."""
        fits: Array = ~rows["border"] & (rows["low"] == rows["high"])
        return fits

    def paint(self, rows: Array, ids: Array) -> Array:
        """The objects around them, u8 [n]."""
        around: Array = rows["low"]
        return around


def select(folder: Path, count: int, rule: Rule) -> tuple[int, int]:
    """Drop objects from the tables in ``folder``; those that stay keep their number.

    Afterwards ``ids.npy`` holds what is painted for each piece (0 for dropped ones), ``objects.npy`` the rows of the
    objects that stay, ``numbers.npy`` u8 what is painted for each row.

    Returns
    -------
    kept, largest
        Number of objects that stay, and the largest number that is painted.
    """
    objects = np.load(folder / OBJECTS, mmap_mode="r")
    painted = table(folder / "scratch_painted", count, np.uint64)
    floor, ties = _limit(objects, count, rule)
    left = folder / "scratch_left"
    kept = largest = 0
    with left.open("wb") as rows_file, (folder / "scratch_numbers").open("wb") as numbers_file:
        for span in spans(count, AT_ONCE):
            rows = objects[span]
            fits = rule.fits(rows) & (rows["voxels"] >= floor)
            if rule.largest is not None:
                at_limit = np.flatnonzero(fits & (rows["voxels"] == floor))
                fits[at_limit[ties:]] = False
                ties = max(0, ties - len(at_limit))
            numbers = np.arange(span.start, span.stop, dtype=np.uint64) + np.uint64(FIRST_ID)
            painted[span] = np.where(fits, rule.paint(rows, numbers), 0)
            rows_file.write(rows[fits].tobytes())
            numbers_file.write(painted[span][fits].tobytes())
            kept += int(np.count_nonzero(fits))
            largest = max(largest, int(painted[span].max()))
    ids = changeable(folder / IDS)
    for span in spans(len(ids) if count else 0, AT_ONCE):
        ids[span] = painted[ids[span] - np.uint64(FIRST_ID)]
    flush(ids)
    del objects
    _kept(left, folder / OBJECTS, kept, PIECE)
    _kept(folder / "scratch_numbers", folder / NUMBERS, kept, np.dtype(np.uint64))
    (folder / "scratch_painted").unlink()
    return kept, largest


def _limit(objects: Array, count: int, rule: Rule) -> tuple[int, int]:
    """The size of the smallest object among the largest, and how many of that size stay."""
    wanted = rule.largest
    if wanted is None or wanted == 0:
        return (0, 0) if wanted is None else (np.iinfo(np.int64).max, 0)
    top = np.zeros(0, np.uint64)
    for span in spans(count, AT_ONCE):
        rows = objects[span]
        top = np.concatenate([top, rows["voxels"][rule.fits(rows)]])
        if len(top) > wanted:
            top = np.partition(top, len(top) - wanted)[len(top) - wanted :]
    if len(top) < wanted:
        return 0, 0
    return int(top.min()), int(np.count_nonzero(top == top.min()))


def _kept(scratch: Path, path: Path, count: int, kind: np.dtype[Any]) -> None:
    """Make a table of what was written to a scratch file."""
    final = table(path, count, kind)
    source = mapped(scratch, count, kind)
    for span in spans(count, AT_ONCE):
        final[span] = source[span]
    flush(final)
    scratch.unlink()


def absorb(tables: Path, count: int, holes: Path, found: int) -> None:
    """Add ``found`` filled holes, selected by ``Holes``, to the rows of the ``count`` objects they were filled with.

    Both are tables; the objects', whose numbers ascend, is changed in place.
    """
    objects = changeable(tables / OBJECTS)
    numbers = np.load(tables / NUMBERS, mmap_mode="r")[:count]
    rows_of, around = np.load(holes / OBJECTS, mmap_mode="r"), np.load(holes / NUMBERS, mmap_mode="r")
    for span in spans(found, AT_ONCE):
        rows = np.array(rows_of[span])
        rows["value"] = np.iinfo(np.uint64).max  # a background has none
        rows, at = merged(rows, np.searchsorted(numbers, around[span]))
        objects[at] = together(objects[at], rows)
    flush(objects)


def inherit(tables: Path, count: int, before: Path, known: int) -> None:
    """Give ``count`` objects the values that objects of the same numbers have in other tables, in place.

    The others, whose numbers ascend, are ``known`` objects, among them all of these.
    """
    objects, numbers = changeable(tables / OBJECTS), np.load(tables / NUMBERS, mmap_mode="r")
    older, named = np.load(before / OBJECTS, mmap_mode="r"), np.load(before / NUMBERS, mmap_mode="r")[:known]
    for span in spans(count, AT_ONCE):
        objects["value"][span] = older["value"][np.searchsorted(named, numbers[span])]
    flush(objects)
