"""What a step reads of a volume: labels, foreground, or the probability of each voxel's own label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.objects.pieces import FIXED_POINT
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

Units = tuple[float, float]
"""What a voxel of probability 1 adds to a row's sum, and its value as a minimum."""
NOT_PROBABILITIES: Units = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Values:
    """What of a volume is labelled.

    Parameters
    ----------
    volume
        Labels, ids or probabilities.
    channel
        Which of its channels.
    threshold
        Foreground is what exceeds it; None where the volume holds labels.
    joined
        Whether all labels count as one.
    """

    volume: VolumeReader
    channel: int = 0
    threshold: float | None = None
    joined: bool = False

    def __call__(self, box: Box) -> Array:
        """bool or unsigned integers (z, y, x) of a box."""
        values: Array = self.volume.read(box)[self.channel]
        if self.threshold is not None:
            return np.greater(values, self.threshold)
        if self.joined or values.dtype.kind == "b":
            return np.not_equal(values, 0)
        if values.dtype.kind == "i":
            if values.min() < 0:
                raise VolumeError(
                    f"labels in voxels {box.start} to {box.stop} (z, y, x) go down to {values.min()}; labels are 0 for "
                    "the background and positive numbers"
                )
            return values.view(values.dtype.str.replace("i", "u"))
        return values

    def raw(self, box: Box) -> Array:
        """The channel as it is (z, y, x)."""
        values: Array = self.volume.read(box)[self.channel]
        return values

    def of_threshold(self, units: Units | None) -> tuple[Callable[[Box], Array] | None, Units | None]:
        """Give what the threshold is held against, as probabilities for the table, and its units.

        Parameters
        ----------
        units
            As the volume states them: ``NOT_PROBABILITIES`` gives none, None takes those of its type.
        """
        if units == NOT_PROBABILITIES:
            return None, None
        return self.raw, units or probability_units(self.volume.info)


def probability_units(info: VolumeInfo, certain: float | None = None) -> Units:
    """What a voxel of probability 1 adds to a row's sum, and its value as a minimum.

    Parameters
    ----------
    info
        Of the volume of probabilities.
    certain
        The stored value of probability 1; None for 1 in fractions and for the largest value of integers.
    """
    if info.dtype.kind == "f":
        return FIXED_POINT * (certain or 1.0), certain or 1.0
    largest = float(certain or np.iinfo(info.dtype).max)
    return largest, largest


@dataclass(frozen=True, slots=True)
class ClassProbabilities:
    """The probability of each voxel's own label, from one channel, or from one for each label from 0 on."""

    probabilities: VolumeReader
    labels: Values

    def __call__(self, box: Box) -> Array:
        """Probabilities (z, y, x) of a box; a VolumeError if a label has no channel."""
        return self.of(box, self.labels.raw)

    def of(self, box: Box, labelled: Callable[[Box], Array]) -> Array:
        """Probabilities (z, y, x) of a box, of other labels than its own; a VolumeError if one has no channel."""
        found = self.probabilities.read(box)
        if len(found) == 1:
            only: Array = found[0]
            return only
        labels = labelled(box)
        if labels.max() >= len(found):
            raise VolumeError(
                f"label {labels.max()} in voxels {box.start} to {box.stop} (z, y, x) has no channel among the "
                f"{len(found)} of the probabilities; give one channel, or one for each label from 0 on"
            )
        chosen: Array = np.take_along_axis(found, labels[None].astype(np.intp), axis=0)[0]
        return chosen
