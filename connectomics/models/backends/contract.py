"""The contract of a backend: who runs the network, and in which numeric class.

Implemented by the files beside this one; called by the predictor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class NumericClass:
    """What decides the last bits of a logit; equal classes give equal bytes.

    Parameters
    ----------
    backend
        Name of the backend, with the version of the compiler where it has one: ``torch``, ``openvino 2026.4.1``.
    precision
        ``exact`` (float32 throughout) or ``fast`` (nnU-Net's autocast on CUDA, bfloat16 on the CPU).
    batch
        Rows of each batch the network sees.
    threads
        CPU threads within one operation.
    device
        Kind of device and its capability, for example ``cpu AVX512`` or ``cuda 9.0 NVIDIA H200``.
    """

    backend: str
    precision: str
    batch: int
    threads: int
    device: str

    def as_dict(self) -> dict[str, str | int]:
        """The fields as plain JSON values."""
        return asdict(self)


def whole_batch(batch: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """A batch of windows as a network sees it: checked, and filled up with zeros to ``rows``.

    Parameters
    ----------
    batch
        float32 [n, c, z, y, x] on ``device``, n from 1 to ``rows``; it is left as it is.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if batch.dtype != torch.float32 or batch.device != device or batch.ndim != 5:
        raise ValueError(
            f"expected float32 [n, c, z, y, x] on {device}, got {batch.dtype} {list(batch.shape)} on {batch.device}"
        )
    found = batch.shape[0]
    if not 1 <= found <= rows:
        raise ValueError(f"a batch has 1 to {rows} rows, got {found}")
    if found == rows:
        return batch
    filled = batch.new_zeros((rows, *batch.shape[1:]))
    filled[:found] = batch
    return filled


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """While open, PyTorch's operations take this many CPU threads (which holds for the whole process).

    Networks take as many as were asked for. All that surrounds them works on one window at a time, where waking and
    awaiting threads costs more than they save, above all on a machine that other programs use too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Backend(Protocol):
    """Runs a network on batches of windows."""

    @property
    def device(self) -> torch.device:
        """Where ``forward`` expects its input and leaves its output."""
        ...

    @property
    def numeric_class(self) -> NumericClass: ...

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, k, z, y, x] of windows float32 [n, c, z, y, x]; both on ``device``.

        ``n`` is at most ``numeric_class.batch``; a row's logits do not depend on the other rows or their
        number.

        Raises
        ------
        ValueError
            If the batch has another dtype, device, number of axes or more rows than that.
        """
        ...

    def close(self) -> None:
        """Let go of the network and its memory."""
        ...
