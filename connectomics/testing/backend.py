"""What every backend promises: ``BackendContract``, a suite for pytest, and the small network it runs.

A package that adds a backend subclasses the suite, states the backend's class, and lets pytest collect it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import (
    Backend,
    BackendKind,
    BackendRequest,
    MadeBackend,
    ModelNetworks,
    torch_threads,
)
from connectomics.models.backends.precisions import EXACT, Precision

CHANNELS, CLASSES, PATCH, ROWS = 2, 3, (4, 8, 8), 4


def small_network() -> nn.Module:
    """Return a network that normalises and drops out, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv3d(CHANNELS, 6, 3, padding=1),
            nn.InstanceNorm3d(6),
            nn.Dropout(0.5),
            nn.LeakyReLU(inplace=True),
            nn.Conv3d(6, CLASSES, 1),
        )


def windows(rows: int, device: torch.device) -> torch.Tensor:
    """Return windows float32 [rows, c, z, y, x] for it."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(rows, CHANNELS, *PATCH, generator=generator).to(device)


def small_backend(kind: BackendKind, folder: Path, precision: Precision = EXACT, device: str = "cpu") -> MadeBackend:
    """Return a backend of the small network, made as a run makes it; ``folder`` keeps what is compiled."""
    networks = ModelNetworks([small_network()], "small", CHANNELS, PATCH)
    return kind.make(networks, 0, BackendRequest(device, precision, ROWS, 1), Artefacts(folder))


class BackendContract:
    """What a backend promises; one that is not made by ``kind`` replaces the fixture ``backend``.

    Attributes
    ----------
    name
        The backend's name in the configuration, with which its numeric class begins.
    kind
        Its class.
    precision, device
        How it is run.
    tolerance
        How far its logits may be from those of the network in float32 on the CPU.
    """

    name: ClassVar[str]
    kind: ClassVar[BackendKind]
    precision: ClassVar[Precision] = EXACT
    device: ClassVar[str] = "cpu"
    tolerance: ClassVar[float] = 0.0

    @pytest.fixture(scope="class")
    @classmethod
    def compiled(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a folder for what is compiled, once for all tests."""
        return tmp_path_factory.mktemp("compiled")

    @pytest.fixture
    def backend(self, compiled: Path) -> Iterator[Backend]:
        """Give a backend of ``small_network()`` for batches of four rows."""
        made = small_backend(self.kind, compiled, self.precision, self.device)
        yield made
        made.close()

    def test_logits_are_those_of_the_network(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        logits = backend.forward(batch)
        with torch.no_grad(), torch_threads(backend.numeric_class.threads):
            expected = small_network().eval()(batch.cpu())
        assert logits.shape == (4, CLASSES, *PATCH)
        assert (logits.dtype, logits.device) == (torch.float32, backend.device)
        assert float((logits.cpu() - expected).abs().max()) <= self.tolerance

    def test_a_row_does_not_depend_on_how_full_the_batch_is(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        whole = backend.forward(batch)
        for start, stop in itertools.combinations(range(5), 2):
            assert torch.equal(backend.forward(batch[start:stop]), whole[start:stop])

    def test_the_same_batch_gives_the_same_bytes(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        assert torch.equal(backend.forward(batch), backend.forward(batch))

    def test_the_batch_is_left_as_it_was(self, backend: Backend) -> None:
        batch = windows(3, backend.device)
        before = batch.clone()
        backend.forward(batch)
        assert torch.equal(batch, before)

    def test_logits_may_be_changed_in_place(self, backend: Backend) -> None:
        logits = backend.forward(windows(2, backend.device))
        assert not logits.requires_grad
        logits += 1

    def test_what_is_no_batch_is_refused(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        for wrong in (batch.double(), batch[0], batch[:0], torch.cat([batch, batch])):
            with pytest.raises(ValueError, match=r"expected float32|has 1 to 4 rows"):
                backend.forward(wrong)

    def test_the_numeric_class_is_plain_json(self, backend: Backend) -> None:
        values = backend.numeric_class.as_dict()
        assert json.loads(json.dumps(values)) == values
        assert list(values) == ["backend", "precision", "batch", "threads", "device"]
        assert (values["batch"], values["precision"]) == (ROWS, self.precision.name)
        assert str(values["backend"]).partition(" ")[0] == self.name

    def test_it_is_not_disturbed_by_inference_mode(self, backend: Backend) -> None:
        batch = windows(3, backend.device)
        expected = backend.forward(batch)
        with torch.inference_mode():
            found = backend.forward(windows(3, backend.device))
            found += 1  # the predictor adds in place
        assert torch.equal(found, expected + 1)

    def test_closing_twice_is_fine_and_ends_it(self, backend: Backend) -> None:
        backend.close()
        backend.close()
        with pytest.raises(RuntimeError, match="closed"):
            backend.forward(windows(1, backend.device))
