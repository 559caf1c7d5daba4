"""PyTorch, eager: the reference backend, in float32 or fast: nnU-Net's autocast on CUDA, bfloat16 on the CPU.

Made by ``choice``; ``select_device`` is also asked by ``assembly`` and ``doctor``.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

import torch
from torch import nn

from connectomics.core.errors import ConfigError, DeviceError
from connectomics.core.geometry import Vec3
from connectomics.models.backends.contract import NumericClass, torch_threads, whole_batch

ACTIVATIONS = 10  # float32 maps of the first features that are alive at once


def select_device(name: str) -> torch.device:
    """The device called ``name``: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:N or mps.

    Raises
    ------
    ConfigError
        If there is no such name.
    DeviceError
        If this machine has no such device; nothing falls back to the CPU silently.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"'{name}' is not a device; use auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise DeviceError(
                f"device '{name}' is not available: PyTorch {torch.__version__} finds {found}; check the "
                "driver and the PyTorch build, or choose another device (auto, cpu)"
            )
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            f"device 'mps' is not available: PyTorch {torch.__version__} finds no Apple GPU; choose auto or cpu"
        )
    return torch.device("mps", 0) if name == "mps" else torch.device(name)


def window_bytes(network: nn.Module, patch: Vec3) -> int:
    """About what one window of ``patch`` (z, y, x) takes in a forward pass.

    That is ``ACTIVATIONS`` float32 maps of the features of the first convolution: measured for plain and residual
    U-Nets in 2D and 3D on the CPU, 7.2 to 9.9 with what the library keeps (docs/memory.md).
    """
    features = next((p.shape[0] for p in network.parameters() if p.ndim > 3), 1)
    return math.prod(patch) * features * ACTIVATIONS * 4


def free_device_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device, with what PyTorch kept of it; None where the network's memory is the host's."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def capability(device: torch.device) -> str:
    """Kind of a device and what it can compute, as a numeric class names it."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor} {torch.cuda.get_device_name(device)}"
    return device.type


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """float32, or the device's autocast where ``precision`` is fast."""
    with contextlib.ExitStack() as entered:
        if precision == "fast":  # half precision on CUDA as nnU-Net has it, bfloat16 on the CPU
            entered.enter_context(torch.autocast(device.type))
        if device.type == "cuda":
            # cuDNN may pick another algorithm each time it measures; nnU-Net lets it, we want the same bits twice
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            entered.enter_context(flags)
            entered.enter_context(_full_products())
        yield


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """While open, matrix products of float32 on CUDA are float32 products, not TF32 ones."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
        ``exact`` or ``fast``.

    Raises
    ------
    DeviceError
        If the device is missing, or has no fast way.
    """

    def __init__(self, network: nn.Module, *, device: str, batch: int, threads: int, precision: str = "exact") -> None:
        if batch < 1 or threads < 1:
            raise ValueError(f"batch and threads are at least 1, got {batch} and {threads}")
        self._device = select_device(device)
        if precision == "fast" and self._device.type == "mps":
            raise DeviceError("device 'mps' has no fast precision here; set inference.precision=exact")
        self._precision = precision
        self._batch = batch
        self._threads = threads
        self._network: nn.Module | None = network.to(self._device).eval().requires_grad_(False)
        self._numeric_class = NumericClass(
            backend="torch",
            precision=precision,
            batch=batch,
            threads=threads,
            device=capability(self._device),
        )

    @property
    def device(self) -> torch.device:
        """Where ``forward`` expects its input and leaves its output."""
        return self._device

    @property
    def numeric_class(self) -> NumericClass:
        """What decides the last bits of the logits."""
        return self._numeric_class

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, k, z, y, x] of windows float32 [n, c, z, y, x]; both on ``device``.

        Raises
        ------
        ValueError
            If the batch has another dtype, device or number of axes, no row, or more than ``batch`` rows.
        RuntimeError
            If the backend is closed.
        """
        if self._network is None:
            raise RuntimeError("the backend is closed")
        rows = batch.shape[0]
        batch = whole_batch(batch, self._batch, self._device)
        # no_grad, not inference_mode: the caller flips and adds the logits in place outside of this call
        with torch_threads(self._threads), torch.no_grad(), arithmetic(self._device, self._precision):
            logits: torch.Tensor = self._network(batch)
        return logits[:rows].float()

    def close(self) -> None:
        """Let go of the network and its memory; twice is fine."""
        self._network = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
