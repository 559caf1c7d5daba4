"""nnU-Net's resampling, piece by piece: the network sees a case at the plan's spacing, logits come back to the image's.

Voxels of the network's grid are computed in fixed tiles, so their bits do not depend on who asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from connectomics.core.errors import ModelError, VolumeError
from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.inference.cascade import PreviousLabels, StackedInput
from connectomics.inference.case import CaseInput, Range, WindowSource
from connectomics.inference.interpolation import AxisResampling, interpolated, reach_of, spline
from connectomics.inference.label_resampling import LabelResampling
from connectomics.inference.normalise import normalise
from connectomics.inference.predictor import Logits, Predictor
from connectomics.models.spec import DEFAULT_RESAMPLING, NO_RESAMPLING, TORCH_RESAMPLING, ResamplingRule
from connectomics.volumes.volume import Array, Spacing

TILE: Vec3 = (32, 128, 128)  # network voxels computed at once
LARGEST_RATIO = 4.0  # of spacings, unless more is allowed
CUBIC = 3  # the highest order of images
LINEAR = 1  # the highest order of logits: splines are clipped to the range of all of them, which nobody knows before
ImageSource = CaseInput | StackedInput[CaseInput, PreviousLabels]  # a case on the image's grid


@dataclass(frozen=True, slots=True)
class Resampling:
    """How one volume's cases are brought to the plan's spacing and their logits back.

    Parameters
    ----------
    spacing
        Of the volume along the model's axes (z, y, x), in the unit of the plans.
    target
        Of the network's grid (z, y, x), in the same unit; z of a 2D model is that of the volume.
    data, probabilities, labels
        The plan's rules for intensities, for logits and, in a cascade, for the labels of the previous stage.

    Raises
    ------
    ModelError
        If this program cannot resample by these rules.
    """

    spacing: Spacing
    target: Spacing
    data: ResamplingRule
    probabilities: ResamplingRule
    labels: ResamplingRule | None = None

    def __post_init__(self) -> None:
        check_rules(self.data, self.probabilities, self.labels)

    def network_shape(self, shape: Vec3) -> Vec3:
        """Extent of a case of ``shape`` on the network's grid, as nnU-Net has it; a VolumeError if an axis vanishes."""
        from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

        result = vec3([int(n) for n in compute_new_shape(shape, self.spacing, self.target)])
        if 0 in result:
            raise VolumeError(
                f"a case of {shape} voxels of spacing {self.spacing} has {result} voxels at the plan's spacing "
                f"{self.target}, expected at least 1 along each axis; check inference.spacing, or set "
                "inference.resample=off"
            )
        return result

    @property
    def data_axis(self) -> int | None:
        """The axis whose sections of the image are resampled each by itself, None where there is none."""
        return _separate_axis(self.data, self.spacing, self.target)

    def to_network(self, image: Vec3, network: Vec3) -> tuple[AxisResampling, ...]:
        """How each axis of a case of extent ``image`` is brought to the network's grid of extent ``network``."""
        return _axes(self.data, self.data_axis, image, network)

    def labels_to_network(self, image: Vec3, network: Vec3) -> LabelResampling:
        """How the labels of a previous stage are brought to the network's grid."""
        assert self.labels is not None, "only second stages of a cascade have labels"
        separate = _separate_axis(self.labels, self.spacing, self.target)
        return LabelResampling(_axes(self.labels, separate, image, network), separate)

    def to_image(self, image: Vec3, network: Vec3) -> tuple[AxisResampling, ...]:
        """How each axis of the logits is brought back."""
        separate = _separate_axis(self.probabilities, self.target, self.spacing)
        return _axes(self.probabilities, separate, network, image)


def _separate_axis(rule: ResamplingRule, current: Spacing, new: Spacing) -> int | None:
    """nnU-Net's own choice of the axis of thick sections."""
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    separate, axis = determine_do_sep_z_and_axis(rule.force_separate_z, current, new, rule.anisotropy_threshold)
    return int(axis) if separate else None


def _axes(rule: ResamplingRule, separate: int | None, old: Vec3, new: Vec3) -> tuple[AxisResampling, ...]:
    single = rule.function == TORCH_RESAMPLING
    within = LINEAR if single and separate is None else rule.order  # nnU-Net does not pass its mode on then
    orders = [rule.order_z if axis == separate else within for axis in range(3)]
    return tuple(AxisResampling(*each, single) for each in zip(old, new, orders, strict=True))


@dataclass(slots=True)
class ResampledInput:
    """What ``CaseInput`` is for the image's grid, for the network's: ``get`` gives its voxels, zeros outside."""

    source: CaseInput
    resampling: Resampling
    box: Box = field(init=False)
    _tiles: dict[Vec3, Array] = field(init=False, default_factory=dict)
    _separate: int | None = field(init=False)
    _axes: tuple[AxisResampling, ...] = field(init=False)

    def __post_init__(self) -> None:
        image = self.source.box.shape
        self.box = Box.of_shape(self.resampling.network_shape(image))
        self._separate = self.resampling.data_axis
        self._axes = self.resampling.to_network(image, self.box.shape)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.source.channels

    def get(self, box: Box) -> Array:
        """float32 (c, z, y, x) of a box of the network's grid."""
        result: Array = np.zeros((self.channels, *box.shape), np.float32)
        inner = box.intersect(self.box)
        grid = BlockGrid(self.box.shape, vec3([min(t, n) for t, n in zip(TILE, self.box.shape, strict=True)]))
        used: dict[Vec3, Array] = {}
        for index in _blocks_over(grid, inner):
            tile = grid.block(index).core
            values = self._tiles.get(index)
            used[index] = self._compute(tile) if values is None else values
            part = tile.intersect(inner)
            result[(slice(None), *part.relative_to(box).slices)] = used[index][
                (slice(None), *part.relative_to(tile).slices)
            ]
        self._tiles = used  # the next rows begin in the tiles of these
        return result

    def _compute(self, tile: Box) -> Array:
        near = reach_of(self._axes, tile)
        values = torch.from_numpy(self.source.get(near.shift(self.source.box.start)))
        within = [axis for axis in range(3) if axis != self._separate]
        if self._axes[within[0]].order > LINEAR:
            values = torch.from_numpy(self._splines(values.numpy(), within, tile, near))
        else:
            values = interpolated(values, self._axes, within[::-1], tile, near=near)
        if self._separate is not None:
            values = self._along(values, self._separate, tile, near)
        result: Array = values.numpy().astype(np.float32)
        return result

    def _splines(self, image: Array, within: list[int], tile: Box, near: Box) -> Array:
        """Interpolate along the axes ``within``; clip to the range of the case, or of each section if separate."""
        axes = [self._axes[axis] for axis in within]
        corners = [[corner[axis] for axis in within] for corner in (tile.start, tile.stop, near.start)]

        def clipped(values: Array, ranges: Sequence[Range]) -> Array:
            wanted = zip(values.astype(np.float64), self._limits(ranges), strict=True)
            return np.stack([np.clip(spline(channel, axes, *corners), *limits) for channel, limits in wanted])

        case, axis = self.source.case, self._separate
        if axis is None:
            return clipped(image, [(summary.minimum, summary.maximum) for summary in case.channels])
        ranges = case.plane_ranges[near.start[axis] : near.stop[axis]]
        return np.stack([clipped(image.take(i, axis + 1), r) for i, r in enumerate(ranges)], axis + 1)

    def _limits(self, ranges: Sequence[Range]) -> list[Array]:
        """Each channel's range of intensities, normalised."""
        wanted = zip(ranges, self.source.schemes, self.source.case.channels, strict=True)
        return [normalise(np.array(limits), scheme, summary) for limits, scheme, summary in wanted]

    def _along(self, values: torch.Tensor, axis: int, tile: Box, near: Box) -> torch.Tensor:
        """Across the sections, which stand on the network's grid already."""
        if self._axes[axis].order <= LINEAR:
            return interpolated(values, self._axes, [axis], tile, near=near)
        image = np.moveaxis(values.double().numpy(), axis + 1, 1)
        axes = [self._axes[axis], *(AxisResampling(n, n, LINEAR) for n in image.shape[2:])]
        corners = [tile.start[axis], 0, 0], [tile.stop[axis], *image.shape[2:]], [near.start[axis], 0, 0]
        result = np.stack([spline(channel, axes, *corners) for channel in image])
        return torch.from_numpy(np.moveaxis(result, 1, axis + 1))


@dataclass(frozen=True, slots=True)
class ResampledLabels:
    """The labels of a previous stage on the network's grid, a channel each."""

    source: PreviousLabels
    resampling: Resampling

    @property
    def box(self) -> Box:
        """The network's grid."""
        return Box.of_shape(self.resampling.network_shape(self.source.box.shape))

    @property
    def channels(self) -> int:
        """Number of labels."""
        return self.source.channels

    def get(self, box: Box) -> Array:
        """float32 (k, z, y, x) of a box of the network's grid: 1 where the label is, zeros outside."""
        result: Array = np.zeros((self.channels, *box.shape), np.float32)
        whole = self.box
        rule = self.resampling.labels_to_network(self.source.box.shape, whole.shape)
        inner = box.intersect(whole)
        for piece in BlockGrid(inner.shape, TILE) if inner.voxels else ():
            part = piece.core.shift(inner.start)
            near = rule.reach(part)
            labels = rule.apply(self.source.within_mask(near.shift(self.source.box.start)), part, near)
            self.source.mark(labels, result[(slice(None), *part.relative_to(box).slices)])
        return result


def _on_network_grid(source: ImageSource, resampling: Resampling) -> WindowSource:
    if isinstance(source, CaseInput):
        return ResampledInput(source, resampling)
    return StackedInput(ResampledInput(source.image, resampling), ResampledLabels(source.labels, resampling))


class ResampledPredictor:
    """Predicts, by another predictor, on the network's grid and brings the logits back to the image's."""

    def __init__(self, inner: Predictor, resampling: Resampling) -> None:
        self._inner, self._resampling = inner, resampling

    def windows(self, source: ImageSource, core: Box) -> int:
        """Number of windows that ``predict`` computes."""
        resampled = _on_network_grid(source, self._resampling)
        if resampled.box.shape == source.box.shape:
            return self._inner.windows(source, core)
        axes = self._resampling.to_image(source.box.shape, resampled.box.shape)
        return self._inner.windows(resampled, reach_of(axes, core.relative_to(source.box)))

    def try_memory(self, shape: Vec3, channels: int) -> None:
        """Try as if for a core of this shape (z, y, x) of the image; see ``Predictor``."""
        spacing, target = self._resampling.spacing, self._resampling.target
        ratios = zip(shape, spacing, target, strict=True)
        self._inner.try_memory(vec3([math.ceil(n * own / network) for n, own, network in ratios]), channels)

    def predict(self, parts: Iterable[tuple[ImageSource, Box]]) -> Iterator[tuple[Box, Logits]]:
        """Logits of each part at the image's spacing; see ``Predictor``."""
        for source, core in parts:
            yield from self._predict(source, core)

    def _predict(self, source: ImageSource, core: Box) -> Iterator[tuple[Box, Logits]]:
        resampled = _on_network_grid(source, self._resampling)
        if resampled.box.shape == source.box.shape:
            yield from self._inner.predict([(source, core)])
            return
        axes = self._resampling.to_image(source.box.shape, resampled.box.shape)
        local = core.relative_to(source.box)
        needed = reach_of(axes, local)
        network: Logits | None = None
        for box, logits in self._inner.predict([(resampled, needed)]):
            if network is None:
                network = logits.new_empty((len(logits), *needed.shape))
            network[(slice(None), *box.relative_to(needed).slices)] = logits
        assert network is not None
        for plane in local.sections():
            near = reach_of(axes, plane)
            values = network[(slice(None), *near.relative_to(needed).slices)]
            order = (2, 1, 0) if axes[0].single else (0, 1, 2)  # torch's sums begin with x; fewest voxels else
            yield plane.shift(source.box.start), interpolated(values, axes, order, plane, near=near).float()


def _blocks_over(grid: BlockGrid, box: Box) -> Iterator[Vec3]:
    if not box.voxels:
        return
    spans = [range(a // n, -(-b // n)) for a, b, n in zip(box.start, box.stop, grid.block_shape, strict=True)]
    yield from ((z, y, x) for z in spans[0] for y in spans[1] for x in spans[2])


def check_rules(data: ResamplingRule, probabilities: ResamplingRule, labels: ResamplingRule | None = None) -> None:
    """Refuse, by a ModelError, resampling that this program cannot do as nnU-Net does it, or that makes no sense."""
    advice = "bring the volume to the plan's spacing yourself and set inference.resample=off"
    stages = [] if labels is None else [("labels of the previous stage", labels, LINEAR)]
    for what, rule, highest in (("images", data, CUBIC), ("logits", probabilities, LINEAR), *stages):
        problem = rule.problem and f" and {rule.problem}, which is not supported"
        if rule.function not in (DEFAULT_RESAMPLING, TORCH_RESAMPLING, NO_RESAMPLING):
            problem = f", expected {DEFAULT_RESAMPLING}, {TORCH_RESAMPLING} or {NO_RESAMPLING}"
        elif max(rule.order, rule.order_z) > highest:
            problem = f" of order {rule.order} (across sections {rule.order_z}), supported are orders up to {highest}"
        if problem:
            raise ModelError(f"the plans resample {what} with {rule.function}{problem}; {advice}")
    if labels is not None and (labels.function == NO_RESAMPLING) != (data.function == NO_RESAMPLING):
        raise ModelError(
            f"the plans resample images with {data.function} and labels of the previous stage with {labels.function}, "
            f"so that they would not fit together; expected functions that bring both to one spacing; {advice}"
        )
    if labels is not None and labels.function == DEFAULT_RESAMPLING and labels.order_z > 0:
        raise ModelError(
            f"the plans resample labels of the previous stage across sections with order {labels.order_z}, supported "
            f"is order 0; {advice}"
        )
    if probabilities.function == NO_RESAMPLING != data.function:
        raise ModelError(
            f"the plans resample images with {data.function} and logits with {NO_RESAMPLING}, so that labels would not "
            f"fit the volume; expected a function for logits that brings them back; {advice}"
        )


def check_ratio(spacing: Spacing, target: Spacing, *, allowed: bool) -> None:
    """Refuse, by a VolumeError, a resampling that is more likely a mistaken unit than a wish, unless it is allowed."""
    ratios = [max(a / b, b / a) for a, b in zip(spacing, target, strict=True)]
    if max(ratios) > LARGEST_RATIO and not allowed:
        raise VolumeError(
            f"the volume's spacing {spacing} and the plan's {target} (z, y, x) differ {max(ratios):.1f} fold; "
            "are both in the same unit? Set inference.spacing in the plan's unit, or confirm with "
            "inference.allow_large_resampling=true"
        )
