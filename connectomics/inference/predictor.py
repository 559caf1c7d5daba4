"""Logits of any box of a case, equal to those of the whole case: global windows, rolling float32 accumulators.

The segmenter asks for the box a block writes; ``InferenceManager`` asks for the whole case.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from connectomics.core.geometry import Box, Vec3, pieces, vec3
from connectomics.inference.case import WindowSource
from connectomics.inference.transfer import uploads_to
from connectomics.inference.tta import forward_mirrored, mirror_combinations
from connectomics.inference.windows import WindowGrid, constant_weight, gaussian_weight
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.probe import naming_what_ran_out
from connectomics.volumes.volume import Array

Logits = torch.Tensor
Part = tuple[WindowSource, Box]
"""A case and what is wanted of it, a box inside its nonzero box."""
Folds = Iterable[torch.Tensor]
"""A window's weighted logits [k, z, y, x], or a batch's, of one fold after the other."""
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
        Rows of a forward pass, each a window or its mirror image.
    """

    patch: Vec3
    step: float = 0.5
    blending: str = "gaussian"
    mirror_axes: tuple[int, ...] = ()
    batch: int = 1

    @property
    def group(self) -> int:
        """Windows computed together: as few as, with their mirror images, leave no row of a pass empty."""
        return self.batch // math.gcd(self.batch, self.passes)

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

    def try_memory(self, shape: Vec3, channels: int) -> None:
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
        """The axis along which the accumulator rolls."""
        return 0 if self._setting.patch[0] > 1 else 1

    @torch.inference_mode()
    def try_memory(self, shape: Vec3, channels: int) -> None:
        """See ``Predictor``: sums of that shape, one full group of empty windows in them, finished rows."""
        patch, axis, count = self._setting.patch, self._axis, self._setting.group
        core = Box.of_shape(shape if axis == 0 else (1, *shape[1:]))
        window = Box.of_shape(patch)
        with naming_what_ran_out(
            f"sums of blocks of {shape} voxels and {self._setting.batch} windows do not fit the device's memory",
            "end what else runs there, set a smaller inference.block_shape or sw_batch_size, or use system.device=cpu",
        ):
            accumulator = self._accumulator(core, window)
            empty = np.zeros((channels, *patch), np.float32)
            with self._uploads.batch([empty] * count, (count, *empty.shape)) as batch:
                for folds in self._through_folds(batch):
                    accumulator.add(window, folds, self._weight)
            for part in pieces(window.intersect(core), (1, 1, 1), max(1, FINISHED_VALUES // self._classes)):
                accumulator.finish(part).amax().item()  # waits for the device, which says only then what went wrong

    def _grid(self, source: WindowSource) -> WindowGrid:
        return WindowGrid(source.box, self._setting.patch, self._setting.step)

    def _accumulator(self, core: Box, first: Box) -> _Accumulator:
        return _Accumulator(len(self._folds), self._classes, core, self._axis, window=first, device=self._device)

    @torch.inference_mode()
    def predict(self, parts: Iterable[Part]) -> Iterator[tuple[Box, Logits]]:
        sweeps, reads = itertools.tee(self._sweeps(parts))
        with contextlib.closing(_read_ahead((sweep.source, box) for sweep in reads for box in sweep.fresh())) as read:
            windows = (window for sweep in sweeps for window in sweep.windows())
            yield from self._blended(self._computed(windows, _Rows(self._axis, read)))

    def _sweeps(self, parts: Iterable[Part]) -> Iterator[_Sweep]:
        for source, core in parts:
            for box in [core] if self._axis == 0 else core.sections():
                yield _Sweep(source, box, self._axis, self._setting.patch, starts=self._grid(source).touching(box))

    def _computed(self, windows: Iterator[_Window], rows: _Rows) -> Iterator[tuple[_Window, Folds]]:
        """Each window with its logits; those that fill the network's batches together, whatever rows they lie in."""
        while group := list(itertools.islice(windows, self._setting.group)):
            shape = (len(group), group[0].sweep.source.channels, *self._setting.patch)
            with self._uploads.batch(map(rows.window, group), shape) as batch:
                yield from zip(group, self._through_folds(batch), strict=True)

    def _through_folds(self, batch: torch.Tensor) -> Iterator[Folds]:
        """Window by window what the folds give.

        All folds are computed before the first window is added, because the next one may lie in rows that begin only
        when it is; a window alone takes them one after the other.
        """
        folds: Folds = (self._weighted(backend, batch) for backend in self._folds)
        if len(batch) > 1:
            folds = list(folds)
        for i in range(len(batch)):
            yield map(operator.itemgetter(i), folds)

    def _weighted(self, backend: Backend, batch: torch.Tensor) -> torch.Tensor:
        logits = forward_mirrored(backend, batch, self._setting.mirror_axes)
        logits *= self._weight
        return logits

    def _blended(self, computed: Iterable[tuple[_Window, Folds]]) -> Iterator[tuple[Box, Logits]]:
        """Add up the windows of one sweep after the other, and give out rows that no later window touches."""
        accumulator: _Accumulator | None = None
        for window, folds in computed:
            accumulator = accumulator or self._accumulator(window.sweep.core, window.box)
            accumulator.add(window.box, folds, self._weight)
            if window.next_row is not None:
                yield from accumulator.advance(window.next_row)
                if window.next_row == window.sweep.core.stop[self._axis]:
                    accumulator = None


class _Accumulator:
    """Weighted sums of the rows of a box that unfinished windows still touch; rolls along one axis.

    It begins with the rows of the box's first window.
    """

    def __init__(self, folds: int, classes: int, core: Box, axis: int, window: Box, device: torch.device) -> None:
        self._core, self._axis = core, axis
        self._first = window.start[axis]  # voxel along the axis of the first row held
        shape = list(core.shape)
        shape[axis] = window.shape[axis]
        self._logits = torch.zeros((folds, classes, *shape), dtype=torch.float32, device=device)
        self._weights = torch.zeros(tuple(shape), dtype=torch.float32, device=device)

    def advance(self, position: int) -> Iterator[tuple[Box, Logits]]:
        """Give out the rows before ``position``, which no later window touches, and make room for new ones."""
        finished = self._span(self._first, position).intersect(self._core)
        for part in pieces(Box.of_shape(finished.shape), (1, 1, 1), max(1, FINISHED_VALUES // self._logits.shape[1])):
            box = part.shift(finished.start)
            yield box, self.finish(box)
        if position < self._core.stop[self._axis]:
            self._drop(position - self._first)
            self._first = position

    def finish(self, box: Box) -> Logits:
        """Mean logits [k, z, y, x] of a box of the held rows, whose windows have all been added."""
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
        held = self._span(self._first, self._first + self._weights.shape[self._axis])
        both = window.intersect(held)
        return both.relative_to(held).slices, both.relative_to(window).slices

    def add(self, window: Box, folds: Folds, weight: torch.Tensor) -> None:
        """Add a window's weighted logits [k, z, y, x] of each fold, and its weight [z, y, x]."""
        here, there = self._common(window)
        for sums, logits in zip(self._logits, folds, strict=True):
            sums[(slice(None), *here)] += logits[(slice(None), *there)]
        self._weights[here] += weight[there]


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A box that an accumulator rolls over, all of a part or a section of it, and the starts of its windows."""

    source: WindowSource
    core: Box
    axis: int
    patch: Vec3
    starts: tuple[tuple[int, ...], ...]

    def windows(self) -> Iterator[_Window]:
        """Yield the windows in raster order."""
        rows = self.starts[self.axis]
        for position, following in zip(rows, (*rows[1:], self.core.stop[self.axis]), strict=True):
            corners = list(itertools.product(*self.starts[: self.axis], (position,), *self.starts[self.axis + 1 :]))
            for number, corner in enumerate(corners, 1):
                box = Box.of_shape(self.patch).shift(vec3(corner))
                yield _Window(self, box, following if number == len(corners) else None)

    def fresh(self) -> Iterator[Box]:
        """Yield, for each position of a window along the axis, the rows that it needs and none before it needed."""
        read = self.starts[self.axis][0]
        for position in self.starts[self.axis]:
            first, read = max(position, read), position + self.patch[self.axis]
            yield self.rows(first, read)

    def rows(self, start: int, stop: int) -> Box:
        """All that windows cover across the axis, from ``start`` to ``stop`` along it."""
        low, high = [s[0] for s in self.starts], [s[-1] + p for s, p in zip(self.starts, self.patch, strict=True)]
        return Box(vec3(low), vec3(high)).with_span(self.axis, start, stop)


@dataclass(frozen=True, slots=True)
class _Window:
    """A window of a sweep; after the last one of a row, ``next_row`` is where the next begins, or the sweep's end."""

    sweep: _Sweep
    box: Box
    next_row: int | None


class _Rows:
    """The normalised rows that windows are cut from: each is read once and kept while windows of its sweep need it.

    ``read`` gives what each sweep calls ``fresh``, one sweep after the other.
    """

    def __init__(self, axis: int, read: Iterator[Array]) -> None:
        self._axis, self._read = axis, read
        self._sweep: _Sweep | None = None
        self._held = Box.of_shape((0, 0, 0))
        self._data: Array = np.empty((0, 0, 0, 0), np.float32)

    def window(self, window: _Window) -> Array:
        """float32 (c, z, y, x) of a window, valid until the next one is asked for; asked for in raster order."""
        start, stop = window.box.start[self._axis], window.box.stop[self._axis]
        if window.sweep is not self._sweep:
            self._data = next(self._read)
        elif start > self._held.start[self._axis]:
            self._advance(start - self._held.start[self._axis], stop - start)
        self._sweep, self._held = window.sweep, window.sweep.rows(start, stop)
        view: Array = self._data[(slice(None), *window.box.relative_to(self._held).slices)]
        return view

    def _advance(self, count: int, depth: int) -> None:
        """Drop the first ``count`` of the rows, ``depth`` as before are held then."""
        fresh, kept = next(self._read), max(0, depth - count)
        if not kept:
            self._data = fresh
            return
        for i in range(0, kept, count):  # in steps that do not overlap, so nothing is copied aside
            stop = min(i + count, kept)
            self._part(i, stop)[...] = self._part(i + count, stop + count)
        self._part(kept, depth)[...] = fresh

    def _part(self, start: int, stop: int) -> Array:
        index = [slice(None)] * 4
        index[self._axis + 1] = slice(start, stop)
        view: Array = self._data[tuple(index)]
        return view


def _read_ahead(reads: Iterable[Part]) -> Generator[Array]:
    """What sources give at boxes, in order; while one is used, another thread reads and normalises the next."""
    reads = iter(reads)
    first = list(itertools.islice(reads, 2))
    if len(first) == 1:  # a thread costs more than it saves
        yield first[0][0].get(first[0][1])
        return
    with ThreadPoolExecutor(1) as reader:
        coming: Future[Array] | None = None
        for source, box in itertools.chain(first, reads):
            before, coming = coming, reader.submit(source.get, box)
            if before is not None:
                yield before.result()
                del before
        if coming is not None:
            yield coming.result()
