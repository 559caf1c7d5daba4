"""One axis at a time: which voxels of one grid a voxel of another is made of, computed as nnU-Net's libraries do.

Positions are those of the whole axis, so that values do not depend on the part that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from connectomics.core.geometry import Box, vec3
from connectomics.volumes.volume import Array

HALO = 24  # voxels around a part: a cubic spline's reach, the pole 0.268 to the power of 24 is 2e-14


@dataclass(frozen=True, slots=True)
class AxisResampling:
    """One axis of two grids that cover the same extent.

    Parameters
    ----------
    old, new
        Voxels of the grid that is read and of the one that is made.
    order
        0 takes the nearest voxel, 1 is linear, 2 and 3 are splines.
    single
        Whether positions and sums are torch's in float32, else scipy's in float64.
    """

    old: int
    new: int
    order: int
    single: bool = False

    def _positions(self, start: int, stop: int) -> Array:
        """float64: where the centres of voxels ``start`` to ``stop`` lie on the old grid."""
        centres = np.arange(start, stop) + 0.5
        if not self.single:
            positions: Array = np.clip(centres * (self.old / self.new) - 0.5, 0, self.old - 1)
            return positions
        scale = float(np.float32(self.old) / np.float32(self.new))
        rounded = (centres * scale - 0.5).astype(np.float32)  # once: torch multiplies and subtracts in one step
        return np.maximum(rounded, 0).astype(np.float64)

    def _taps(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """The two old voxels that each new one lies between, and the share of the second in float64."""
        if self.order == 0:
            nearest = self.nearest(start, stop)
            return nearest, nearest, np.zeros(len(nearest))
        positions = self._positions(start, stop)
        lower = np.minimum(np.floor(positions).astype(np.int64), self.old - 1)
        return lower, np.minimum(lower + 1, self.old - 1), np.minimum(positions - lower, 1)

    def nearest(self, start: int, stop: int) -> Array:
        """The old voxel whose centre is nearest to each new one's, as order 0 takes it."""
        positions = self._positions(start, stop)
        upper = (positions + 0.5).astype(np.float32) if self.single else positions + 0.5
        result: Array = np.minimum(np.floor(upper).astype(np.int64), self.old - 1)
        return result

    def weighted_taps(self, start: int, stop: int, first: int) -> list[tuple[Array, Array]]:
        """Index from ``first`` on, and weight in float64, of the two voxels of order 1, bit for bit scipy's weights."""
        positions = self._positions(start, stop)
        lower = np.minimum(np.floor(positions).astype(np.int64), self.old - 1)
        below = 1.0 - (positions - lower)
        return [(lower - first, below), (np.minimum(lower + 1, self.old - 1) - first, 1.0 - below)]

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 of the old voxels that the new ones ``start`` to ``stop`` are made of."""
        if self.order < 2:
            lower, upper, _ = self._taps(start, stop)
            return int(lower[0]), int(upper[-1]) + 1
        first, last = self._positions(start, stop)[[0, -1]]
        return max(0, int(np.floor(first)) - HALO), min(self.old, int(np.ceil(last)) + HALO + 1)

    def interpolate(self, values: torch.Tensor, axis: int, start: int, stop: int, first: int) -> torch.Tensor:
        """The voxels ``start`` to ``stop`` along one axis, of order 0 or 1.

        Parameters
        ----------
        values
            [c, z, y, x] with the old voxels from ``first`` on along ``axis`` (0 = z, 1 = y, 2 = x).

        Returns
        -------
        tensor
            float32 where ``single``, else float64.
        """
        lower, upper, share = self._taps(start, stop)
        below = _rows(values, axis, lower - first, torch.float32 if self.single else torch.float64)
        if not share.any():
            return below
        above = _rows(values, axis, upper - first, below.dtype)
        part = torch.from_numpy(share).to(values.device).reshape([-1 if a == axis else 1 for a in range(3)])
        if not self.single:
            return below * (1 - part) + above * part
        # torch rounds the second product, then adds the first in one step; both factors have 24 bits
        second = above * part.float()
        return (below.double() * (1 - part).float().double() + second.double()).float()


def reach_of(axes: Sequence[AxisResampling], box: Box) -> Box:
    """The part of the old grid that the voxels of ``box`` are made of."""
    spans = [axis.reach(a, b) for axis, a, b in zip(axes, box.start, box.stop, strict=True)]
    return Box(vec3([a for a, _ in spans]), vec3([b for _, b in spans]))


def interpolated(
    values: torch.Tensor, axes: Sequence[AxisResampling], order: Sequence[int], box: Box, near: Box
) -> torch.Tensor:
    """The voxels of ``box`` along some axes, one after the other, from values [c, z, y, x] that begin at ``near``."""
    for axis in order:
        values = axes[axis].interpolate(values, axis, box.start[axis], box.stop[axis], first=near.start[axis])
    return values


def _rows(values: torch.Tensor, axis: int, index: Array, dtype: torch.dtype) -> torch.Tensor:
    return values.index_select(axis + 1, torch.from_numpy(index).to(values.device)).to(dtype)


def spline(
    image: Array, axes: Sequence[AxisResampling], start: Sequence[int], stop: Sequence[int], first: Sequence[int]
) -> Array:
    """Voxels ``start`` to ``stop`` by a spline of the highest order of ``axes``, the edge repeated outside.

    Parameters
    ----------
    image
        float64, any number of axes: the old voxels from ``first`` on.
    axes
        One for each axis of the image.

    Returns
    -------
    array
        float64.
    """
    scales = [axis.old / axis.new for axis in axes]
    offsets = [(a + 0.5) * scale - 0.5 - b for a, scale, b in zip(start, scales, first, strict=True)]
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    order = max(axis.order for axis in axes)
    result: Array = ndimage.affine_transform(image, np.array(scales), offsets, shape, order=order, mode="nearest")
    return result
