"""A backend of another package: the network in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from connectomics.core.errors import DeviceError
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import (
    BackendRequest,
    ModelNetworks,
    NumericClass,
    closed,
    torch_threads,
    whole_batch,
)


class DoubleBackend:
    """Runs a network in double precision."""

    reference = "torch"
    note = ""
    device = torch.device("cpu")

    def __init__(self, network: nn.Module, batch: int, threads: int) -> None:
        self._network: Callable[[torch.Tensor], torch.Tensor] = copy.deepcopy(network).eval().double()
        self.numeric_class = NumericClass("double", "exact", batch, threads, device="cpu")

    @classmethod
    def make(cls, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> DoubleBackend:
        """Make the backend of one network."""
        if request.device not in ("cpu", "auto") or request.precision.half_on:
            raise DeviceError("backend 'double' runs on the CPU with precision exact; set system.backend=torch")
        return cls(networks.modules[fold], request.batch, request.threads)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits of windows."""
        whole = whole_batch(batch, (self.numeric_class.batch,), self.device)
        with torch_threads(self.numeric_class.threads), torch.no_grad():
            return self._network(whole.double())[: len(batch)].float()

    def close(self) -> None:
        """Let go of the network."""
        self._network = closed
