"""How much work a volume is, counted before anything of it is read: blocks, windows, voxels read.

Blocks are the product of spans along three axes, and so are the windows each of them touches. So one line of blocks
along each axis says all: time and memory do not grow with the number of blocks. ``forecast.volumes`` asks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import AxisOrder, Box, Vec3, vec3
from connectomics.inference.case import Case
from connectomics.inference.interpolation import HALO
from connectomics.inference.normalise import ChannelSummary
from connectomics.inference.predictor import SlidingWindow
from connectomics.inference.section_cases import SectionCases
from connectomics.inference.windows import window_starts
from connectomics.stages.predict.precision_check import SAMPLED_VOXELS
from connectomics.stages.predict.segmenter import EnsembleMember
from connectomics.volumes.volume import Array

Span = tuple[int, int]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Partition:
    """How the wanted part of a volume is cut into blocks.

    ``extent`` and ``block_shape`` (z, y, x), of the volume and of a block's core, are in voxels; the box is not empty.
    ``wanted`` is bool of ``counts``: which blocks hold a wanted voxel; None for all.
    """

    extent: Vec3
    block_shape: Vec3
    roi: Box
    wanted: Flags | None = None

    def along(self, axis: int) -> Iterator[Span]:
        """First voxel and the one after the last of the wanted part of each block along an axis, in order."""
        size, low, high = self.block_shape[axis], self.roi.start[axis], self.roi.stop[axis]
        for start in range(low - low % size, high, size):
            yield max(low, start), min(high, start + size)

    @property
    def counts(self) -> Vec3:
        """Blocks with wanted voxels along each axis."""
        spans = zip(self.roi.start, self.roi.stop, self.block_shape, strict=True)
        return vec3([-(-high // size) - low // size for low, high, size in spans])

    @property
    def blocks(self) -> int:
        """Number of blocks with wanted voxels."""
        return math.prod(self.counts) if self.wanted is None else int(np.count_nonzero(self.wanted))

    @property
    def voxels(self) -> int:
        """Voxels of the box that lie in blocks with wanted voxels."""
        if self.wanted is None:
            return self.roi.voxels
        lengths = [[stop - start for start, stop in self.along(axis)] for axis in range(3)]
        return _over(self.wanted, lengths)


def _over(wanted: Flags, lines: Sequence[Sequence[float]]) -> int:
    """The sum over the wanted blocks of the products of what stands for each of them along the three axes."""
    z, y, x = (np.array(line, np.float64) for line in lines)
    return round(float(np.einsum("ijk,i,j,k->", wanted, z, y, x)))


def assumed_cases(member: EnsembleMember, extent: Vec3, channels: int) -> Sequence[Case]:
    """The cases of a volume nobody has looked at: each fills its box; no memory is taken for sections."""
    if member.section_axis is None:
        whole = Box.of_shape(extent)
        return (Case(whole, whole, (ChannelSummary(0.0, 1.0, 0.0, 1.0),) * channels),)
    depth, height, width = AxisOrder.across(member.section_axis).turn(extent)
    boxes = np.broadcast_to(np.array([0, 0, height, width], np.int64), (depth, 4))
    values = np.broadcast_to(np.array([0.0, 1.0, 0.0, 1.0]), (depth, channels, 4))
    return SectionCases(0, (height, width), boxes, values, axis=member.section_axis)


def count_windows(member: EnsembleMember, partition: Partition, channels: int) -> int:
    """Windows that a member computes in all blocks of a volume whose nonzero boxes are the whole cases.

    Notes
    -----
    A block touches a(i) b(j) c(k) windows. The sums of the lines through the first block are Σa b c, a Σb c and
    a b Σc, of which the product, over (a b c)², is ΣaΣbΣc.
    """
    cases = assumed_cases(member, partition.extent, channels)
    first = [next(partition.along(axis)) for axis in range(3)]

    def count(axis: int, span: Span) -> int:
        spans = [span if a == axis else other for a, other in enumerate(first)]
        core = Box(vec3([a for a, _ in spans]), vec3([b for _, b in spans]))
        return _knowing(member).windows(_unread, cases, core)

    def line(axis: int) -> list[int]:
        if axis != member.section_axis:
            return [count(axis, span) for span in partition.along(axis)]
        one = count(axis, (first[axis][0], first[axis][0] + 1))  # one section is like the other
        return [one * (stop - start) for start, stop in partition.along(axis)]

    lines, unit = [line(axis) for axis in range(3)], count(0, first[0])
    if partition.wanted is None:
        return math.prod(map(sum, lines)) // unit**2
    relative = [[n / unit for n in lines[1]], [n / unit for n in lines[2]]]
    return _over(partition.wanted, [lines[0], *relative])


def count_sample_windows(member: EnsembleMember, partition: Partition, channels: int, piece: Vec3) -> int:
    """About the windows that a member computes in the sample on which fast is compared with exact."""
    shape = vec3([min(n, p) for n, p in zip(partition.roi.shape, piece, strict=True)])
    middle = [a + (n - p) // 2 for a, n, p in zip(partition.roi.start, partition.roi.shape, shape, strict=True)]
    box = Box.of_shape(shape).shift(vec3(middle))
    pieces = -(-min(SAMPLED_VOXELS, partition.roi.voxels) // box.voxels)
    cases = assumed_cases(member, partition.extent, channels)
    return pieces * _knowing(member).windows(_unread, cases, box)


def count_read(member: EnsembleMember, window: SlidingWindow, partition: Partition, *, whole: bool) -> int:
    """Voxels of a volume that a member reads in all its blocks; ``whole`` engines predict whole cases for each."""
    own, section = _in_model(member, partition)
    total = 1
    for axis, volume_axis in enumerate(member.order.axes):
        flat = window.patch[axis] == 1 or axis == section
        everything = whole and not flat
        reach = _Reach(member, window, own, axis)
        total *= sum(
            own[axis] if everything else stop - start if flat else reach.voxels(start, stop)
            for start, stop in partition.along(volume_axis)
        )
    return total


def batch_fill(member: EnsembleMember, window: SlidingWindow, partition: Partition, *, whole: bool) -> float:
    """Share of the rows of a member's forward passes that are windows, mirrored or not; the others are padding.

    ``whole`` engines fill batches from a whole section, or volume, rather than from a block.
    """
    own, section = _in_model(member, partition)
    counts = []
    for axis, volume_axis in enumerate(member.order.axes):
        reach = _Reach(member, window, own, axis)
        if whole:  # sections one by one
            alone = axis == section or (axis == 0 and window.patch[0] == 1)
            counts.append(Counter([1 if alone else reach.windows(0, own[axis])]))
        else:
            spans = partition.along(volume_axis)
            counts.append(Counter(b - a if axis == section else reach.windows(a, b) for a, b in spans))
    filled = rows = 0
    for each in itertools.product(*(count.items() for count in counts)):
        windows, times = (math.prod(numbers) for numbers in zip(*each, strict=True))
        filled += times * windows * window.passes
        rows += times * -(-windows * window.passes // window.batch) * window.batch
    return filled / rows


def _in_model(member: EnsembleMember, partition: Partition) -> tuple[Vec3, int | None]:
    """The volume's extent in the model's axes, and that of them across which sections lie, if they are cases."""
    own = member.order.turn(partition.extent)
    return own, None if member.section_axis is None else member.order.axes.index(member.section_axis)


class _Reach:
    """What a span touches along one axis of a model: its windows, and the voxels that they lie on."""

    def __init__(self, member: EnsembleMember, window: SlidingWindow, extent: Vec3, axis: int) -> None:
        self._extent, self._axis, self._window = extent, axis, window
        self._resampling = member.resampling
        self._network = extent if self._resampling is None else self._resampling.network_shape(extent)

    def voxels(self, start: int, stop: int) -> int:
        extent, grid = self._extent[self._axis], self._network[self._axis]
        if self._resampling is None or self._network == self._extent:
            low, high = self._windows(start, stop, grid)
            return high - low
        low, high = self._windows(*self._on_grid(start, stop), grid)
        ratio = extent / grid
        return min(extent, math.ceil(high * ratio) + HALO) - max(0, math.floor(low * ratio) - HALO)

    def windows(self, start: int, stop: int) -> int:
        """Number of them."""
        patch, grid = self._window.patch[self._axis], self._network[self._axis]
        return 1 if grid <= patch else len(window_starts(grid, patch, self._window.step, self._on_grid(start, stop)))

    def _on_grid(self, start: int, stop: int) -> Span:
        if self._resampling is None or self._network == self._extent:
            return start, stop
        return self._resampling.to_image(self._extent, self._network)[self._axis].reach(start, stop)

    def _windows(self, start: int, stop: int, extent: int) -> Span:
        patch = self._window.patch[self._axis]
        if extent <= patch:
            return 0, extent
        starts = window_starts(extent, patch, self._window.step, (start, stop))
        return starts[0], starts[-1] + patch


def _knowing(member: EnsembleMember) -> EnsembleMember:
    """The member of a second stage with labels of the first that nobody reads."""
    return replace(member, previous=_unread) if member.previous_values else member


def _unread(box: Box) -> Array:
    raise AssertionError(f"{box} was read to count windows")
