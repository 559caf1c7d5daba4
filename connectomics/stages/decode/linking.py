"""The step ``slice_linking`` of decoding: objects of sections are found, overlaps counted, objects linked over z.

``assembly.decoding`` makes it from the configuration; its stages are cut, join (of labels), overlaps and paint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.task import BlockRecord
from connectomics.objects.arrays import load
from connectomics.objects.components import Connectivity
from connectomics.objects.links import Linking, Sections, link
from connectomics.objects.merge import FIRST_ID, IDS, OBJECTS, OFFSETS
from connectomics.objects.overlaps import OVERLAP, PieceRuns, SliceOverlaps, overlaps, summed
from connectomics.objects.selection import NUMBERS, Selection
from connectomics.stages.decode.context import CUT, TABLES, DecodingState, StepContext
from connectomics.stages.decode.steps import EVERYTHING, Values
from connectomics.stages.decode.tasks import PiecesTask, block_file, saved, smallest_dtype
from connectomics.volumes.volume import Array

SECTIONS, OVERLAPS = "sections", "overlaps"
IN_SECTIONS = Connectivity(8)
NEIGHBOURS = Linking()


@dataclass(frozen=True, slots=True)
class SectionIds:
    """Ids that differ between sections: each with its section's number above its own digits.

    Parameters
    ----------
    values
        Ids, which may begin anew in each section.
    depth
        Sections of the volume.
    """

    values: Values
    depth: int

    @property
    def digits(self) -> int:
        """Binary digits of an id."""
        return 64 - max(1, (self.depth - 1).bit_length())

    def __call__(self, box: Box) -> Array:
        """u64 (z, y, x) of a box; 0 is background.

        Raises
        ------
        VolumeError
            If an id has more digits than the sections leave.
        """
        ids = self.values(box).astype(np.uint64)
        if int(ids.max()) >> self.digits:
            raise VolumeError(
                f"id {ids.max()} in voxels {box.start} to {box.stop} (z, y, x) is too large for slice_linking, which "
                f"takes ids below {1 << self.digits} in a volume of {self.depth} sections; renumber them, for example "
                "with connected_components of connectivity 8"
            )
        z = np.arange(box.start[0], box.stop[0], dtype=np.uint64)[:, None, None] << np.uint64(self.digits)
        return np.where(ids > 0, ids | z, 0)

    def own(self, numbers: Array) -> Array:
        """The ids as they were."""
        return numbers & np.uint64((1 << self.digits) - 1)


@dataclass(frozen=True, slots=True)
class OverlapTask:
    """Count the voxels that objects of each block share with those of the sections after theirs.

    Parameters
    ----------
    grid
        Blocks of the volume.
    pieces
        Where their pieces lie.
    sections
        Where the tables of the objects of sections lie.
    folder
        Where the results go.
    reach
        Largest distance in sections.
    """

    grid: BlockGrid
    pieces: Path
    sections: Path
    folder: Path
    reach: int

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.folder.name

    def process(self, block: Block) -> BlockRecord:
        """Count in a block and those after it in z; its file is on disk on return."""
        began = time.perf_counter()
        here, objects = self._runs(block), self._objects(block)
        found = [np.zeros(0, OVERLAP)]
        for z in range(block.index[0], self.grid.counts[0]):
            other = self.grid.block((z, *block.index[1:]))
            above = other.core.start[0] - block.core.start[0]
            if above - (block.core.shape[0] - 1) > self.reach:
                break
            rows = overlaps(here, here if other == block else self._runs(other), above, self.reach)
            rows["here"], rows["there"] = objects[rows["here"] - 1], self._objects(other)[rows["there"] - 1]
            found.append(rows)
        counted = SliceOverlaps(summed(np.concatenate(found)))
        return saved(counted, block_file(self.folder, block), block, began)

    def _runs(self, block: Block) -> PieceRuns:
        lengths, labels = load(block_file(self.pieces, block), "lengths", "labels")
        return PieceRuns.of(lengths, labels, block.core.shape)

    def _objects(self, block: Block) -> Array:
        """The object of each piece, from 0 on."""
        number = self.grid.number(block.index)
        begin, end = np.load(self.sections / OFFSETS, mmap_mode="r")[number : number + 2]
        ids: Array = np.load(self.sections / IDS, mmap_mode="r")[begin:end].astype(np.int64) - FIRST_ID
        return ids


@dataclass(frozen=True, slots=True)
class SliceLinking:
    """Objects of sections become objects of the volume where they overlap; numbered by their first voxel.

    Parameters
    ----------
    rule
        Which are linked.
    ids
        Whether a volume that no step has worked on holds ids of objects; else it holds labels, of which the
        8-connected components of each section are the objects. What a step has left are ids. All voxels of one id
        in a section are one object.
    selection
        Which linked objects stay.
    """

    rule: Linking = NEIGHBOURS
    ids: bool = False
    selection: Selection = EVERYTHING

    @property
    def name(self) -> str:
        """As in the configuration."""
        return "slice_linking"

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Link the scene's objects, or those of its labels."""
        values, depth = Values(state.volume), context.grid.volume[0]
        cut, likely, classes = context.place(CUT), state.probabilities, state.frame.classes
        of_rows: Callable[[Array], Array]
        if self.ids or state.tables is not None:
            named = SectionIds(values, depth)
            task = PiecesTask(context.grid, cut, named, None, probabilities=likely)
            classes = classes and state.tables is not None
            of_rows = _classes(state, named) if classes else _no_class
        else:
            task = PiecesTask(context.grid, cut, values, IN_SECTIONS, probabilities=likely)
            of_rows = _value
        context.pieces(task)
        joined = task.connectivity is not None
        sections, found, _ = context.objects(cut, EVERYTHING, joined=joined, kind=SECTIONS)
        counted = context.place(OVERLAPS)
        counted.mkdir(exist_ok=True)
        context.do(OverlapTask(context.grid, cut, sections, counted, reach=self.rule.reach), counted)

        def file(number: int) -> Path:
            return block_file(counted, context.grid.numbered(number))

        linked = Sections(sections, found, of_rows, len(context.grid), overlaps=file, depth=depth)
        tables, count, largest = context.selected(
            TABLES, lambda folder: link(linked, self.rule, folder), self.selection
        )
        store = context.paint(cut, tables, state.volume.info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, flat=False, classes=classes)
        return dataclasses.replace(state, volume=store, frame=frame, tables=tables, count=count)


def _classes(state: DecodingState, named: SectionIds) -> Callable[[Array], Array]:
    """Class of each row, looked up in the scene's tables by the id."""
    assert state.tables is not None
    rows = np.load(state.tables / OBJECTS, mmap_mode="r")
    numbers = np.load(state.tables / NUMBERS, mmap_mode="r")[: state.count]
    return lambda found: rows["value"][np.searchsorted(numbers, named.own(found["value"]))]


def _no_class(rows: Array) -> Array:
    return np.zeros(len(rows), np.uint64)


def _value(rows: Array) -> Array:
    values: Array = rows["value"]
    return values
