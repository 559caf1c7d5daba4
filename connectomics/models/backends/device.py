"""The devices that networks run on: by name, what they can compute, and their free memory."""

from __future__ import annotations

import re

import torch

from connectomics.core.errors import ConfigError, DeviceError


def select_device(name: str) -> torch.device:
    """Return the device called ``name``: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:N or mps.

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


def free_device_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device, with what PyTorch kept of it; None where the network's memory is the host's."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def give_back(device: torch.device) -> None:
    """Hand memory that PyTorch keeps back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def capability(device: torch.device) -> str:
    """Kind of a device and what it can compute, as a numeric class names it."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor} {torch.cuda.get_device_name(device)}"
    return device.type
