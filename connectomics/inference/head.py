"""From finished logits to what is stored: labels, and probabilities on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from connectomics.volumes.volume import Array

FLOAT32: np.dtype[Any] = np.dtype(np.float32)
REGION_THRESHOLD = 0.5  # nnU-Net's


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


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of regions from logits f32, the same bits for a voxel wherever it stands in the tensor.

    ``torch.sigmoid`` rounds the end of a tensor differently, as ``torch.softmax`` does. It agrees with it to 1e-7.
    """
    return torch.exp(-logits).add_(1.0).reciprocal_()


_ACTIVATION_OF: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}


@dataclass(frozen=True, slots=True)
class ProbabilityRule:
    """How probabilities are stored.

    Parameters
    ----------
    channels
        Classes to keep, in this order.
    activation
        ``softmax`` for labels, ``sigmoid`` for regions, ``none`` for the logits as they are.
    scale
        Factor before the values are stored, 1 for none.
    dtype
        Type they are stored as; integers are rounded half to even and clipped to the type's range.
    """

    channels: tuple[int, ...]
    activation: str = "softmax"
    scale: float = 1.0
    dtype: np.dtype[Any] = FLOAT32

    @property
    def facts(self) -> dict[str, object]:
        """What stored values mean, for result keys and for who reads them."""
        return {
            "channels": list(self.channels),
            "activation": self.activation,
            "scale": self.scale,
            "dtype": self.dtype.str,
        }

    def background(self) -> Array:
        """Values (c,) outside the nonzero box: 1 for the background of labels as in nnU-Net, all others 0."""
        certain = torch.tensor([float(c == 0 and self.activation == "softmax") for c in self.channels])
        return self._stored(certain)

    def apply(self, logits: torch.Tensor) -> Array:
        """Stored values (c, z, y, x) of logits f32 [k, z, y, x]."""
        values = _ACTIVATION_OF[self.activation](logits) if self.activation != "none" else logits
        return self._stored(values[list(self.channels)])

    def of_probabilities(self, values: Array) -> Array:
        """Stored values (c, z, y, x) of all classes' probabilities float32 (k, z, y, x)."""
        return self._stored(torch.from_numpy(values)[list(self.channels)])

    def _stored(self, values: torch.Tensor) -> Array:
        scaled: Array = (values * self.scale if self.scale != 1.0 else values).cpu().numpy()
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            scaled = np.clip(np.rint(scaled), limits.min, limits.max)
        return scaled.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class LabelRule:
    """How logits become labels: nnU-Net's argmax, its painting of regions, or a threshold on the foreground.

    Parameters
    ----------
    dtype
        Of the labels.
    threshold
        None for nnU-Net's rule; else label 1 where the probability of ``foreground`` exceeds it.
    foreground
        Classes whose probabilities are summed for the threshold; of regions, which overlap, the largest counts.
    painted
        The label of each region, painted in this order where its probability exceeds 0.5; empty for plain labels.
    """

    dtype: np.dtype[Any]
    threshold: float | None = None
    foreground: tuple[int, ...] = ()
    painted: tuple[int, ...] = ()

    def activate(self, logits: torch.Tensor) -> Array:
        """Probabilities float32 (k, z, y, x) of logits f32 [k, z, y, x]: of regions by sigmoid, else by softmax."""
        values: Array = self._probabilities(logits).cpu().numpy()
        return values

    def apply(self, logits: torch.Tensor) -> Array:
        """Labels (z, y, x) of logits f32 [k, z, y, x]."""
        if self.threshold is None and not self.painted:
            return self._stored(_argmax(logits))
        return self._decided(self._probabilities(logits))

    def of_probabilities(self, values: Array) -> Array:
        """Labels (z, y, x) of probabilities float32 (k, z, y, x)."""
        return self._decided(torch.from_numpy(values))

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return sigmoid(logits) if self.painted else softmax(logits)

    def _decided(self, values: torch.Tensor) -> Array:
        if self.threshold is None:
            return self._stored(_paint(values, self.painted) if self.painted else _argmax(values))
        chosen = values[list(self.foreground)]
        return self._stored((chosen.amax(0) if self.painted else chosen.sum(0)) > self.threshold)

    def _stored(self, labels: torch.Tensor) -> Array:
        stored: Array = labels.cpu().numpy().astype(self.dtype)
        return stored


def _paint(probabilities: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """Labels (int16) of regions: each paints its value over those before it, as in nnU-Net's LabelManager."""
    labels = torch.zeros(probabilities.shape[1:], dtype=torch.int16, device=probabilities.device)
    for channel, value in zip(probabilities, values, strict=True):
        labels.masked_fill_(channel > REGION_THRESHOLD, value)
    return labels


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index (int16, bool of two) of the largest of [k, ...], the first of equals; several times faster than
    ``torch.argmax`` over the first axis, which walks through memory voxel by voxel."""
    if len(logits) == 2:
        return logits[1] > logits[0]
    winner = torch.zeros(logits.shape[1:], dtype=torch.int16, device=logits.device)
    best = logits[0]
    for c in range(1, len(logits)):
        winner.masked_fill_(logits[c] > best, c)
        if c + 1 < len(logits):
            best = torch.maximum(best, logits[c])
    return winner
