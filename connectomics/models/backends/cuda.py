"""PyTorch on CUDA in nnU-Net's half precision: weights converted once, and one graph of all kernels for the batch.

Made by ``TorchBackend``, which itself computes in float32. What only a GPU can do is behind ``Recorder``.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from connectomics.core.errors import DeviceError
from connectomics.models.backends.contract import NumericClass, closed, whole_batch
from connectomics.models.backends.device import capability, give_back, select_device
from connectomics.models.backends.precisions import FAST, Precision
from connectomics.models.backends.probe import exhausted

log = logging.getLogger(__name__)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # memory formats by the axes of a convolution's weight
HALVED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
WARM_UPS = 3  # libraries choose algorithms and take their workspaces in the first passes


@dataclass(frozen=True, slots=True)
class Recorded:
    """A pass that can be run again: ``replay`` reads the same input tensor and overwrites ``output``."""

    replay: Callable[[], None]
    output: torch.Tensor


class Recorder(Protocol):
    """Records a pass."""

    def __call__(self, run: Callable[[], torch.Tensor]) -> Recorded:
        """Run the pass to warm up, then record it.

        Raises
        ------
        RuntimeError
            If it cannot be recorded.
        """
        ...


class CudaGraphs:
    """Records kernels as a CUDA graph; all graphs of a device share the memory of their intermediate values.

    That is safe because they are replayed one after the other on one stream, and each output is copied before the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Callable[[], torch.Tensor]) -> Recorded:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # PyTorch has no annotation
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream(self._device).wait_stream(side)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=_pool(self._device.index), capture_error_mode="thread_local"):
                output = run()
        return Recorded(graph.replay, output)


@functools.cache
def _pool(index: int) -> Any:
    return torch.cuda.graph_pool_handle()


def in_half(network: nn.Module, dtype: torch.dtype, *, channels_last: bool = True) -> nn.Module:
    """A copy of a network whose convolutions have their weights in half precision, as autocast would cast them.

    Autocast converts them in each pass anew; all else it treats as before, so the logits are the same. The network
    itself is left as it is, because ``exact`` computes with it.

    Parameters
    ----------
    dtype
        What autocast uses on the device.
    channels_last
        Whether weights lie in memory with their channels last, which is what tensor cores read.
    """
    halved = copy.deepcopy(network).eval().requires_grad_(False)
    for module in halved.modules():
        if isinstance(module, HALVED):
            module.to(dtype)
            if channels_last and module.weight.ndim in LAST:
                module.weight.data = module.weight.data.contiguous(memory_format=LAST[module.weight.ndim])
    return halved


class CudaBackend:
    """Runs a network as ``TorchBackend`` does in ``fast``, for one shape.

    Parameters
    ----------
    network
        Takes float32 [n, c, z, y, x], gives [n, k, z, y, x]; it is copied.
    device
        A name ``select_device`` knows.
    shape
        Of each batch the network sees: rows, channels, z, y, x. Emptier batches are filled with zeros.
    threads
        CPU threads within one operation, part of the numeric class.
    precision
        Which half precision.
    channels_last
        See ``in_half``.
    recorder
        Records a pass; None: as a CUDA graph.

    Attributes
    ----------
    note
        Why passes are not recorded but run kernel by kernel, or empty.

    Raises
    ------
    DeviceError
        If the device is missing.
    RuntimeError
        If its memory does not suffice.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: str,
        shape: tuple[int, int, int, int, int],
        threads: int,
        precision: Precision = FAST,
        channels_last: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self.device = select_device(device)
        if recorder is None and self.device.type != "cuda":
            raise DeviceError(f"CUDA graphs need a CUDA device, and '{device}' is none; set system.device=cuda")
        self._precision = precision
        dtype = precision.dtype(self.device)
        self._network: Callable[..., torch.Tensor] = in_half(network, dtype, channels_last=channels_last).to(
            self.device
        )
        self._shape, self._input = shape, torch.zeros(shape, device=self.device)
        self._load: Callable[[torch.Tensor], torch.Tensor] = self._input.copy_
        kind = "torch channels_last" if channels_last else "torch half"  # a graph runs the same kernels
        self.numeric_class = NumericClass(kind, precision.name, shape[0], threads, device=capability(self.device))
        self.note, self._recorded = "", None
        try:
            self._recorded = (recorder or CudaGraphs(self.device))(self._run)
        except RuntimeError as error:
            if exhausted(error):
                raise
            self.note = f"passes are not recorded as a graph: {' '.join(str(error).split())[:300]}"
            log.warning("%s: %s; each kernel is started by itself", self.device, self.note)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        self._load(whole_batch(batch, self._shape, self.device))
        if self._recorded is not None:
            self._recorded.replay()
        logits = self._run() if self._recorded is None else self._recorded.output
        return logits[: batch.shape[0]].to(torch.float32, copy=True)  # the next pass overwrites it

    def _run(self) -> torch.Tensor:
        with torch.no_grad(), self._precision.arithmetic(self.device):
            return self._network(self._input)

    def close(self) -> None:
        """See ``Backend``."""
        self._network = self._load = closed
        self._recorded = None
        self._input = self._input.new_zeros(0)
        give_back(self.device)
