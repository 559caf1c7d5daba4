"""Whether a device's memory suffices, found out by trying before the first block of a run.

``assembly`` tries batches with it; ``inference`` names what ran out.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from connectomics.core.errors import DeviceMemoryError
from connectomics.core.geometry import Vec3
from connectomics.models.backends.contract import Backend

T = TypeVar("T")
log = logging.getLogger(__name__)
STATED = ("out of memory", "_STATUS_ALLOC_FAILED")  # by the driver, cuDNN and cuBLAS, beside PyTorch's own error


def exhausted(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in STATED)


@contextlib.contextmanager
def naming_what_ran_out(what: str, advice: str) -> Iterator[None]:
    """While open, a device whose memory is full is a ``DeviceMemoryError`` with this beginning and end."""
    try:
        yield
    except RuntimeError as error:
        if not exhausted(error):
            raise
        found = " ".join(str(error).split())[:200]
        raise DeviceMemoryError(f"{what} ({found}); {advice}") from error


def try_batch(backend: Backend, channels: int, patch: Vec3) -> None:
    """Run a whole batch of empty windows (z, y, x) once, and a second beside its logits, as mirroring does.

    PyTorch's RuntimeError says that memory does not suffice. That of the CPU is counted, and nothing is run there.
    """
    if backend.device.type == "cpu":
        return
    with torch.inference_mode():
        batch = torch.zeros((backend.numeric_class.batch, channels, *patch), device=backend.device)
        total = backend.forward(batch)
        total += backend.forward(torch.flip(batch, (-1,)))
        total.amax().item()  # waits for the device, which says only then what went wrong


def largest_fitting(make: Callable[[int], T], batch: int) -> tuple[T, int]:
    """What ``make`` gives for ``batch`` windows at once, or for half as many until the device's memory suffices.

    Returns
    -------
    made, batch
        And the number it was made for.

    Raises
    ------
    DeviceMemoryError
        If not even one window fits.
    """
    while batch > 1:
        try:
            return make(batch), batch
        except RuntimeError as error:
            if not exhausted(error):
                raise
        # here the error is gone, and with it the frames that held on to tensors
        _give_back()
        log.warning(
            "inference.sliding_window.sw_batch_size=%d does not fit the device's memory; %d is tried instead",
            batch,
            batch // 2,
        )
        batch //= 2
    with naming_what_ran_out(
        "the network needs more of the device's memory than is free, for one window already",
        "end what else runs there, set a smaller inference.sliding_window.window_size, or use system.device=cpu",
    ):
        return make(1), 1


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
