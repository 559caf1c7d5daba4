"""The steps of ``decoding``: connected components, filters. Each is a frozen value with a name and a ``run``.

``assembly.decoding`` makes them from the configuration; ``runs.decode`` runs them one after the other.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.files import replacing
from connectomics.core.geometry import Box
from connectomics.objects.components import Connectivity
from connectomics.objects.merge import OBJECTS
from connectomics.objects.pieces import FIXED_POINT
from connectomics.objects.selection import NUMBERS, Holes, Selection, absorb, inherit
from connectomics.stages.decode.context import CUT, DecodingState, StepContext
from connectomics.stages.decode.tasks import PiecesTask, smallest_dtype
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

EVERYTHING = Selection()


@dataclass(frozen=True, slots=True)
class Values:
    """What of a volume is labelled.

    Parameters
    ----------
    volume
        Labels, ids or probabilities.
    channel
        Which of its channels.
    threshold
        Foreground is what exceeds it; None where the volume holds labels.
    joined
        Whether all labels count as one.
    """

    volume: VolumeReader
    channel: int = 0
    threshold: float | None = None
    joined: bool = False

    def __call__(self, box: Box) -> Array:
        """bool or unsigned integers (z, y, x) of a box."""
        values: Array = self.volume.read(box)[self.channel]
        if self.threshold is not None:
            return np.greater(values, self.threshold)
        if self.joined or values.dtype.kind == "b":
            return np.not_equal(values, 0)
        if values.dtype.kind == "i":
            if values.min() < 0:
                raise VolumeError(
                    f"labels in voxels {box.start} to {box.stop} (z, y, x) go down to {values.min()}; labels are 0 for "
                    "the background and positive numbers"
                )
            return values.view(values.dtype.str.replace("i", "u"))
        return values

    def raw(self, box: Box) -> Array:
        """The channel as it is (z, y, x)."""
        values: Array = self.volume.read(box)[self.channel]
        return values


@dataclass(frozen=True, slots=True)
class ConnectedComponents:
    """Objects are connected voxels; numbered 1, 2, … by their first voxel in raster order.

    Parameters
    ----------
    connectivity
        6, 18 or 26; 4 or 8 within sections.
    threshold
        Foreground of probabilities is what exceeds it; None for labels.
    channel
        Of a volume of probabilities.
    per_class
        Whether voxels of different labels are different objects.
    selection
        Which objects stay.
    """

    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    per_class: bool = True
    selection: Selection = EVERYTHING

    @property
    def name(self) -> str:
        """As in the configuration."""
        return "connected_components"

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Label the scene's volume."""
        connectivity = Connectivity(self.connectivity)
        values = Values(state.volume, self.channel, self.threshold, not self.per_class)
        likely, units = state.probabilities, state.frame.probability_units
        if self.threshold is not None:
            likely, units = values.raw, probability_units(state.volume.info)
        task = PiecesTask(context.grid, context.place(CUT), values, connectivity, probabilities=likely)
        context.pieces(task)
        tables, count, largest = context.objects(task.folder, self.selection, joined=True)
        store = context.paint(task.folder, tables, state.volume.info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, probability_units=units, flat=connectivity.by_section)
        return DecodingState(store, frame, likely, tables, count=count)


def probability_units(info: VolumeInfo, certain: float | None = None) -> tuple[float, float]:
    """What a voxel of probability 1 adds to a row's sum, and its value as a minimum.

    Parameters
    ----------
    info
        Of the volume of probabilities.
    certain
        The stored value of probability 1; None for 1 in fractions and for the largest value of integers.
    """
    if info.dtype.kind == "f":
        return FIXED_POINT * (certain or 1.0), certain or 1.0
    largest = float(certain or np.iinfo(info.dtype).max)
    return largest, largest


@dataclass(frozen=True, slots=True)
class ClassProbabilities:
    """The probability of each voxel's own label.

    Parameters
    ----------
    probabilities
        One channel, or one for each label from 0 on.
    labels
        What the labels are.
    """

    probabilities: VolumeReader
    labels: Values

    def __call__(self, box: Box) -> Array:
        """Probabilities (z, y, x) of a box.

        Raises
        ------
        VolumeError
            If a label has no channel.
        """
        found = self.probabilities.read(box)
        if len(found) == 1:
            only: Array = found[0]
            return only
        labels = self.labels.raw(box)
        if labels.max() >= len(found):
            raise VolumeError(
                f"label {labels.max()} in voxels {box.start} to {box.stop} (z, y, x) has no channel among the "
                f"{len(found)} of the probabilities; give one channel, or one for each label from 0 on"
            )
        chosen: Array = np.take_along_axis(found, labels[None].astype(np.intp), axis=0)[0]
        return chosen


@dataclass(frozen=True, slots=True)
class Filters:
    """Drop whole objects, then fill the holes of those that stay; ids do not change.

    Parameters
    ----------
    selection
        Which objects stay.
    fill_holes
        None, or the connectivity of the background: 6 for holes in the volume, 4 for holes within sections.
    """

    selection: Selection = EVERYTHING
    fill_holes: int | None = None

    @property
    def name(self) -> str:
        """As in the configuration."""
        return "filters"

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Filter the scene's objects; where it has none yet, all voxels of one value are one object."""
        if self.selection.active or state.tables is None:
            state = self._selected(state, context.part("dropped"))
        if self.fill_holes is None:
            return state
        return _filled(state, self.fill_holes, context.part("filled"))

    def _selected(self, state: DecodingState, context: StepContext) -> DecodingState:
        task = PiecesTask(
            context.grid,
            context.place(CUT),
            Values(state.volume),
            None,
            probabilities=state.probabilities,
            flat=state.frame.flat,
        )
        context.pieces(task)
        rule = dataclasses.replace(self.selection, by_value=True)
        tables, count, largest = context.objects(task.folder, rule, joined=False)
        store = context.paint(task.folder, tables, state.volume.info, smallest_dtype(largest))
        if state.tables is None:
            frame = dataclasses.replace(state.frame, classes=False)
            return dataclasses.replace(state, volume=store, frame=frame, tables=tables, count=count)
        before = (state.tables, state.count)
        final = _derived(context, tables, lambda copy: inherit(copy, count, *before))
        return dataclasses.replace(state, volume=store, tables=final, count=count)


def _filled(state: DecodingState, connectivity: int, context: StepContext) -> DecodingState:
    assert state.tables is not None
    values = Values(state.volume)
    task = PiecesTask(
        context.grid,
        context.place(CUT),
        values,
        Connectivity(connectivity),
        probabilities=state.probabilities,
        holes=True,
    )
    context.pieces(task)
    holes, found, _ = context.objects(task.folder, Holes(), joined=True)
    store = context.paint(task.folder, holes, state.volume.info, state.volume.info.dtype, under=values)
    count = state.count
    final = _derived(context, state.tables, lambda copy: absorb(copy, count, holes, found))
    return dataclasses.replace(state, volume=store, tables=final)


def _derived(context: StepContext, tables: Path, change: Callable[[Path], None]) -> Path:
    """A changed copy of the tables of objects, whole or not at all."""

    def make(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            for name in (OBJECTS, NUMBERS):
                shutil.copyfile(tables / name, temporary / name)
            change(temporary)

    return context.made("objects", make)
