"""Tables of objects from what ranges of keys have found: ids follow from how many objects are before each range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.objects.arrays import load, shapes, write
from connectomics.objects.mapped_tables import flush, table
from connectomics.objects.merge import AT_ONCE, FIRST_ID, IDS, OBJECTS, OFFSETS, number_by_first, spans
from connectomics.objects.numbering.cuts import Cuts
from connectomics.objects.numbering.parts import Finish, objects_of, unchanged
from connectomics.objects.numbering.ranges import PLAN_FILES, KeyRanges, prepare
from connectomics.objects.pieces import PIECE
from connectomics.objects.selection import NUMBERS, Rule, Selection, select
from connectomics.volumes.volume import Array

PartOf = Callable[[int], Path]
"""File with what ``objects_of`` gave for a range."""
EVERYTHING = Selection()


def unspread(folder: Path) -> None:
    """Leave tables as they are."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """How many objects were found, how many of them stay, and the largest number that is painted."""

    found: int
    kept: int
    largest: int


@dataclass(frozen=True, slots=True)
class Numbering:
    """How objects are made of pieces.

    Parameters
    ----------
    cuts
        The blocks.
    rule
        Which objects stay.
    by_first
        Whether objects that are joined by value are numbered by their first voxels.
    first_id
        Number of the first object.
    at_once
        Rows in memory at a time.
    finish
        See ``objects_of``.
    spread
        Called with the folder of the finished tables where what was numbered consists of pieces: makes ``ids.npy`` and
        ``offsets.npy`` those of the pieces.
    """

    cuts: Cuts
    rule: Rule = EVERYTHING
    by_first: bool = False
    first_id: int = FIRST_ID
    at_once: int = AT_ONCE
    finish: Finish = unchanged
    spread: Callable[[Path], None] = unspread

    @property
    def early(self) -> Rule:
        """What can be told of a range's objects before all are known; the rest is selected afterwards."""
        return EVERYTHING if self.by_first or self.rule.largest is not None else self.rule

    def part(self, plan: KeyRanges, number: int) -> Mapping[str, Array]:
        """The objects of a range."""
        return objects_of(self.cuts, plan, number, self.early, finish=self.finish, at_once=self.at_once)

    def write(self, plan: KeyRanges, part_of: PartOf, folder: Path) -> Numbered:
        """Write the tables of all objects from the files of all ranges.

        Leaves in ``folder``: ``offsets.npy``, where each block's pieces begin; ``ids.npy`` u8, what is painted for each
        piece, 0 for those of dropped objects; ``objects.npy``, a ``PIECE`` for each object that stays, in the order of
        ids; ``numbers.npy`` u8, what is painted for each row.
        """
        parts = [part_of(number) for number in range(len(plan))]
        kept, found = sum(shapes(part)["numbers"][0] for part in parts), self.first_id - FIRST_ID
        np.save(folder / OFFSETS, plan.offsets)
        ids = table(folder / IDS, int(plan.offsets[-1]), np.uint64)
        objects, numbers = table(folder / OBJECTS, kept, PIECE), table(folder / NUMBERS, kept, np.uint64)
        at = largest = 0
        for part in parts:
            rows, own, painted, pieces = load(part, *("rows", "numbers", "painted", "pieces"))
            if not self.early.by_value:
                own += np.uint64(found)
                painted[painted > 0] += np.uint64(found)
            objects[at : at + len(rows)], numbers[at : at + len(rows)] = rows, own
            for (begin, end), place in zip(pieces.tolist(), _places(pieces), strict=True):
                ids[begin:end] = painted[place : place + end - begin]
            largest = max(largest, int(own.max(initial=0)))
            at, found = at + len(rows), found + int(load(part, "found")[0][0])
        _follow(plan, ids, self.at_once)
        flush(ids, objects, numbers)
        del ids, objects, numbers
        found -= self.first_id - FIRST_ID
        if self.by_first:
            number_by_first(folder, found, at_once=self.at_once)
        if self.by_first or self.rule.largest is not None:
            at, largest = select(folder, found, self.rule)
        self.spread(folder)
        return Numbered(found, at, largest)

    def write_alone(self, plan: KeyRanges, folder: Path) -> Numbered:
        """Do as ``write`` does without anybody's help; what ``prepare`` has left in the folder goes away."""
        for number in range(len(plan)):
            write(folder / f"plan_part_{number}", **self.part(plan, number))
        result = self.write(plan, lambda number: folder / f"plan_part_{number}", folder)
        for path in folder.glob(PLAN_FILES):
            path.unlink()
        return result


def _places(pieces: Array) -> list[int]:
    """Where the pieces of each block begin in what a range says of its own."""
    places: list[int] = np.cumsum([0, *(pieces[:-1, 1] - pieces[:-1, 0])])[: len(pieces)].tolist()
    return places


def _follow(plan: KeyRanges, ids: Array, at_once: int) -> None:
    """Pieces that have not their object's key take what is painted for the one that has it."""
    if plan.nodes is not None:
        nodes = plan.nodes
        for span in spans(int(nodes.offsets[-1]), at_once):
            (at,) = np.nonzero(nodes.leader[span] != np.arange(span.start, span.stop))
            following = nodes.piece_of[span][at]
            ids[following] = ids[nodes.piece_of[nodes.leader[span][at]]]


def merge(
    cuts: Cuts,
    folder: Path,
    *,
    first_id: int = FIRST_ID,
    at_once: int = AT_ONCE,
    range_pieces: tuple[int, int] | None = None,
) -> int:
    """Number and measure all objects in this process, see ``Numbering``; how many they are. ``folder`` is empty."""
    plan = prepare(cuts, folder, pieces=range_pieces, at_once=at_once)
    return Numbering(cuts, first_id=first_id, at_once=at_once).write_alone(plan, folder).found
