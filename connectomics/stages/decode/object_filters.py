"""The step ``filters`` of decoding: whole objects are dropped, holes of those that stay are filled.

``passes`` spares a pass: a selection right behind what finds objects is made with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.files import replacing
from connectomics.core.geometry import Box
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.components import Connectivity
from connectomics.objects.merge import OBJECTS
from connectomics.objects.selection import NUMBERS, Holes, Selection, absorb, inherit
from connectomics.stages.decode.context import DecodingState, ProbabilityOf, StepContext
from connectomics.stages.decode.step_contract import (
    DecodingMemory,
    DecodingPass,
    DecodingStep,
    Rules,
    StepInput,
    check_values,
)
from connectomics.stages.decode.tasks import BlockPieces, Read, smallest_dtype
from connectomics.stages.decode.values import Values
from connectomics.volumes.volume import Array, Nanometres, VolumeInfo

HOLES = {"off": None, "2d": 4, "3d": 6}  # which neighbours the background has
UNKNOWN_SIZE = (
    "filters by volume in nm³ need the voxel size, which the volume does not state; set inference.voxel_size_nm=[z,y,x]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Drop whole objects, then fill the holes of those that stay; ids do not change.

    Parameters
    ----------
    min_voxels, max_voxels, min_volume_nm3, max_volume_nm3
        Size of what stays, both included; None for any.
    drop_border
        Whether objects that touch the volume's border are dropped.
    keep_largest
        Of all that stay so far, how many: the largest ones. None for all.
    fill_holes
        ``off``, ``3d`` for holes in the volume, or ``2d`` for holes within sections.
    """

    name: str = "filters"
    min_voxels: int = 0
    max_voxels: int | None = None
    min_volume_nm3: float | None = None
    max_volume_nm3: float | None = None
    drop_border: bool = False
    keep_largest: int | None = None
    fill_holes: str = "off"
    probabilities: ClassVar[None] = None
    selects: ClassVar[bool] = False

    def rules(self) -> Rules:
        """Say of each key that may be impossible whether it is possible."""

        def at_least(minimum: float, value: float | None) -> bool:
            return value is None or value >= minimum

        most, least = self.max_volume_nm3, self.min_volume_nm3
        return {
            "min_voxels": (self.min_voxels >= 0, "must be 0 or more"),
            "max_voxels": (at_least(max(self.min_voxels, 0), self.max_voxels), "must be min_voxels or more"),
            "min_volume_nm3": (at_least(0, least), "must be 0 or more"),
            "max_volume_nm3": (at_least(least or 0, most), "must be min_volume_nm3 or more"),
            "keep_largest": (at_least(1, self.keep_largest), "must be 1 or more"),
            "fill_holes": (self.fill_holes in HOLES, f"must be one of {', '.join(HOLES)}"),
        }

    def check(self, key: str, given: StepInput) -> StepInput:
        """Refuse probabilities, and a size in nm³ where voxels have none."""
        check_values(key, given)
        if given.info is not None:
            self.selection(given.info.voxel_size_nm)
        return dataclasses.replace(given, ids=True)

    def plan(self, key: str, info: VolumeInfo, memory: DecodingMemory, plan: BlockPlan) -> BlockPlan:
        """Return ``plan``: these blocks are meant for it."""
        return plan

    def selection(self, voxel_size_nm: Nanometres | None) -> Selection:
        """Return which objects stay, by voxels.

        Raises
        ------
        VolumeError
            If sizes are stated in nm³ and that of a voxel is unknown.

        Examples
        --------
        >>> Filters(min_volume_nm3=1000.0).selection((40.0, 4.0, 4.0)).minimum_voxels
        2
        """
        minimum, maximum = self.min_voxels, self.max_voxels
        if self.min_volume_nm3 is not None or self.max_volume_nm3 is not None:
            if voxel_size_nm is None:
                raise VolumeError(UNKNOWN_SIZE)
            voxel = math.prod(voxel_size_nm)
            minimum = max(minimum, math.ceil(round((self.min_volume_nm3 or 0) / voxel, 9)))
            if self.max_volume_nm3 is not None:
                largest = math.floor(round(self.max_volume_nm3 / voxel, 9))
                maximum = largest if maximum is None else min(maximum, largest)
        return Selection(minimum, maximum, self.drop_border, self.keep_largest)

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Filter objects; where there are none yet, all voxels of one value are one object."""
        selection = self.selection(state.frame.voxel_size_nm)
        if selection.active or state.tables is None:
            state = _selected(state, selection, context.part("dropped"))
        connectivity = HOLES[self.fill_holes]
        return state if connectivity is None else _filled(state, connectivity, context.part("filled"))


def passes(steps: Sequence[DecodingStep], voxel_size_nm: Nanometres | None) -> tuple[DecodingPass, ...]:
    """Return how steps are run: a selection right behind what finds objects is made with it.

    Raises VolumeError if filters state nm³ and the size of a voxel is unknown.
    """
    made: list[DecodingPass] = []
    for step in steps:
        if isinstance(step, Filters) and made and made[-1].step.selects and not made[-1].selection.active:
            made[-1] = DecodingPass(made[-1].step, step.selection(voxel_size_nm))
            if HOLES[step.fill_holes] is None:
                continue
            step = Filters(fill_holes=step.fill_holes)
        made.append(DecodingPass(step))
    return tuple(made)


def _selected(state: DecodingState, selection: Selection, context: StepContext) -> DecodingState:
    context = context.finer(state.volume.info.chunk_shape)
    cut = BlockPieces(Values(state.volume), None, probabilities=state.probabilities, flat=state.frame.flat)
    pieces = context.pieces(cut)
    tables, count, largest = context.objects(pieces, dataclasses.replace(selection, by_value=True), joined=False)
    store = context.paint(pieces, tables, state.volume.info, smallest_dtype(largest))
    if state.tables is None:
        frame = dataclasses.replace(state.frame, classes=False)
        return dataclasses.replace(state, volume=store, frame=frame, tables=tables, count=count)
    before = (state.tables, state.count)
    final = _derived(context, tables, lambda copy: inherit(copy, count, *before))
    return dataclasses.replace(state, volume=store, tables=final, count=count)


def _filled(state: DecodingState, connectivity: int, context: StepContext) -> DecodingState:
    assert state.tables is not None
    context, values = context.finer(state.volume.info.chunk_shape), Values(state.volume)
    background = Connectivity(connectivity)
    likely = state.probabilities if state.of_labels is None else None
    pieces = context.pieces(BlockPieces(values, background, probabilities=likely, holes=True))
    holes, found, _ = context.objects(pieces, Holes(), joined=True)
    store = context.paint(pieces, holes, state.volume.info, state.volume.info.dtype, under=values)
    count, likely = state.count, state.probabilities
    if state.of_labels is not None and likely is not None:  # the background's own would count with the object
        within = _HolesOfObjects(values, Values(store), state.tables, count, of_labels=state.of_labels)
        counted, likely = context.part("counted"), functools.partial(within.everywhere, likely)
        again = counted.pieces(BlockPieces(within, None, probabilities=likely, flat=background.by_section))
        holes, found, _ = counted.objects(again, Selection(by_value=True), joined=False)
    final = _derived(context, state.tables, lambda copy: absorb(copy, count, holes, found))
    return dataclasses.replace(state, volume=store, tables=final, probabilities=likely)


@dataclass(frozen=True, slots=True)
class _HolesOfObjects:
    """Voxels of filled holes, by the object that they were filled with, and that object's probability there.

    ``before`` and ``after`` read ids; the tables have ``count`` objects with ascending numbers, and the classes that
    ``of_labels`` knows by their values.
    """

    before: Values
    after: Values
    tables: Path
    count: int
    of_labels: ProbabilityOf

    def __call__(self, box: Box) -> Array:
        after = self.after(box)
        filled: Array = np.where(self.before(box) == 0, after, np.zeros((), after.dtype))
        return filled

    def everywhere(self, own: Read, box: Box) -> Array:
        """Probabilities (z, y, x) of a box: each voxel's own, in filled holes those of the objects."""
        filled = self(box) != 0
        if not filled.any():
            return own(box)
        return np.where(filled, self.of_labels(box, self._classes), own(box))

    def _classes(self, box: Box) -> Array:
        ids, places = np.unique(self(box), return_inverse=True)
        numbers = np.load(self.tables / NUMBERS, mmap_mode="r")[: self.count]
        rows = np.searchsorted(numbers, ids[ids > 0])
        classes = np.zeros(ids.shape, np.uint64)
        classes[ids > 0] = np.load(self.tables / OBJECTS, mmap_mode="r")["value"][rows]
        found: Array = classes[places].reshape(box.shape)
        return found


def _derived(context: StepContext, tables: Path, change: Callable[[Path], None]) -> Path:
    """A changed copy of the tables of objects, whole or not at all."""

    def make(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            for name in (OBJECTS, NUMBERS):
                shutil.copyfile(tables / name, temporary / name)
            change(temporary)

    return context.made("objects", make)
