"""nnU-Net's global window grid and its Gaussian weight; every block asks the same grid which windows touch it."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from connectomics.core.geometry import Box, Vec3, vec3

VALUE_SCALE = 10.0  # nnU-Net scales its Gaussian to a maximum of 10
SIGMA_SHARE = 1.0 / 8.0  # of the patch, along each axis


def window_starts(extent: int, patch: int, step: float, near: tuple[int, int] | None = None) -> tuple[int, ...]:
    """First voxels of the windows along one axis, spread evenly over the whole extent.

    Parameters
    ----------
    extent
        Voxels along the axis, at least ``patch`` (pad first).
    patch
        Voxels of a window along the axis; windows one voxel deep visit each voxel once.
    step
        Largest distance between neighbours as a share of ``patch``, in (0, 1].
    near
        Only windows that share a voxel with ``near[0]`` to ``near[1]``; None: all.

    Raises
    ------
    ValueError
        If the extent is smaller than the patch.

    Notes
    -----
    As nnU-Net's ``compute_steps_for_sliding_window``: the number of windows is the least whose distance does not
    exceed ``step * patch``; starts are rounded half to even.

    Examples
    --------
    >>> window_starts(110, 64, 0.5)
    (0, 23, 46)
    """
    if extent < patch:
        raise ValueError(f"{extent} voxels hold no window of {patch}; pad first")
    last = extent - patch
    intervals = last if patch == 1 else math.ceil(last / (patch * step))
    distance = last / max(1, intervals)

    def start(i: int) -> int:
        return round(distance * i)

    numbers = range(intervals + 1)  # starts ascend, so the near ones are found without making all
    if near is not None:
        first = bisect_right(numbers, near[0] - patch, key=start)
        numbers = range(first, bisect_left(numbers, near[1], lo=first, key=start))
    return tuple(start(i) for i in numbers)


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """The windows of one case, in voxel coordinates of the volume.

    Parameters
    ----------
    box
        The case's nonzero box; where it is smaller than the patch it is padded evenly, the odd voxel after,
        so windows may reach outside the box (and outside the volume).
    patch
        Window shape (z, y, x).
    step
        Largest distance between windows as a share of the patch.
    """

    box: Box
    patch: Vec3
    step: float

    def starts(self, axis: int, near: tuple[int, int] | None = None) -> tuple[int, ...]:
        """First voxels of the windows along ``axis`` that share a voxel with ``near`` (None: all), ascending.

        All in volume coordinates.
        """
        extent, patch = self.box.shape[axis], self.patch[axis]
        padding = max(0, patch - extent)
        first = self.box.start[axis] - padding // 2
        wanted = None if near is None else (near[0] - first, near[1] - first)
        return tuple(first + s for s in window_starts(extent + padding, patch, self.step, wanted))

    def touching(self, box: Box) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return, for each axis, the starts of the windows that share a voxel with ``box``.

        Examples
        --------
        >>> WindowGrid(Box.of_shape((1, 128, 128)), (1, 64, 64), 0.5).touching(Box((0, 40, 0), (1, 41, 9)))
        ((0,), (0, 32), (0,))
        """
        z, y, x = (self.starts(axis, (box.start[axis], box.stop[axis])) for axis in range(3))
        return z, y, x

    def count(self, box: Box) -> int:
        """Number of windows that touch ``box``."""
        return math.prod(len(starts) for starts in self.touching(box))

    def __len__(self) -> int:
        return math.prod(len(self.starts(a)) for a in range(3))


def gaussian_weight(patch: Vec3) -> npt.NDArray[np.float32]:
    """Weight of each voxel of a window: a Gaussian of sigma patch/8, maximum 10, never zero; shape (z, y, x).

    Notes
    -----
    As nnU-Net's ``compute_gaussian`` with ``value_scaling_factor=10`` in float32; axes one voxel deep do not take part.
    """
    flat = tuple(p for p in patch if p > 1) or (1,)
    impulse = np.zeros(flat)
    impulse[tuple(p // 2 for p in flat)] = 1
    weight = gaussian_filter(impulse, [p * SIGMA_SHARE for p in flat], 0, mode="constant", cval=0)
    weight /= weight.max() / VALUE_SCALE
    result: npt.NDArray[np.float32] = weight.astype(np.float32)
    result[result == 0] = result[result != 0].min()
    return result.reshape(patch)


def constant_weight(patch: Vec3) -> npt.NDArray[np.float32]:
    """Equal weight 1 for each voxel of a window; shape (z, y, x)."""
    return np.ones(patch, np.float32)


def as_patch(values: tuple[int, ...] | list[int], model_patch: Vec3) -> Vec3:
    """A user's window of two (y, x) or three (z, y, x) voxels as a patch; two keep the model's depth.

    Raises ValueError if there are neither two nor three.
    """
    return vec3(values) if len(values) != 2 else vec3([model_patch[0], *values])
