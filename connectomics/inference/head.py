"""From finished logits to what is stored: labels, and probabilities on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from connectomics.io.volume import Array

FLOAT32: np.dtype[Any] = np.dtype(np.float32)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of logits f32 [k, ...], the same bits for a voxel wherever it stands in the tensor.

    ``torch.softmax`` rounds the last few columns of a tensor differently, so its bits would depend on how a volume is
    cut. Here the sum runs over the classes in order, and every other step is rounded exactly or done by one vector
    function. It agrees with ``torch.softmax`` to 3e-7.
    """
    powers = torch.exp(logits - logits.amax(0))
    total = powers[0].clone()
    for power in powers[1:]:
        total += power
    return powers / total


@dataclass(frozen=True, slots=True)
class ProbabilityRule:
    """How probabilities are stored.

    Parameters
    ----------
    channels
        Classes to keep, in this order.
    softmax
        True for probabilities; False for the logits as they are (0 outside the nonzero box).
    scale
        Factor before the values are stored, 1 for none.
    dtype
        Type they are stored as; integers are rounded half to even and clipped to the type's range.
    """

    channels: tuple[int, ...]
    softmax: bool = True
    scale: float = 1.0
    dtype: np.dtype[Any] = FLOAT32

    @property
    def fits_png(self) -> bool:
        """Whether a stack of grey PNG images can hold what is stored."""
        return len(self.channels) == 1 and self.dtype in (np.uint8, np.uint16)

    def background(self) -> Array:
        """Values (c,) outside the nonzero box: nnU-Net's background 1, all others 0."""
        certain = torch.tensor([float(c == 0 and self.softmax) for c in self.channels])
        return self._stored(certain)

    def apply(self, logits: torch.Tensor) -> Array:
        """Stored values (c, z, y, x) of logits f32 [k, z, y, x]."""
        values = softmax(logits) if self.softmax else logits
        return self._stored(values[list(self.channels)])

    def _stored(self, values: torch.Tensor) -> Array:
        scaled: Array = (values * self.scale if self.scale != 1.0 else values).cpu().numpy()
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            scaled = np.clip(np.rint(scaled), limits.min, limits.max)
        return scaled.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class LabelRule:
    """How logits become labels: nnU-Net's argmax, or a threshold on the foreground.

    Parameters
    ----------
    dtype
        Of the labels.
    threshold
        None for argmax; else label 1 where the summed probability of ``foreground`` exceeds it.
    foreground
        Classes whose probabilities are summed for the threshold.
    """

    dtype: np.dtype[Any]
    threshold: float | None = None
    foreground: tuple[int, ...] = ()

    def apply(self, logits: torch.Tensor) -> Array:
        """Labels (z, y, x) of logits f32 [k, z, y, x]."""
        if self.threshold is None:
            winner: Array = _argmax(logits).cpu().numpy()
            return winner.astype(self.dtype)
        share = softmax(logits)[list(self.foreground)].sum(0)
        above: Array = (share > self.threshold).cpu().numpy()
        return above.astype(self.dtype)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index (int16) of the largest of [k, ...], the first of equals; several times faster than ``torch.argmax`` over
    the first axis, which walks through memory voxel by voxel."""
    winner = torch.zeros(logits.shape[1:], dtype=torch.int16, device=logits.device)
    best = logits[0]
    for c in range(1, len(logits)):
        winner.masked_fill_(logits[c] > best, c)
        best = torch.maximum(best, logits[c])
    return winner
