"""A backend that knows the first windows it saw: those of the sample before a run are not computed again in it."""

from __future__ import annotations

import hashlib

import torch

from connectomics.models.backends.contract import Backend, NumericClass

REMEMBERED_BYTES = 64 << 20
"""Logits kept at most; a sample of a million voxels of two classes, not mirrored, takes a fifth of it."""


class Remembering:
    """Runs another backend of the CPU, and gives what it gave where a batch has the same bytes as an early one.

    The first batches are kept until they take ``REMEMBERED_BYTES``, each until it is asked for again.

    Parameters
    ----------
    backend
        Computes.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._room = REMEMBERED_BYTES
        self._known: dict[bytes, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._backend.device

    @property
    def numeric_class(self) -> NumericClass:
        return self._backend.numeric_class

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        if not self._room and not self._known:
            return self._backend.forward(batch)
        key = hashlib.sha256(repr(batch.shape).encode() + batch.contiguous().numpy().tobytes()).digest()
        known = self._known.pop(key, None)
        if known is not None:
            return known
        logits = self._backend.forward(batch)
        if logits.nbytes <= self._room:
            self._known[key] = logits.clone()  # whoever asked may change its own
            self._room -= logits.nbytes
        else:
            self._room = 0
        return logits

    def close(self) -> None:
        """See ``Backend``."""
        self._known.clear()
        self._backend.close()
