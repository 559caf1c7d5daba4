"""Objects of sections linked over z: which links are made of the overlaps of all blocks, and the objects they make.

Runs once all blocks have counted; like in ``merge``, tables are files that are mapped, of which memory holds a part.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.objects.mapped_tables import flush, mapped, table
from connectomics.objects.merge import FIRST_ID, IDS, OBJECTS, OFFSETS, ascending, roots, spans, unite
from connectomics.objects.overlaps import COLUMNS, OVERLAP, load_overlaps, summed
from connectomics.objects.pieces import PIECE, merged, nothing, together
from connectomics.volumes.volume import Array

AT_ONCE = 1 << 20  # rows or pairs that are in memory at a time
IOU = "iou"
CANDIDATE = np.dtype([*((name, "i8") for name in COLUMNS), ("distance", "i8"), ("measure", "f8")])
NOBODY = -1
WIDE = 16  # words of a row that is read whole


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
        Tables of the objects, which ``merge`` has left and ``select`` has worked on; in the order of their sections.
    count
        Objects in them.
    classes
        Class of each of some rows, u64 [n]; only equal ones are linked.
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


def link(sections: Sections, rule: Linking, folder: Path) -> int:
    """Link objects of sections, number what becomes of them by its first voxel and measure it; how many there are.

    Leaves in ``folder``, which is empty before, the tables that ``merge`` leaves, now of linked objects. ``AT_ONCE``
    rows are in memory at a time; the overlaps of one object always are.
    """
    rows = np.load(sections.folder / OBJECTS, mmap_mode="r")
    classes = table(folder / "scratch_classes", sections.count, np.uint64)
    parent = table(folder / "scratch_parent", sections.count, np.int64)
    for span in spans(sections.count, AT_ONCE):
        classes[span] = sections.classes(rows[span])
        parent[span] = np.arange(span.start, span.stop)
    candidates = _candidates(sections, rows, classes, rule, folder=folder)
    for links in _links(candidates, sections.count, rule, folder):
        for span in spans(len(links), AT_ONCE):
            unite(parent, np.stack([links["here"][span], links["there"][span]]))
    numbers, count = _numbered(rows, parent, sections.count, folder)
    _written(sections, classes, numbers, count, folder=folder)
    for path in folder.glob("scratch_*"):
        path.unlink()
    return count


def _candidates(sections: Sections, rows: Array, classes: Array, rule: Linking, folder: Path) -> Array:
    """All pairs of objects, in the order of the first, that are alike and overlap enough."""
    section, voxels = rows["start"][:, 0], rows["voxels"]
    path, count = folder / "scratch_candidates", 0
    with path.open("wb") as stream:
        for pairs in _pairs(sections, folder):
            pairs = pairs[classes[pairs["here"]] == classes[pairs["there"]]]
            here, there, shared = (pairs[name] for name in COLUMNS)
            found = np.empty(len(pairs), CANDIDATE)
            for name in COLUMNS:
                found[name] = pairs[name]
            found["distance"] = section[there].astype(np.int64) - section[here]
            size, other = voxels[here].astype(np.int64), voxels[there].astype(np.int64)
            found["measure"] = shared / (size + other - shared if rule.measure == IOU else np.minimum(size, other))
            found = found[found["measure"] >= rule.threshold]
            stream.write(found.tobytes())
            count += len(found)
    return mapped(path, count, CANDIDATE)


def _pairs(sections: Sections, folder: Path) -> Iterator[Array]:
    """``OVERLAP`` rows of whole objects, some at a time, in the order of the first object."""
    paths = [folder / f"scratch_{name}" for name in COLUMNS]
    edges = [0]
    with paths[0].open("wb") as here, paths[1].open("wb") as there, paths[2].open("wb") as voxels:
        for block in range(sections.blocks):
            columns = load_overlaps(sections.overlaps(block))
            for stream, column in zip((here, there, voxels), columns, strict=True):
                stream.write(column.tobytes())
            edges.append(edges[-1] + len(columns[0]))
    columns = tuple(mapped(path, edges[-1], np.int64) for path in paths)
    waiting = [((0, sections.count), list(itertools.pairwise(edges)))]
    while waiting:
        objects, runs = waiting.pop()
        runs = [run for run in runs if run[1] > run[0]]
        total = sum(b - a for a, b in runs)
        if total > AT_ONCE and objects[1] - objects[0] > 1:
            middle = sum(objects) // 2
            cuts = [int(a + np.searchsorted(columns[0][a:b], middle)) for a, b in runs]
            waiting.append(((middle, objects[1]), [(c, b) for c, (_, b) in zip(cuts, runs, strict=True)]))
            waiting.append(((objects[0], middle), [(a, c) for c, (a, _) in zip(cuts, runs, strict=True)]))
        elif total:
            rows = np.empty(total, OVERLAP)
            for name, column in zip(COLUMNS, columns, strict=True):
                rows[name] = np.concatenate([column[a:b] for a, b in runs])
            yield summed(rows)


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


def _numbered(rows: Array, parent: Array, count: int, folder: Path) -> tuple[Array, int]:
    """Number of each object of a section, from 0 on: that of its linked object, by the first voxel; and how many."""
    first = table(folder / "scratch_first", count, np.uint64)
    numbers = table(folder / "scratch_numbers", count, np.int64)
    for span in spans(count, AT_ONCE):
        first[span] = np.iinfo(np.uint64).max
    for span in spans(count, AT_ONCE):
        parent[span] = root = roots(parent, np.arange(span.start, span.stop))
        np.minimum.at(first, root, rows["first"][span])
    following = 0
    leaders = (
        span.start + np.flatnonzero(parent[span] == np.arange(span.start, span.stop)) for span in spans(count, AT_ONCE)
    )
    for some in ascending(first, leaders, folder, AT_ONCE):
        numbers[some] = np.arange(following, following + len(some))
        following += len(some)
    for span in spans(count, AT_ONCE):  # leaders keep theirs
        numbers[span] = numbers[parent[span]]
    return numbers, following


def _written(sections: Sections, classes: Array, numbers: Array, count: int, folder: Path) -> None:
    """The tables of linked objects."""
    shutil.copyfile(sections.folder / OFFSETS, folder / OFFSETS)
    total = int(np.load(folder / OFFSETS)[-1])
    before, ids = np.load(sections.folder / IDS, mmap_mode="r"), table(folder / IDS, total, np.uint64)
    for span in spans(total, AT_ONCE):
        ids[span] = numbers[before[span].astype(np.int64) - FIRST_ID] + FIRST_ID
    of_sections, objects = np.load(sections.folder / OBJECTS, mmap_mode="r"), table(folder / OBJECTS, count, PIECE)
    for span in spans(count, max(1, AT_ONCE // WIDE)):
        objects[span] = nothing(span.stop - span.start)
    for span in spans(sections.count, max(1, AT_ONCE // WIDE)):
        rows = np.array(of_sections[span])
        rows["value"] = classes[span]
        if sections.depth > 1:  # components of sections know no border in z
            rows["border"] |= (rows["start"][:, 0] == 0) | (rows["stop"][:, 0] == sections.depth)
        rows, at = merged(rows, numbers[span])
        objects[at] = together(objects[at], rows)
    flush(ids, objects)
