"""What the second stage of a cascade sees besides the image: the labels of the first stage, a channel for each.

``stages.predict.task.EnsembleMember`` stacks them on its cases; ``resample`` brings both to the network's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from connectomics.core.geometry import Box
from connectomics.inference.case import Case, ReadBox, WindowSource
from connectomics.volumes.volume import Array

I = TypeVar("I", bound=WindowSource)  # noqa: E741 - image
L = TypeVar("L", bound=WindowSource)
OUTSIDE = -1  # what nnU-Net makes of background outside the mask of nonzero voxels


@dataclass(frozen=True, slots=True)
class PreviousLabels:
    """The labels of a previous stage within a case.

    Parameters
    ----------
    case
        The case of the image, whose nonzero box labels are cropped to as well.
    values
        The labels that have a channel, in its order.
    read
        Gives labels (1, z, y, x) of a box inside the volume, of a signed type.
    """

    case: Case
    values: tuple[int, ...]
    read: ReadBox

    @property
    def box(self) -> Box:
        """The case's nonzero box."""
        return self.case.box

    @property
    def channels(self) -> int:
        """Number of labels."""
        return len(self.values)

    def get(self, box: Box) -> Array:
        """float32 (k, z, y, x) of any box: 1 where the label is; outside the nonzero box zeros."""
        result: Array = np.zeros((self.channels, *box.shape), np.float32)
        inner = box.intersect(self.case.box)
        if inner.voxels:
            self.mark(self.read(inner)[0], result[(slice(None), *inner.relative_to(box).slices)])
        return result

    def mark(self, labels: Array, channels: Array) -> None:
        """Write 1 into each label's channel (k, z, y, x) where ``labels`` (z, y, x) has it."""
        present = set(np.unique(labels).tolist())
        for value, channel in zip(self.values, channels, strict=True):
            if value in present:
                channel[labels == value] = 1

    def within_mask(self, box: Box) -> Array:
        """Labels (z, y, x) of a box inside the nonzero box as they are resampled: background outside the mask is -1."""
        labels: Array = self.read(box)[0]
        mask = self.case.mask
        if mask is None:
            return labels
        return np.where((labels == 0) & ~mask(box)[0], labels.dtype.type(OUTSIDE), labels)


@dataclass(frozen=True, slots=True)
class StackedInput(Generic[I, L]):
    """The channels of an image and behind them those of labels, on one grid: a ``WindowSource``."""

    image: I
    labels: L

    @property
    def box(self) -> Box:
        """The extent of the window grid."""
        return self.image.box

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.image.channels + self.labels.channels

    def get(self, box: Box) -> Array:
        """float32 (c, z, y, x) of any box, zeros outside ``self.box``."""
        return np.concatenate([self.image.get(box), self.labels.get(box)])
