"""Exact, mergeable intensity statistics of a case and nnU-Net's normalisation schemes.

The survey gathers the statistics tile by tile; the predictor normalises what it reads with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.models.spec import ChannelNormalisation
from connectomics.volumes.volume import Array

EPSILON = 1e-8  # nnU-Net's lower bound of a standard deviation in float32
PIECE = 1 << 20  # values summed at once: bounds the memory of the float64 and index copies


@dataclass(frozen=True, slots=True)
class IntensityStats:
    """Statistics of one channel over any set of voxels; ``a + b`` is that of both sets together.

    Nonzero voxels only are summed, so cropping to the nonzero box afterwards costs nothing: see ``summary``.

    Parameters
    ----------
    nonzero
        Number of voxels that are not zero.
    exact
        True for 8 and 16 bit integers: ``first`` is the sum and ``second`` the sum of squares, as unlimited integers,
        so merging does not depend on the order. False otherwise: ``first`` is the mean and ``second`` the sum of
        squared deviations from it, in float64.
    minimum, maximum
        Over the nonzero voxels; infinities when there are none.
    """

    nonzero: int
    exact: bool
    first: float
    second: float
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, values: Array) -> IntensityStats:
        """Statistics of an array of finite numbers, any shape."""
        exact = is_exact(values.dtype)
        total = cls(0, exact, 0, 0)
        flat = values.reshape(-1)
        for i in range(0, flat.size, PIECE):
            piece = flat[i : i + PIECE]
            total += cls._of_histogram(piece) if exact else cls._of_moments(piece)
        return total

    @classmethod
    def _of_histogram(cls, values: Array) -> IntensityStats:
        lowest = int(np.iinfo(values.dtype).min)
        counts = _byte_counts(values) if values.dtype == np.uint8 else np.bincount(values.astype(np.intp) - lowest)
        if lowest <= 0 and -lowest < counts.size:
            counts[-lowest] = 0
        levels = np.flatnonzero(counts)
        if levels.size == 0:
            return cls(0, True, 0, 0)
        counts, levels = counts[levels], levels + lowest
        first, second = int(np.dot(counts, levels)), int(np.dot(counts, levels * levels))
        return cls(int(counts.sum()), True, first, second, minimum=float(levels[0]), maximum=float(levels[-1]))

    @classmethod
    def _of_moments(cls, values: Array) -> IntensityStats:
        numbers = values[values != 0].astype(np.float64)
        if numbers.size == 0:
            return cls(0, False, 0.0, 0.0)
        low, high, mean = float(numbers.min()), float(numbers.max()), float(numbers.mean())
        numbers -= mean
        return cls(numbers.size, False, mean, float(np.dot(numbers, numbers)), minimum=low, maximum=high)

    def __add__(self, other: IntensityStats) -> IntensityStats:
        """Merge; float moments after Chan, Golub and LeVeque (1979), equation 2.1."""
        count = self.nonzero + other.nonzero
        low, high = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        if self.exact:
            return IntensityStats(
                count, True, self.first + other.first, self.second + other.second, minimum=low, maximum=high
            )
        if 0 in (self.nonzero, other.nonzero):
            return other if self.nonzero == 0 else self
        gap = other.first - self.first
        share = other.nonzero / count
        second = self.second + other.second + gap * gap * self.nonzero * share
        return IntensityStats(count, False, self.first + gap * share, second, minimum=low, maximum=high)

    def summary(self, voxels: int) -> ChannelSummary:
        """Mean, standard deviation, minimum and maximum over ``voxels`` voxels, of which all others are zero.

        Zeros where there are no voxels.
        """
        if voxels == 0:
            return ChannelSummary(0.0, 0.0, 0.0, 0.0)
        zeros = voxels - self.nonzero
        if self.exact:
            mean = Fraction(int(self.first), voxels)
            variance = Fraction(int(self.second), voxels) - mean * mean
            return ChannelSummary(float(mean), math.sqrt(variance), *self.limits(voxels))
        both = self + IntensityStats(zeros, False, 0.0, 0.0)
        return ChannelSummary(both.first, math.sqrt(both.second / voxels), *self.limits(voxels))

    def limits(self, voxels: int) -> tuple[float, float]:
        """Minimum and maximum over ``voxels`` voxels, of which all others are zero."""
        if voxels == self.nonzero:
            return self.minimum, self.maximum
        return min(self.minimum, 0.0), max(self.maximum, 0.0)


def _byte_counts(values: Array) -> Array:
    """How often each value of a flat uint8 array occurs; two neighbours are counted as one number, in half the time."""
    even = values.size - values.size % 2
    if even and values.flags.c_contiguous:
        pairs = np.bincount(values[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
        counts: Array = pairs.sum(0) + pairs.sum(1) + np.bincount(values[even:], minlength=256)
        return counts
    return np.bincount(values, minlength=256)


def is_exact(dtype: np.dtype[Any]) -> bool:
    """Whether statistics of this type are integer sums."""
    return dtype.kind in "iu" and dtype.itemsize <= 2


@dataclass(frozen=True, slots=True)
class ChannelSummary:
    """What normalisation needs to know of one channel of one case; ``std`` is that of the population."""

    mean: float
    std: float
    minimum: float
    maximum: float


def check_intensities(scheme: ChannelNormalisation, summary: ChannelSummary, where: str) -> None:
    """Refuse RGB intensities that leave the range 0 to 255, by a VolumeError."""
    if scheme.scheme == "RGBTo01Normalization" and (summary.minimum < 0 or summary.maximum > 255):
        raise VolumeError(
            f"{where}: the model expects RGB intensities from 0 to 255, found {summary.minimum:g} to "
            f"{summary.maximum:g}; convert the images to 8 bit"
        )


def normalise(image: Array, scheme: ChannelNormalisation, summary: ChannelSummary, mask: Array | None = None) -> Array:
    """Normalise one channel, operation for operation as nnunetv2's scheme of the same name.

    Parameters
    ----------
    image
        Raw intensities, any shape and dtype.
    scheme
        The channel's scheme and, for CT, the plan's constants.
    summary
        Of the whole case this channel belongs to.
    mask
        bool, same shape: which voxels become z-scores, the others keep their value; None: all.

    Returns
    -------
    array
        float32, same shape; a new array.
    """
    result: Array = image.astype(np.float32)
    if scheme.scheme == "ZScoreNormalization":
        where = True if mask is None else mask
        np.subtract(result, np.float32(summary.mean), out=result, where=where)
        np.divide(result, max(np.float32(summary.std), np.float32(EPSILON)), out=result, where=where)
    elif scheme.scheme == "CTNormalization":
        assert scheme.mean is not None and scheme.std is not None, "the model's loader requires CT constants"
        np.clip(result, scheme.lower, scheme.upper, out=result)
        result -= scheme.mean
        result /= max(scheme.std, EPSILON)
    elif scheme.scheme == "RescaleTo01Normalization":
        low = np.float32(summary.minimum)
        result -= low
        result /= max(np.float32(summary.maximum) - low, np.float32(EPSILON))
    elif scheme.scheme == "RGBTo01Normalization":
        result /= 255.0
    return result
