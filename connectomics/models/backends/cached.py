"""A backend that knows the windows of the sample before a run, so that the run does not compute them again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch

from connectomics.models.backends.contract import Backend

CACHED_BYTES = 64 << 20
"""Logits kept at most; a sample of a million voxels of two classes, not mirrored, takes a fifth of it."""


class CachedBackend:
    """Runs another backend of the CPU, and gives what it gave where a batch has the same bytes as one of the sample.

    Logits are kept until they are asked for again, at most ``CACHED_BYTES`` of them, the latest.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self.device, self.numeric_class = backend, backend.device, backend.numeric_class
        self._known: dict[bytes, torch.Tensor] = {}
        self.sampling = False
        """Whether what is computed is part of the sample."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        if not self.sampling and not self._known:
            return self._backend.forward(batch)
        key = hashlib.sha256(repr(batch.shape).encode() + batch.contiguous().numpy().tobytes()).digest()
        known = self._known.pop(key, None)
        logits = self._backend.forward(batch) if known is None else known
        if self.sampling:
            self._keep(key, logits.clone())  # whoever asked may change its own
        return logits

    def close(self) -> None:
        """See ``Backend``."""
        self._known.clear()
        self._backend.close()

    def _keep(self, key: bytes, logits: torch.Tensor) -> None:
        self._known[key] = logits
        while sum(each.nbytes for each in self._known.values()) > CACHED_BYTES:
            del self._known[next(iter(self._known))]


@contextlib.contextmanager
def sampled(backends: Sequence[CachedBackend]) -> Iterator[None]:
    """While open, backends remember what they compute."""
    for backend in backends:
        backend.sampling = True
    try:
        yield
    finally:
        for backend in backends:
            backend.sampling = False
