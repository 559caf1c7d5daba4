"""nnU-Net's resampling of segmentations, piece by piece: each label's share of a voxel, and the largest wins.

``resample.Resampling`` says by which rule; with it the labels of a cascade's previous stage come to the network's grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from connectomics.core.geometry import Box
from connectomics.inference.interpolation import AxisResampling, interpolated, reach_of
from connectomics.volumes.volume import Array

LINEAR = 1  # the highest order of labels
SCALE = 1000.0  # nnU-Net's torch function compares shares in half precision, a thousandfold


@dataclass(frozen=True, slots=True)
class LabelResampling:
    """How labels are brought from one grid to another.

    Parameters
    ----------
    axes
        How each axis (z, y, x) is resampled, of order 0 or 1.
    separate
        The axis whose sections are resampled each by itself, before the axis itself is; None where there is none.
    """

    axes: tuple[AxisResampling, ...]
    separate: int | None

    def reach(self, box: Box) -> Box:
        """The part of the old grid that the voxels of ``box`` are made of."""
        return reach_of(self.axes, box)

    def apply(self, labels: Array, box: Box, near: Box) -> Array:
        """The labels of ``box``, as nnU-Net finds them in the whole case.

        Parameters
        ----------
        labels
            Integers (z, y, x) of the old grid's box ``near``, which holds ``self.reach(box)``.

        Returns
        -------
        array
            (z, y, x) of the box's extent, of the same dtype.
        """
        within = [axis for axis in range(3) if axis != self.separate]
        stages = [within] if self.separate is None else [within, [self.separate]]
        for axes in stages:
            if labels.size and (labels == labels.flat[0]).all():
                return np.full(box.shape, labels.flat[0], labels.dtype)
            labels = self._along(labels, axes, box, near)
        return labels

    def _along(self, labels: Array, axes: Sequence[int], box: Box, near: Box) -> Array:
        """Resample along some axes; the others are left as they are."""
        if all(self.axes[axis].order == 0 for axis in axes):
            values = torch.from_numpy(np.ascontiguousarray(labels))[None].double()
            nearest: Array = interpolated(values, self.axes, axes, box, near=near)[0].numpy().astype(labels.dtype)
            return nearest
        if self.axes[axes[0]].single:
            return self._largest_half(labels, axes, box, near)
        return self._largest(labels, axes, box, near)

    def _largest_half(self, labels: Array, axes: Sequence[int], box: Box, near: Box) -> Array:
        """Choose as ``resample_torch_simple`` does: the lowest of the labels that share most in half precision."""
        present = np.unique(labels)
        shares = torch.from_numpy(np.stack([labels == label for label in present])).float() * SCALE
        winner = interpolated(shares, self.axes, axes[::-1], box, near=near).half().argmax(0)
        result: Array = present[winner.numpy()]
        return result

    def _largest(self, labels: Array, axes: Sequence[int], box: Box, near: Box) -> Array:
        """Choose as batchgenerators' ``resize_segmentation``: float64 shares, ties to the nearest voxel's label."""
        taps = [
            self.axes[a].weighted_taps(box.start[a], box.stop[a], near.start[a]) if a in axes else _unchanged(n)
            for a, n in enumerate(labels.shape)
        ]
        corners = list(itertools.product(*([0, 1] if len(pairs) > 1 else [0] for pairs in taps)))
        found = [labels[np.ix_(*(pairs[i][0] for pairs, i in zip(taps, c, strict=True)))] for c in corners]
        result = found[0].copy()
        open_ = np.logical_or.reduce([other != result for other in found[1:]])
        at = np.nonzero(open_)
        weights = [_product([pairs[i][1][p] for pairs, i, p in zip(taps, c, at, strict=True)]) for c in corners]
        nearest = labels[tuple(self._nearest(a, box, near, a in axes)[p] for a, p in enumerate(at))]
        result[open_] = _winners([values[open_] for values in found], weights, nearest)
        return result

    def _nearest(self, axis: int, box: Box, near: Box, resampled: bool) -> Array:
        if not resampled:
            return np.arange(near.shape[axis])
        return self.axes[axis].nearest(box.start[axis], box.stop[axis]) - near.start[axis]


def _unchanged(length: int) -> list[tuple[Array, Array]]:
    return [(np.arange(length), np.ones(length))]


def _product(factors: Sequence[Array]) -> Array:
    """(a × b) × c, in the order in which scipy multiplies its weights."""
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result


def _winners(taps: Sequence[Array], weights: Sequence[Array], nearest: Array) -> Array:
    """The label with the largest sum of weights; of equal ones the nearest voxel's, else the lowest."""
    best = np.full(nearest.shape, -1.0)
    own = best.copy()
    result = np.empty_like(nearest)
    for label, share in _shares(taps, weights):
        better = share > best
        result[better], best[better] = label, share[better]
        own = np.where(nearest == label, share, own)
    return np.where(own == best, nearest, result)


def _shares(taps: Sequence[Array], weights: Sequence[Array]) -> Iterator[tuple[int, Array]]:
    """Each label, in rising order, with the sum of the weights of its voxels."""
    for label in np.unique(np.stack(taps)):
        share = np.zeros(weights[0].shape)
        for values, weight in zip(taps, weights, strict=True):
            share += np.where(values == label, weight, 0.0)
        yield label, share
