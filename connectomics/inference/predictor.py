"""Logits of any box of a case, equal to those of the whole case: global windows, rolling float32 accumulators.

The pipeline asks for the box a block writes; ``InferenceManager`` asks for the whole case.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from connectomics.geometry import Box, Vec3, pieces, vec3
from connectomics.inference.case import WindowSource
from connectomics.inference.transfer import uploads_to
from connectomics.inference.tta import forward_mirrored, mirror_combinations
from connectomics.inference.windows import WindowGrid, constant_weight, gaussian_weight
from connectomics.io.volume import Array
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.probe import naming_what_ran_out

Logits = torch.Tensor
Part = tuple[WindowSource, Box]
"""A case and what is wanted of it, a box inside its nonzero box."""
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

    def predict(self, parts: Iterable[Part]) -> Iterator[tuple[Box, Logits]]:
        """Finished logits of each part, in disjoint boxes that cover it, part by part.

        Yields
        ------
        box, logits
            float32 [k, z, y, x] on the backend's device, a new tensor; ``on_host`` brings and checks it.
        """
        ...

    def windows(self, source: WindowSource, core: Box) -> int:
        """Number of windows that ``predict`` computes."""
        ...

    def rehearse(self, shape: Vec3, channels: int) -> None:
        """Take for once the device's memory that ``predict`` takes for a core of this shape (z, y, x).

        Raises
        ------
        DeviceMemoryError
            If it does not suffice.
        """
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
        self._uploads = uploads_to(self._device)

    def windows(self, source: WindowSource, core: Box) -> int:
        return self._grid(source).count(core)

    @property
    def _axis(self) -> int:
        """Along which the accumulator rolls."""
        return 0 if self._setting.patch[0] > 1 else 1

    @torch.inference_mode()
    def rehearse(self, shape: Vec3, channels: int) -> None:
        """See ``Predictor``: sums of that shape, one full batch of empty windows in them, finished rows."""
        patch, axis = self._setting.patch, self._axis
        core = Box.of_shape(shape if axis == 0 else (1, *shape[1:]))
        window = Box.of_shape(patch)
        with naming_what_ran_out(
            f"sums of blocks of {shape} voxels and {self._setting.batch} windows do not fit the device's memory",
            "end what else runs there, set a smaller inference.block_shape or sw_batch_size, or use system.device=cpu",
        ):
            ledge = _Accumulator(len(self._folds), self._classes, core, axis, patch[axis], self._device)
            for _ in ledge.advance(0):
                pass
            empty = np.zeros((channels, *patch), np.float32)
            self._add(ledge, [empty] * self._setting.batch, [window] * self._setting.batch)
            for part in pieces(window.intersect(core), (1, 1, 1), max(1, FINISHED_VALUES // self._classes)):
                ledge.finish(part).amax().item()  # waits for the device, which says only then what went wrong

    def _grid(self, source: WindowSource) -> WindowGrid:
        return WindowGrid(source.box, self._setting.patch, self._setting.step)

    @torch.inference_mode()
    def predict(self, parts: Iterable[Part]) -> Iterator[tuple[Box, Logits]]:
        lanes, reads = itertools.tee(self._lanes(parts))
        with contextlib.closing(_read_ahead((lane.source, box) for lane in reads for box in lane.fresh())) as rows:
            for lane in lanes:
                yield from self._roll(lane, rows)

    def _lanes(self, parts: Iterable[Part]) -> Iterator[_Lane]:
        for source, core in parts:
            for box in [core] if self._axis == 0 else core.sections():
                yield _Lane(source, box, self._axis, self._setting.patch, self._grid(source).touching(box))

    def _roll(self, lane: _Lane, rows: Iterator[Array]) -> Iterator[tuple[Box, Logits]]:
        core, axis, starts = lane.core, self._axis, lane.starts
        ledge = _Accumulator(len(self._folds), self._classes, core, axis, self._setting.patch[axis], self._device)
        for position in starts[axis]:
            yield from ledge.advance(position)
            lane.advance(position, next(rows))
            here = (s if a != axis else (position,) for a, s in enumerate(starts))
            corners = [vec3(c) for c in itertools.product(*here)]
            for i in range(0, len(corners), self._setting.batch):
                boxes = [self._box(c) for c in corners[i : i + self._setting.batch]]
                self._add(ledge, [lane.window(box) for box in boxes], boxes)
        yield from ledge.advance(core.stop[axis])

    def _box(self, corner: Vec3) -> Box:
        return Box(corner, vec3([a + p for a, p in zip(corner, self._setting.patch, strict=True)]))

    def _add(self, ledge: _Accumulator, windows: Sequence[Array], boxes: Sequence[Box]) -> None:
        """Run one batch of windows through every fold and add it, window by window in raster order."""
        with self._uploads.batch(windows) as batch:
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
        finished = self._span(self._first, position).intersect(self._core)
        for part in pieces(Box.of_shape(finished.shape), (1, 1, 1), max(1, FINISHED_VALUES // self._logits.shape[1])):
            box = part.shift(finished.start)
            yield box, self.finish(box)
        if position < self._core.stop[self._axis]:
            self._drop(count)
            self._first = position

    def finish(self, box: Box) -> Logits:
        """Mean logits [k, z, y, x] of a box of the held rows, whose windows have all been added."""
        assert self._first is not None
        rows = box.relative_to(self._span(self._first, self._first + self._weights.shape[self._axis])).slices
        weights = self._weights[rows]
        mean = self._logits[(0, slice(None), *rows)] / weights
        for fold in self._logits[1:]:
            mean += fold[(slice(None), *rows)] / weights
        if len(self._logits) > 1:
            mean /= len(self._logits)
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

    def __init__(
        self, source: WindowSource, core: Box, axis: int, patch: Vec3, starts: tuple[tuple[int, ...], ...]
    ) -> None:
        self.source, self.core, self.starts = source, core, starts
        self._axis, self._depth = axis, patch[axis]
        low = [s[0] for s in starts]
        high = [s[-1] + p for s, p in zip(starts, patch, strict=True)]
        high[axis] = low[axis]
        self._box = Box(vec3(low), vec3(high))  # what is held, no row yet
        self._data: Array = np.empty((source.channels, 0, 0, 0), np.float32)

    def fresh(self) -> Iterator[Box]:
        """The rows that ``advance`` needs at each position, which no position before needed."""
        read = self.starts[self._axis][0]
        for position in self.starts[self._axis]:
            first, read = max(position, read), position + self._depth
            yield self._box.with_span(self._axis, first, read)

    def advance(self, position: int, rows: Array) -> None:
        """Hold the rows ``position`` to ``position`` + patch, the last ones from ``fresh``."""
        count, kept = position - self._box.start[self._axis], max(0, self._box.stop[self._axis] - position)
        for i in range(0, kept, count or 1):  # in steps that do not overlap, so nothing is copied aside
            stop = min(i + count, kept)
            self._rows(i, stop)[...] = self._rows(i + count, stop + count)
        if kept:
            self._rows(kept, self._depth)[...] = rows
        else:
            self._data = rows
        self._box = self._box.with_span(self._axis, position, position + self._depth)

    def _rows(self, start: int, stop: int) -> Array:
        index = [slice(None)] * 4
        index[self._axis + 1] = slice(start, stop)
        view: Array = self._data[tuple(index)]
        return view

    def window(self, box: Box) -> Array:
        """float32 (c, z, y, x) of a window inside the held rows."""
        view: Array = self._data[(slice(None), *box.relative_to(self._box).slices)]
        return view


def _read_ahead(reads: Iterable[Part]) -> Generator[Array]:
    """What sources give at boxes, in order; while one is used, another thread reads and normalises the next."""
    with ThreadPoolExecutor(1) as reader:
        coming: Future[Array] | None = None
        for source, box in reads:
            before, coming = coming, reader.submit(source.get, box)
            if before is not None:
                yield before.result()
                del before
        if coming is not None:
            yield coming.result()
