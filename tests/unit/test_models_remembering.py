"""What was computed for a sample is not computed again, gives the same bytes, and takes no more memory than stated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from connectomics.models.backends import cached
from connectomics.models.backends.cached import CachedBackend, sampled
from connectomics.models.backends.torch_eager import TorchBackend


class Counting(nn.Module):
    """Twice its input; counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return 2 * batch


def batch(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 4, 8), value)


def cached_counting() -> tuple[CachedBackend, Counting]:
    network = Counting()
    return CachedBackend(TorchBackend(network, device="cpu", batch=1, threads=1)), network


def test_a_batch_of_the_sample_is_computed_once_whatever_was_done_to_its_logits() -> None:
    backend, network = cached_counting()
    with sampled([backend]):
        for value in (1.0, 2.0, 2.0):
            assert torch.equal(backend.forward(batch(value)), batch(2 * value))
            backend.forward(batch(value)).zero_()
    assert network.runs == 2
    assert torch.equal(backend.forward(batch(2.0)), batch(4.0))
    assert torch.equal(backend.forward(batch(1.0)), batch(2.0))
    assert network.runs == 2
    assert torch.equal(backend.forward(batch(1.0)), batch(2.0))
    assert network.runs == 3  # it was given back already


def test_what_is_computed_after_the_sample_is_not_kept() -> None:
    backend, network = cached_counting()
    with pytest.raises(KeyError), sampled([backend]):
        backend.forward(batch(1.0))
        raise KeyError
    for _ in range(2):
        backend.forward(batch(3.0))
    assert network.runs == 3


def test_another_shape_is_another_batch() -> None:
    backend, network = cached_counting()
    with sampled([backend]):
        backend.forward(batch(1.0))
    assert backend.forward(batch(1.0).reshape(1, 1, 1, 8, 4)).shape == (1, 1, 1, 8, 4)
    assert network.runs == 2


def test_no_more_is_kept_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "CACHED_BYTES", 2 * 32 * 4)
    backend, network = cached_counting()
    with sampled([backend]):
        for value in (1.0, 2.0, 3.0):
            backend.forward(batch(value))
    for value in (2.0, 3.0):
        assert torch.equal(backend.forward(batch(value)), 2 * batch(value))
    assert network.runs == 3
    backend.forward(batch(1.0))
    assert network.runs == 4
