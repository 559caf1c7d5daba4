"""nnU-Net's resampling, piece by piece: the network sees a case at the plan's spacing, logits come back to the image's.

Voxels of the network's grid are computed in fixed tiles, so their bits do not depend on who asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage

from connectomics.errors import ModelError, VolumeError
from connectomics.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.inference.case import CaseInput
from connectomics.inference.normalise import normalise
from connectomics.inference.predictor import Logits, Predictor
from connectomics.io.volume import Array, Spacing
from connectomics.models.spec import ResamplingRule

TILE: Vec3 = (32, 128, 128)  # network voxels computed at once
HALO = 24  # input voxels around a tile: a cubic spline's reach, the pole 0.268 to the power of 24 is 2e-14
CUBIC = 3


@dataclass(frozen=True, slots=True)
class Resampling:
    """How one volume's cases are brought to the plan's spacing and their logits back.

    Parameters
    ----------
    spacing
        Of the volume (z, y, x), in the unit of the plans.
    target
        Of the network's grid (z, y, x), in the same unit; z of a 2D model is that of the volume.
    data, probabilities
        The plan's rules for intensities and for logits.
    """

    spacing: Spacing
    target: Spacing
    data: ResamplingRule
    probabilities: ResamplingRule

    def network_shape(self, shape: Vec3) -> Vec3:
        """Extent of a case of ``shape`` on the network's grid, by nnU-Net's own rule."""
        from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

        return vec3([int(n) for n in compute_new_shape(shape, self.spacing, self.target)])

    def separate(self, rule: ResamplingRule, *, back: bool) -> bool:
        """Whether sections are resampled each by itself, and z by another order, by nnU-Net's own rule.

        Raises
        ------
        ModelError
            If the axis of the thick voxels is not z.
        """
        from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

        pair = (self.target, self.spacing) if back else (self.spacing, self.target)
        separate, axis = determine_do_sep_z_and_axis(rule.force_separate_z, *pair)
        if separate and axis != 0:
            raise ModelError(
                f"voxels of spacing {self.spacing} (z, y, x) are longest along axis {axis}; expected z: resampling "
                "such volumes is not supported yet, reorder the axes with inference.axes or use nnU-Net itself"
            )
        return bool(separate)


@dataclass(slots=True)
class ResampledInput:
    """What ``CaseInput`` is for the image's grid, for the network's: ``get`` gives its voxels, zeros outside.

    Parameters
    ----------
    source
        The case at the image's spacing.
    resampling
        The rules.
    """

    source: CaseInput
    resampling: Resampling
    box: Box = field(init=False)
    _tiles: dict[Vec3, Array] = field(init=False, default_factory=dict)
    _separate: bool = field(init=False)

    def __post_init__(self) -> None:
        self.box = Box.of_shape(self.resampling.network_shape(self.source.box.shape))
        self._separate = self.resampling.separate(self.resampling.data, back=False)

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
        scales = [n / m for n, m in zip(self.source.box.shape, self.box.shape, strict=True)]
        if self._separate:
            return self._sections(tile, scales)
        near = _reach(tile, scales, self.source.box.shape, (HALO, HALO, HALO))
        image = self.source.get(near.shift(self.source.box.start)).astype(np.float64)
        offsets = [_centre(a, s) - b for a, s, b in zip(tile.start, scales, near.start, strict=True)]
        result = np.empty((self.channels, *tile.shape), np.float32)
        for c, (scheme, summary) in enumerate(zip(self.source.schemes, self.source.case.channels, strict=True)):
            low, high = normalise(np.array([summary.minimum, summary.maximum]), scheme, summary)
            result[c] = np.clip(_spline(image[c], scales, offsets, tile.shape), low, high)
        return result

    def _sections(self, tile: Box, scales: list[float]) -> Array:
        """Each section by itself, then the nearest section along z (the plan's ``order_z`` 0)."""
        origin, depth = self.source.box.start, self.source.box.shape[0]
        near = _reach(tile, scales, self.source.box.shape, (0, HALO, HALO))
        offsets = [_centre(a, s) - b for a, s, b in zip(tile.start, scales, near.start, strict=True)][1:]
        result = np.empty((self.channels, *tile.shape), np.float32)
        for i, z in enumerate(range(tile.start[0], tile.stop[0])):
            section = _nearest(z, scales[0], depth)
            plane = Box((section, *near.start[1:]), (section + 1, *near.stop[1:]))
            image = self.source.get(plane.shift(origin))[:, 0].astype(np.float64)
            for c, (scheme, summary) in enumerate(zip(self.source.schemes, self.source.case.channels, strict=True)):
                limits = np.array(self.source.case.plane_ranges[section][c])
                low, high = normalise(limits, scheme, summary)
                result[c, i] = np.clip(_spline(image[c], scales[1:], offsets, tile.shape[1:]), low, high)
        return result


class ResampledPredictor:
    """Predicts on the network's grid and brings the logits back to the image's.

    Parameters
    ----------
    inner
        Predicts on the network's grid.
    resampling
        The rules.
    """

    def __init__(self, inner: Predictor, resampling: Resampling) -> None:
        self._inner, self._resampling = inner, resampling
        self._separate = resampling.separate(resampling.probabilities, back=True)

    def windows(self, source: CaseInput, core: Box) -> int:
        """Number of windows that ``predict`` computes."""
        resampled = ResampledInput(source, self._resampling)
        return self._inner.windows(resampled, self._needed(resampled, core))

    def predict(self, source: CaseInput, core: Box) -> Iterator[tuple[Box, Logits]]:
        """Logits of ``core`` at the image's spacing; see ``Predictor``."""
        resampled = ResampledInput(source, self._resampling)
        if resampled.box.shape == source.box.shape:
            yield from self._inner.predict(source, core)
            return
        needed = self._needed(resampled, core)
        network: Logits | None = None
        for box, logits in self._inner.predict(resampled, needed):
            if network is None:
                network = logits.new_empty((len(logits), *needed.shape))
            network[(slice(None), *box.relative_to(needed).slices)] = logits
        assert network is not None
        local = core.relative_to(source.box)
        for z in range(local.start[0], local.stop[0]):
            plane = Box((z, *local.start[1:]), (z + 1, *local.stop[1:]))
            values = network
            for axis in range(3):
                values = self._along(values, axis, plane, needed, resampled.box.shape, source.box.shape)
            yield plane.shift(source.box.start), values.float()

    def _scales(self, resampled: ResampledInput) -> list[float]:
        return [m / n for n, m in zip(resampled.source.box.shape, resampled.box.shape, strict=True)]

    def _needed(self, resampled: ResampledInput, core: Box) -> Box:
        """The part of the network's grid that ``core`` is interpolated from."""
        local = core.relative_to(resampled.source.box)
        return _reach(local, self._scales(resampled), resampled.box.shape, (1, 1, 1))

    def _along(
        self, values: torch.Tensor, axis: int, plane: Box, needed: Box, network: Vec3, image: Vec3
    ) -> torch.Tensor:
        """Interpolate one axis: linear, or the nearest section where sections are separate."""
        scale, last = network[axis] / image[axis], network[axis] - 1
        if network[axis] == image[axis]:
            return _rows(values, axis, np.arange(plane.start[axis], plane.stop[axis]) - needed.start[axis])
        positions = np.clip(_centre(np.arange(plane.start[axis], plane.stop[axis]), scale), 0, last)
        if axis == 0 and self._separate:
            return _rows(values, axis, np.floor(positions + 0.5).astype(np.int64) - needed.start[axis])
        lower = np.floor(positions).astype(np.int64)
        share = torch.from_numpy(positions - lower).to(values.device)
        share = share.reshape([-1 if a == axis else 1 for a in range(3)])
        below = _rows(values, axis, lower - needed.start[axis])
        above = _rows(values, axis, np.minimum(lower + 1, last) - needed.start[axis])
        return below * (1 - share) + above * share


def _rows(values: torch.Tensor, axis: int, index: Array) -> torch.Tensor:
    """Rows of one axis of [k, z, y, x] in float64."""
    return values.index_select(axis + 1, torch.from_numpy(index).to(values.device)).double()


def _centre(index: Array | int, scale: float) -> Array:
    """Where the centre of voxel ``index`` lies on the other grid, whose voxels are ``scale`` times as many."""
    return (np.asarray(index) + 0.5) * scale - 0.5


def _nearest(index: int, scale: float, extent: int) -> int:
    return int(np.clip(np.floor(_centre(index, scale) + 0.5), 0, extent - 1))


def _reach(box: Box, scales: list[float], extent: Vec3, margin: Vec3) -> Box:
    """The part of the other grid, of ``extent``, that the voxels of ``box`` are interpolated from."""
    low, high = [], []
    for a, b, scale, n, m in zip(box.start, box.stop, scales, extent, margin, strict=True):
        low.append(int(np.clip(np.floor(_centre(a, scale)) - m, 0, n - 1)))
        high.append(int(np.clip(np.ceil(_centre(b - 1, scale)) + m + 1, low[-1] + 1, n)))
    return Box(vec3(low), vec3(high))


def _blocks_over(grid: BlockGrid, box: Box) -> Iterator[Vec3]:
    if not box.voxels:
        return
    spans = [range(a // n, -(-b // n)) for a, b, n in zip(box.start, box.stop, grid.block_shape, strict=True)]
    yield from ((z, y, x) for z in spans[0] for y in spans[1] for x in spans[2])


def _spline(image: Array, scales: list[float], offsets: list[Array], shape: tuple[int, ...]) -> Array:
    """Cubic spline interpolation of a float64 image at ``offset + scale * index``, the edge repeated outside."""
    result: Array = ndimage.affine_transform(
        image, np.array(scales), np.array(offsets, np.float64), shape, order=CUBIC, mode="nearest"
    )
    return result


def require_default(rule: ResamplingRule, order: int) -> None:
    """Refuse resampling functions this program does not have.

    Raises
    ------
    ModelError
        If the plans name another function or order than nnU-Net's default.
    """
    if rule.function != "resample_data_or_seg_to_shape" or (rule.order, rule.order_z) != (order, 0):
        raise ModelError(
            f"the plans resample with {rule.function} of order {rule.order} (z: {rule.order_z}), expected "
            f"resample_data_or_seg_to_shape of order {order} (z: 0); others are not supported yet: bring the volume "
            "to the plan's spacing yourself and set inference.resample=off"
        )


def check_ratio(spacing: Spacing, target: Spacing, *, allowed: bool, limit: float = 4.0) -> None:
    """Refuse a resampling that is more likely a mistaken unit than a wish.

    Raises
    ------
    VolumeError
        If a ratio exceeds ``limit`` and that is not allowed.
    """
    ratios = [max(a / b, b / a) for a, b in zip(spacing, target, strict=True)]
    if max(ratios) > limit and not allowed:
        raise VolumeError(
            f"the volume's spacing {spacing} and the plan's {target} (z, y, x) differ {max(ratios):.1f} fold; "
            "are both in the same unit? Set inference.spacing in the plan's unit, or confirm with "
            "inference.allow_large_resampling=true"
        )
