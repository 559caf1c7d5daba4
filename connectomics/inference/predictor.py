"""Logits of any box of a case, equal to those of the whole case: global windows, rolling float32 accumulators.

The pipeline asks for the box a block writes; ``InferenceManager`` asks for the whole case.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from connectomics.errors import ModelError
from connectomics.geometry import Box, Vec3, pieces, vec3
from connectomics.inference.case import WindowSource
from connectomics.inference.tta import forward_mirrored, mirror_combinations
from connectomics.inference.windows import WindowGrid, constant_weight, gaussian_weight
from connectomics.io.volume import Array
from connectomics.models.backends.contract import Backend, torch_threads

Logits = torch.Tensor
FINISHED_VALUES = 1 << 20
"""Logits handed out at once: bounds what is made of them, probabilities and labels."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """How windows are laid and blended; the defaults of a plan are nnU-Net's.

    Parameters
    ----------
    patch
        Window shape (z, y, x) in voxels.
    step
        Largest distance between windows as a share of the patch.
    blending
        ``"gaussian"`` or ``"constant"``.
    mirror_axes
        Axes (0 = z, 1 = y, 2 = x) over whose flips the network is averaged.
    batch
        Windows per forward pass.
    """

    patch: Vec3
    step: float = 0.5
    blending: str = "gaussian"
    mirror_axes: tuple[int, ...] = ()
    batch: int = 1

    @property
    def passes(self) -> int:
        """Forward passes per window."""
        return len(mirror_combinations(self.mirror_axes)) + 1


class Predictor(Protocol):
    """Something that gives the logits of boxes of a case."""

    def predict(self, source: WindowSource, core: Box) -> Iterator[tuple[Box, Logits]]:
        """Finished logits of ``core`` (inside the case's nonzero box), in disjoint boxes that cover it.

        Yields
        ------
        box, logits
            float32 [k, z, y, x] on the backend's device; valid until the next item is taken.
        """
        ...

    def windows(self, source: WindowSource, core: Box) -> int:
        """Number of windows that ``predict`` computes."""
        ...


class RollingPredictor:
    """nnU-Net's sliding window, cut anywhere: a box gets every global window that touches it, in raster order.

    Parameters
    ----------
    folds
        One backend per fold; their logits are averaged.
    setting
        Windows and blending.
    classes
        Output channels of the network, k.

    Notes
    -----
    Windows are added in raster order in float32 and divided by the added weights, as nnU-Net does with float32
    accumulators; the accumulator holds one window's depth of the rolling axis (z of a 3D patch, else y), so its size is
    k × patch × the box's other extents. A voxel's sum does not depend on the box, so neither does the result.
    """

    def __init__(self, folds: tuple[Backend, ...], setting: SlidingWindow, classes: int) -> None:
        self._folds = folds
        self._setting = setting
        self._classes = classes
        weight = gaussian_weight if setting.blending == "gaussian" else constant_weight
        self._device = folds[0].device
        self._weight = torch.from_numpy(weight(setting.patch)).to(self._device)

    def windows(self, source: WindowSource, core: Box) -> int:
        return self._grid(source).count(core)

    def _grid(self, source: WindowSource) -> WindowGrid:
        return WindowGrid(source.box, self._setting.patch, self._setting.step)

    @torch.inference_mode()
    def predict(self, source: WindowSource, core: Box) -> Iterator[tuple[Box, Logits]]:
        with torch_threads(1):
            if self._setting.patch[0] > 1:
                yield from self._roll(source, core, axis=0)
                return
            for z in range(core.start[0], core.stop[0]):
                section = Box((z, *core.start[1:]), (z + 1, *core.stop[1:]))
                yield from self._roll(source, section, axis=1)

    def _roll(self, source: WindowSource, core: Box, axis: int) -> Iterator[tuple[Box, Logits]]:
        starts = self._grid(source).touching(core)
        ledge = _Accumulator(len(self._folds), self._classes, core, axis, self._setting.patch[axis], self._device)
        lane = _Lane(source, axis, self._setting.patch, starts)
        for position in starts[axis]:
            yield from ledge.advance(position)
            lane.advance(position)
            here = (s if a != axis else (position,) for a, s in enumerate(starts))
            corners = [vec3(c) for c in itertools.product(*here)]
            for i in range(0, len(corners), self._setting.batch):
                self._add(ledge, lane, corners[i : i + self._setting.batch])
        yield from ledge.advance(core.stop[axis])

    def _add(self, ledge: _Accumulator, lane: _Lane, corners: list[Vec3]) -> None:
        """Run one batch of windows through every fold and add it, window by window in raster order."""
        boxes = [Box(c, vec3([a + p for a, p in zip(c, self._setting.patch, strict=True)])) for c in corners]
        batch = torch.from_numpy(np.stack([lane.window(box) for box in boxes])).to(self._device)
        for fold, backend in enumerate(self._folds):
            logits = forward_mirrored(backend, batch, self._setting.mirror_axes)
            logits *= self._weight
            for box, window in zip(boxes, logits, strict=True):
                ledge.add(fold, box, window)
        for box in boxes:
            ledge.add_weight(box, self._weight)


class _Accumulator:
    """Weighted sums of the rows of a box that unfinished windows still touch; rolls along one axis."""

    def __init__(self, folds: int, classes: int, core: Box, axis: int, depth: int, device: torch.device) -> None:
        self._core, self._axis = core, axis
        shape = list(core.shape)
        shape[axis] = depth
        self._logits = torch.zeros((folds, classes, *shape), dtype=torch.float32, device=device)
        self._weights = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self._first: int | None = None  # voxel along the axis of the first row held

    def advance(self, position: int) -> Iterator[tuple[Box, Logits]]:
        """Give out the rows before ``position``, which no later window touches, and make room for new ones."""
        if self._first is None:
            self._first = position
            return
        count = position - self._first
        held = self._span(self._first, position)
        finished = held.intersect(self._core)
        for part in pieces(Box.of_shape(finished.shape), (1, 1, 1), max(1, FINISHED_VALUES // self._logits.shape[1])):
            box = part.shift(finished.start)
            yield box, self._finish(box.relative_to(held).slices)
        if position < self._core.stop[self._axis]:
            self._drop(count)
            self._first = position

    def _finish(self, rows: tuple[slice, slice, slice]) -> Logits:
        weights = self._weights[rows]
        mean = self._logits[(0, slice(None), *rows)] / weights
        for fold in self._logits[1:]:
            mean += fold[(slice(None), *rows)] / weights
        if len(self._logits) > 1:
            mean /= len(self._logits)
        finite = bool(torch.isfinite(mean.sum()))  # one pass; a sum that overflows says nothing of its parts
        if not finite and not bool(torch.isfinite(mean).all()):
            raise ModelError(
                f"the network gave infinite or undefined logits in {self._core}; the weights or the precision do not "
                "fit these intensities: try system.device=cpu, which computes in float32"
            )
        return mean

    def _drop(self, count: int) -> None:
        depth = self._weights.shape[self._axis]
        kept = max(0, depth - count)
        for tensor, axis in ((self._logits, self._axis + 2), (self._weights, self._axis)):
            for i in range(0, kept, count):  # in steps that do not overlap, so nothing is copied aside
                rows = min(count, kept - i)
                tensor.narrow(axis, i, rows).copy_(tensor.narrow(axis, i + count, rows))
            tensor.narrow(axis, kept, depth - kept).zero_()

    def _span(self, start: int, stop: int) -> Box:
        return self._core.with_span(self._axis, start, stop)

    def _common(self, window: Box) -> tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]:
        """Where a window and the held rows overlap: index into the accumulators, index into the window."""
        assert self._first is not None
        held = self._span(self._first, self._first + self._weights.shape[self._axis])
        both = window.intersect(held)
        return both.relative_to(held).slices, both.relative_to(window).slices

    def add(self, fold: int, window: Box, logits: torch.Tensor) -> None:
        """Add a window's weighted logits [k, z, y, x]."""
        here, there = self._common(window)
        self._logits[(fold, slice(None), *here)] += logits[(slice(None), *there)]

    def add_weight(self, window: Box, weight: torch.Tensor) -> None:
        """Add a window's weight [z, y, x]."""
        here, there = self._common(window)
        self._weights[here] += weight[there]


class _Lane:
    """The normalised input along the rolling axis: each row is read and normalised once, kept while windows need it."""

    def __init__(self, source: WindowSource, axis: int, patch: Vec3, starts: tuple[tuple[int, ...], ...]) -> None:
        self._source, self._axis, self._depth = source, axis, patch[axis]
        low = [s[0] for s in starts]
        high = [s[-1] + p for s, p in zip(starts, patch, strict=True)]
        high[axis] = low[axis]
        self._box = Box(vec3(low), vec3(high))
        self._data: Array = np.empty((source.channels, 0, 0, 0), np.float32)

    def advance(self, position: int) -> None:
        """Hold the rows ``position`` to ``position`` + patch."""
        low, high = list(self._box.start), list(self._box.stop)
        count, kept = position - low[self._axis], max(0, high[self._axis] - position)
        for i in range(0, kept, count or 1):  # in steps that do not overlap, so nothing is copied aside
            stop = min(i + count, kept)
            self._rows(i, stop)[...] = self._rows(i + count, stop + count)
        fresh = list(low)
        fresh[self._axis] = position + kept
        low[self._axis], high[self._axis] = position, position + self._depth
        rows = self._source.get(Box(vec3(fresh), vec3(high)))
        if kept:
            self._rows(kept, self._depth)[...] = rows
        else:
            self._data = rows
        self._box = Box(vec3(low), vec3(high))

    def _rows(self, start: int, stop: int) -> Array:
        index = [slice(None)] * 4
        index[self._axis + 1] = slice(start, stop)
        view: Array = self._data[tuple(index)]
        return view

    def window(self, box: Box) -> Array:
        """float32 (c, z, y, x) of a window inside the held rows."""
        view: Array = self._data[(slice(None), *box.relative_to(self._box).slices)]
        return view
