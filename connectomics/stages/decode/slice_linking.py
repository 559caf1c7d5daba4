"""The step ``slice_linking`` of decoding: objects of sections are found, overlaps counted, objects linked over z.

Its stages are cut, join (of labels), overlaps and paint; links and parts where there are many objects.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.arrays import load, view
from connectomics.objects.components import Connectivity
from connectomics.objects.links import Linked, Linking, Sections, candidates
from connectomics.objects.merge import FIRST_ID, IDS, OBJECTS, OFFSETS
from connectomics.objects.overlaps import COLUMNS, OVERLAP, PieceRuns, overlaps, summed
from connectomics.objects.selection import NUMBERS
from connectomics.stages.decode.context import EVERYTHING, TABLES, DecodingState, StepContext
from connectomics.stages.decode.step_contract import DecodingMemory, Rules, StepInput, check_values
from connectomics.stages.decode.tasks import BlockPieces, block_file, smallest_dtype
from connectomics.stages.decode.values import Values
from connectomics.volumes.volume import Array, VolumeInfo

SECTIONS, OVERLAPS, LINKS = "sections", "overlaps", "links"
IN_SECTIONS = Connectivity(8)
MEASURES = ("iou", "overlap")


@dataclass(frozen=True, slots=True)
class SectionIds:
    """Ids that differ between sections, though they may begin anew in each: with the section above their own digits."""

    values: Values
    depth: int

    @property
    def digits(self) -> int:
        """Binary digits of an id."""
        return 64 - max(1, (self.depth - 1).bit_length())

    def __call__(self, box: Box) -> Array:
        """u64 (z, y, x) of a box, 0 in the background; a VolumeError if an id has more digits than there is room."""
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
class BlockOverlaps:
    """Count the voxels that objects of a block share with those of at most ``reach`` sections after theirs.

    ``pieces`` and ``sections`` are the folders of the pieces and of the tables of the objects of sections.
    """

    pieces: Path
    sections: Path
    reach: int

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the columns of ``OVERLAP`` [n] of whole objects, counted from 0, sorted."""
        here, objects = self._runs(block), self._objects(grid, block)
        found = [np.zeros(0, OVERLAP)]
        for z in range(block.index[0], grid.counts[0]):
            other = grid.block((z, *block.index[1:]))
            above = other.core.start[0] - block.core.start[0]
            if above - (block.core.shape[0] - 1) > self.reach:
                break
            rows = overlaps(here, here if other == block else self._runs(other), above, self.reach)
            rows["here"], rows["there"] = objects[rows["here"] - 1], self._objects(grid, other)[rows["there"] - 1]
            found.append(rows)
        counted = summed(np.concatenate(found))
        return {name: counted[name] for name in COLUMNS}

    def _runs(self, block: Block) -> PieceRuns:
        lengths, labels = load(block_file(self.pieces, block), "lengths", "labels")
        return PieceRuns.of(lengths, labels, block.core.shape)

    def _objects(self, grid: BlockGrid, block: Block) -> Array:
        """The object of each piece, from 0 on."""
        number = grid.number(block.index)
        begin, end = np.load(self.sections / OFFSETS, mmap_mode="r")[number : number + 2]
        ids: Array = np.load(self.sections / IDS, mmap_mode="r")[begin:end].astype(np.int64) - FIRST_ID
        return ids


@dataclass(frozen=True, slots=True)
class BlockCandidates:
    """Find which objects of a span of the objects of sections may be linked; the blocks are the spans."""

    sections: Sections
    rule: Linking

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the arrays of what may be linked."""
        return candidates(self.sections, self.rule, self.sections.spans()[grid.number(block.index)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLinking:
    """Objects of sections become objects of the volume where they overlap; numbered by their first voxel.

    Parameters
    ----------
    measure
        ``iou``, or ``overlap`` over the smaller of the two.
    threshold
        Least measure of what is linked.
    max_gap
        Sections that a link may leap.
    one_to_one
        Whether each object has at most one link to each side.
    ids
        Whether a volume that no step has worked on holds ids of objects; else it holds labels, of which the
        8-connected components of each section are the objects. What a step has left are ids. All voxels of one id
        in a section are one object.
    """

    name: str = "slice_linking"
    measure: str = "iou"
    threshold: float = 0.25
    max_gap: int = 0
    one_to_one: bool = False
    ids: bool = False
    probabilities: ClassVar[None] = None
    selects: ClassVar[bool] = True

    def rules(self) -> Rules:
        """Say of each key that may be impossible whether it is possible."""
        return {
            "measure": (self.measure in MEASURES, f"must be one of {', '.join(MEASURES)}"),
            "threshold": (0 <= self.threshold <= 1, "must be 0 to 1"),
            "max_gap": (self.max_gap >= 0, "must be 0 or more"),
        }

    def check(self, key: str, given: StepInput) -> StepInput:
        """Refuse probabilities."""
        check_values(key, given)
        return dataclasses.replace(given, ids=True)

    def plan(self, key: str, info: VolumeInfo, memory: DecodingMemory, plan: BlockPlan) -> BlockPlan:
        """Return ``plan``: these blocks are meant for it."""
        return plan

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Link objects, or those of labels."""
        context = context.finer(state.volume.info.chunk_shape)
        values, depth = Values(state.volume), context.grid.volume[0]
        rule = Linking(self.measure, self.threshold, self.max_gap, self.one_to_one)
        likely, classes = state.probabilities, state.frame.classes
        of_rows: Callable[[Array], Array]
        if self.ids or state.tables is not None:
            named = SectionIds(values, depth)
            cut = BlockPieces(named, None, probabilities=likely)
            classes = classes and state.tables is not None
            of_rows = _classes(state, named) if classes else lambda rows: np.zeros(len(rows), np.uint64)
        else:
            cut = BlockPieces(values, IN_SECTIONS, probabilities=likely)
            of_rows = operator.itemgetter("value")
        pieces = context.pieces(cut)
        joined = cut.connectivity is not None
        sections, found, _ = context.objects(pieces, EVERYTHING, joined=joined, kind=SECTIONS)
        counted = context.fill(OVERLAPS, BlockOverlaps(pieces, sections, rule.reach))

        def file(number: int) -> Path:
            return block_file(counted, context.grid.numbered(number))

        linked = Sections(sections, found, of_rows, len(context.grid), overlaps=file, depth=depth)
        pairs = Linked(linked, rule, _candidates(linked, rule, context))
        tables, count, largest = context.number(pairs.numbering(context.selection), TABLES)
        store = context.paint(pieces, tables, state.volume.info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, flat=False, classes=classes)
        return dataclasses.replace(state, volume=store, frame=frame, tables=tables, count=count)


def _candidates(sections: Sections, rule: Linking, context: StepContext) -> Callable[[int, str], Array]:
    """What may be linked: of many objects in spans that all processes share, of few by whoever asks for it."""
    grid = BlockGrid((len(sections.spans()), 1, 1), (1, 1, 1))
    if len(grid) > 1:
        parts = context.cut_by(grid).fill(LINKS, BlockCandidates(sections, rule))
        return lambda number, name: view(block_file(parts, grid.numbered(number)), name)
    found = functools.cache(lambda: candidates(sections, rule, sections.spans()[0]))
    return lambda number, name: found()[name]


def _classes(state: DecodingState, named: SectionIds) -> Callable[[Array], Array]:
    """Class of each row, looked up in the tables by the id."""
    assert state.tables is not None
    rows = np.load(state.tables / OBJECTS, mmap_mode="r")
    numbers = np.load(state.tables / NUMBERS, mmap_mode="r")[: state.count]
    return lambda found: rows["value"][np.searchsorted(numbers, named.own(found["value"]))]
