"""PyTorch, eager: the reference backend, in float32 or fast: nnU-Net's autocast on CUDA, bfloat16 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from connectomics.core.geometry import Vec3
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import (
    BackendRequest,
    MadeBackend,
    ModelNetworks,
    NumericClass,
    closed,
    torch_threads,
    whole_batch,
)
from connectomics.models.backends.cuda import CudaBackend
from connectomics.models.backends.device import capability, give_back, select_device
from connectomics.models.backends.precisions import EXACT, Precision

ACTIVATIONS = 10  # float32 maps of the first features that are alive at once


def window_bytes(network: nn.Module, patch: Vec3) -> int:
    """About what one window of ``patch`` (z, y, x) takes in a forward pass.

    That is ``ACTIVATIONS`` float32 maps of the features of the first convolution: measured for plain and residual
    U-Nets in 2D and 3D on the CPU, 7.2 to 9.9 with what the library keeps (docs/memory.md).
    """
    features = next((p.shape[0] for p in network.parameters() if p.ndim > 3), 1)
    return math.prod(patch) * features * ACTIVATIONS * 4


class TorchBackend:
    """Runs a network eagerly on one device, each batch padded to the same number of rows.

    Parameters
    ----------
    network
        Takes float32 [n, c, z, y, x], gives [n, k, z, y, x]; it is moved to the device and put in eval mode.
    device
        A name ``select_device`` knows.
    batch
        Rows of each batch the network sees; fuller batches are refused, emptier ones filled with zeros.
    threads
        CPU threads within one operation of the network.
    precision
        What it computes in.

    Raises
    ------
    DeviceError
        If the device is missing, or does not have this precision.
    """

    reference: ClassVar[str] = "torch"
    note: ClassVar[str] = ""

    def __init__(
        self, network: nn.Module, *, device: str, batch: int, threads: int, precision: Precision = EXACT
    ) -> None:
        if batch < 1 or threads < 1:
            raise ValueError(f"batch and threads are at least 1, got {batch} and {threads}")
        self.device = select_device(device)
        precision.dtype(self.device)  # which refuses a device without it
        self._precision = precision
        self._network: Callable[..., torch.Tensor] = network.to(self.device).eval().requires_grad_(False)
        self.numeric_class = NumericClass("torch", precision.name, batch, threads, device=capability(self.device))

    @classmethod
    def make(cls, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> MadeBackend:
        """See ``BackendKind``; half precision on CUDA has a class of its own."""
        if request.precision.half_on and select_device(request.device).type == "cuda":
            return CudaBackend(
                networks.modules[fold],
                device=request.device,
                shape=networks.shape(request.batch),
                threads=request.threads,
                precision=request.precision,
            )
        return cls.around(networks.modules[fold], request)

    @classmethod
    def around(cls, network: nn.Module, request: BackendRequest) -> TorchBackend:
        """Return a backend of this very class."""
        return cls(
            network, device=request.device, batch=request.batch, threads=request.threads, precision=request.precision
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        whole = whole_batch(batch, (self.numeric_class.batch,), self.device)
        # no_grad, not inference_mode: the caller flips and adds the logits in place outside of this call
        with torch_threads(self.numeric_class.threads), torch.no_grad(), self._precision.arithmetic(self.device):
            return self._network(whole)[: batch.shape[0]].float()

    def close(self) -> None:
        """See ``Backend``."""
        self._network = closed
        give_back(self.device)
