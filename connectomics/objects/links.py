"""Objects of sections linked over z: which links are made of the overlaps of all blocks, and the objects they make.

Once all blocks have counted, spans of the objects of sections find what may be linked, each for itself; links are then
chosen by one process, and what they make is numbered as pieces of blocks are, see ``numbering``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.objects.arrays import view, write
from connectomics.objects.mapped_tables import flush, mapped, table
from connectomics.objects.merge import FIRST_ID, IDS, OBJECTS, OFFSETS, spans
from connectomics.objects.numbering.cuts import BlockRows, Cuts, NodePairs
from connectomics.objects.numbering.ranges import PARTS, between, prepare
from connectomics.objects.numbering.tables import EVERYTHING, Numbering
from connectomics.objects.overlaps import COLUMNS, OVERLAP, summed
from connectomics.objects.selection import Rule
from connectomics.volumes.volume import Array

AT_ONCE = 1 << 20  # rows or pairs that are in memory at a time
IOU = "iou"
CANDIDATE = np.dtype([*((name, "i8") for name in COLUMNS), ("distance", "i8"), ("measure", "f8")])
NOBODY = -1
SPAN_OBJECTS = (1 << 17, 1 << 19)  # least and most of the objects of sections that are looked at together


@dataclass(frozen=True, slots=True)
class Linking:
    """Which objects of two sections are linked.

    Parameters
    ----------
    measure
        "iou": shared voxels (y, x) over those of either; "overlap": over those of the smaller object.
    threshold
        What is linked has at least this measure.
    max_gap
        Sections that a link may leap. Shorter links are made first; a longer one is made only where neither object
        has a link to a section in between.
    one_to_one
        Whether two objects are linked only where each is the other's best: by measure, then by shared voxels, then
        the one with the lower number.
    """

    measure: str = IOU
    threshold: float = 0.25
    max_gap: int = 0
    one_to_one: bool = False

    @property
    def reach(self) -> int:
        """Largest distance of linked sections."""
        return self.max_gap + 1


@dataclass(frozen=True, slots=True)
class Sections:
    """The objects of sections and how they overlap.

    Parameters
    ----------
    folder
        Tables of the objects, see ``Numbering.write``; in the order of their sections.
    count
        Objects in them.
    classes
        Class of each of some rows, u64 [n], of linked objects too; only equal ones are linked.
    blocks
        Number of blocks.
    overlaps
        File of what a block has counted, by its number.
    depth
        Sections of the volume.
    """

    folder: Path
    count: int
    classes: Callable[[Array], Array]
    blocks: int
    overlaps: Callable[[int], Path]
    depth: int

    @property
    def rows(self) -> Array:
        """``PIECE`` [count], mapped."""
        found: Array = np.load(self.folder / OBJECTS, mmap_mode="r")[: self.count]
        return found

    def spans(self) -> list[slice]:
        """The objects in parts that are looked at one by one; there is one at least."""
        size = min(max(SPAN_OBJECTS[0], -(-self.count // PARTS)), SPAN_OBJECTS[1])
        return list(spans(self.count, size)) or [slice(0, 0)]

    def finish(self, rows: Array) -> None:
        """Make of rows that are merged from objects of sections those of objects of the volume, in place."""
        rows["value"] = self.classes(rows)
        if self.depth > 1:  # components of sections know no border in z
            rows["border"] |= (rows["start"][:, 0] == 0) | (rows["stop"][:, 0] == self.depth)


def candidates(sections: Sections, rule: Linking, span: slice) -> dict[str, Array]:
    """What may be linked of a span of the objects of sections with later ones, and the order of its first voxels.

    Returns
    -------
    arrays
        The fields of ``CANDIDATE`` [n], in the order of the first object; only pairs that are alike and overlap enough.
        ``keys``: u8 [span], first voxels, ascending; ``order``: i8 [span], whose they are, counted from the span's
        first object.
    """
    rows = sections.rows
    firsts = np.array(rows["first"][span])
    order = np.argsort(firsts, kind="stable")
    found = [np.zeros(0, CANDIDATE)]
    found += [_alike(sections, rows, pairs, rule) for pairs in _pairs(sections, span)]
    together = np.concatenate(found)
    return {**{name: together[name] for name in CANDIDATE.names or ()}, "keys": firsts[order], "order": order}


def _alike(sections: Sections, rows: Array, pairs: Array, rule: Linking) -> Array:
    """The pairs that may be linked, ``CANDIDATE`` [n]."""
    ends, place = np.unique(np.concatenate([pairs["here"], pairs["there"]]), return_inverse=True)
    own = rows[ends]
    here, there = np.split(place, 2)
    section, voxels = own["start"][:, 0].astype(np.int64), own["voxels"].astype(np.int64)
    classes, shared = sections.classes(own), pairs["voxels"]
    found = np.empty(len(pairs), CANDIDATE)
    for name in COLUMNS:
        found[name] = pairs[name]
    found["distance"] = section[there] - section[here]
    size, other = voxels[here], voxels[there]
    found["measure"] = shared / (size + other - shared if rule.measure == IOU else np.minimum(size, other))
    alike: Array = found[(classes[here] == classes[there]) & (found["measure"] >= rule.threshold)]
    return alike


def _pairs(sections: Sections, span: slice) -> Iterator[Array]:
    """``OVERLAP`` rows of the objects of a span, whole, some at a time, in the order of the first object."""
    columns = [tuple(view(sections.overlaps(block), name) for name in COLUMNS) for block in range(sections.blocks)]
    runs = [between(here, span.start, span.stop - 1) for here, _, _ in columns]
    waiting = [((span.start, span.stop), runs)]
    while waiting:
        objects, runs = waiting.pop()
        total = sum(run.stop - run.start for run in runs)
        if total > AT_ONCE and objects[1] - objects[0] > 1:
            middle = sum(objects) // 2
            cuts = [
                run.start + int(np.searchsorted(here[run], middle))
                for (here, _, _), run in zip(columns, runs, strict=True)
            ]
            later = [slice(cut, run.stop) for cut, run in zip(cuts, runs, strict=True)]
            earlier = [slice(run.start, cut) for cut, run in zip(cuts, runs, strict=True)]
            waiting += [((middle, objects[1]), later), ((objects[0], middle), earlier)]
        elif total:
            rows = np.empty(total, OVERLAP)
            for name, parts in zip(COLUMNS, zip(*columns, strict=True), strict=True):
                rows[name] = np.concatenate([part[run] for part, run in zip(parts, runs, strict=True)])
            yield summed(rows)


@dataclass(frozen=True, slots=True)
class Linked:
    """Objects of sections as pieces of what links make of them.

    Parameters
    ----------
    sections
        They.
    rule
        Which are linked.
    parts
        What ``candidates`` gave for a span, by its number and the array's name.
    """

    sections: Sections
    rule: Linking
    parts: Callable[[int, str], Array]

    def numbering(self, selection: Rule = EVERYTHING) -> Numbering:
        """How they are numbered, by first voxels, and measured."""
        cuts = Cuts(len(self.sections.spans()), self._rows, self._nodes, self._linked)
        return Numbering(cuts, selection, at_once=AT_ONCE, finish=self.sections.finish, spread=self._spread)

    def _rows(self, number: int) -> BlockRows:
        keys, order = self.parts(number, "keys"), self.parts(number, "order")
        return BlockRows(self.sections.rows[self.sections.spans()[number]], keys, order)

    def _nodes(self, number: int) -> tuple[Array, Array]:
        keys = self.parts(number, "keys")
        return np.arange(len(keys)), keys

    def _linked(self, offsets: Array, folder: Path, at_once: int) -> NodePairs:
        places = self._places(folder)
        if self.rule.max_gap == 0 and not self.rule.one_to_one:
            numbers = range(len(self.sections.spans()))
            ends = ((self.parts(number, "here"), self.parts(number, "there")) for number in numbers)
        else:
            found = self._candidates(folder)
            ends = ((some["here"], some["there"]) for some in _links(found, self.sections.count, self.rule, folder))
        for here, there in ends:
            for span in spans(len(here), at_once):
                yield np.stack([places[here[span]], places[there[span]]])

    def _places(self, folder: Path) -> Array:
        """Where each object of a section lies when those of each span are in the order of their first voxels."""
        places = table(folder / "scratch_places", self.sections.count, np.int64)
        for number, span in enumerate(self.sections.spans()):
            places[span.start + self.parts(number, "order")] = np.arange(span.start, span.stop)
        return places

    def _candidates(self, folder: Path) -> Array:
        """All that may be linked, in the order of the first object."""
        path, count = folder / "scratch_candidates", 0
        with path.open("wb") as stream:
            for number in range(len(self.sections.spans())):
                rows = np.empty(len(self.parts(number, "here")), CANDIDATE)
                for name in CANDIDATE.names or ():
                    rows[name] = self.parts(number, name)
                stream.write(rows.tobytes())
                count += len(rows)
        return mapped(path, count, CANDIDATE)

    def _spread(self, folder: Path) -> None:
        """Make of what is painted for each object of a section what is painted for each piece."""
        (folder / IDS).rename(folder / "scratch_ids")
        offsets = np.load(self.sections.folder / OFFSETS)
        np.save(folder / OFFSETS, offsets)
        total, places = int(offsets[-1]), self._places(folder)
        painted, before = (
            np.load(path, mmap_mode="r") for path in (folder / "scratch_ids", self.sections.folder / IDS)
        )
        ids = table(folder / IDS, total, np.uint64)
        for span in spans(total, AT_ONCE):
            ids[span] = painted[places[before[span].astype(np.int64) - FIRST_ID]]
        flush(ids)
        for path in folder.glob("scratch_*"):
            path.unlink()


def link(sections: Sections, rule: Linking, folder: Path) -> int:
    """Link, number and measure in this process alone; how many objects there are. ``folder`` is empty before."""
    for number, span in enumerate(sections.spans()):
        write(folder / f"plan_links_{number}", **candidates(sections, rule, span))
    numbering = Linked(sections, rule, lambda number, name: view(folder / f"plan_links_{number}", name)).numbering()
    return numbering.write_alone(prepare(numbering.cuts, folder, at_once=AT_ONCE), folder).found


def _links(candidates: Array, count: int, rule: Linking, folder: Path) -> Iterator[Array]:
    """The candidates that become links: those from one section to the next, then those that leap one, and so on."""
    forward = table(folder / "scratch_forward", count, np.bool_)
    backward = table(folder / "scratch_backward", count, np.bool_)
    for distance in range(1, rule.reach + 1):

        def possible(span: slice, distance: int = distance) -> Array:
            rows = candidates[span]
            free = ~forward[rows["here"]] & ~backward[rows["there"]]
            places: Array = span.start + np.flatnonzero(free & (rows["distance"] == distance))
            return places

        best = _best(candidates, count, possible, folder) if rule.one_to_one else None
        path, chosen = folder / f"scratch_links_{distance}", 0
        with path.open("wb") as stream:
            for span in spans(len(candidates), AT_ONCE):
                places = possible(span)
                if best is not None:
                    rows = candidates[places]
                    places = places[(best[0][rows["here"]] == places) & (best[1][rows["there"]] == places)]
                stream.write(candidates[places].tobytes())
                chosen += len(places)
        links = mapped(path, chosen, CANDIDATE)
        for span in spans(chosen, AT_ONCE):  # only now: links of one distance do not hinder each other
            forward[links["here"][span]] = True
            backward[links["there"][span]] = True
        yield links


def _best(candidates: Array, count: int, possible: Callable[[slice], Array], folder: Path) -> tuple[Array, Array]:
    """The place of each object's best possible candidate to later and to earlier sections; ``NOBODY`` without one."""
    best: dict[str, Array] = {
        side: table(folder / f"scratch_best_of_{side}", count, np.int64) for side in ("here", "there")
    }
    for places in best.values():
        for span in spans(count, AT_ONCE):
            places[span] = NOBODY
    for span in spans(len(candidates), AT_ONCE):
        new = possible(span)
        for side, other in (("here", "there"), ("there", "here")):
            owners = np.unique(candidates[new][side])
            known = best[side][owners]
            places = np.concatenate([new, known[known != NOBODY]])
            rows = candidates[places]
            order = np.lexsort((rows[other], -rows["voxels"], -rows["measure"], rows[side]))
            first = order[np.flatnonzero(np.diff(rows[side][order], prepend=NOBODY))]
            best[side][rows[side][first]] = places[first]
    return best["here"], best["there"]
