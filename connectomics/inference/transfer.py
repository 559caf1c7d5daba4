"""Between the host and a GPU: windows on their way to the network, finished logits on their way back.

Both go through two pinned buffers in turn, copied by a queue of their own while the network computes. What only CUDA
can do is behind ``Streams``; on the CPU nothing is copied. The predictor uploads, stages take ``on_host``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from connectomics.core.errors import ModelError
from connectomics.core.geometry import Box
from connectomics.models.backends.probe import naming_what_ran_out
from connectomics.volumes.volume import Array

MAIN, SIDE = "main", "side"  # the queue of a device that computes, and the one that copies
BUFFERS = 2
RAN_OUT = "the device's memory ran out amid a run, although it sufficed before the first block"
RAN_OUT_ADVICE = "end what else runs there, and run again: finished blocks are kept"


class Mark(Protocol):
    """A point in one of a device's queues."""

    def wait(self) -> None:
        """Let the host wait until the device has come to it."""
        ...

    def hold(self, queue: str) -> None:
        """Let whatever is put into ``queue`` from now on wait for it."""
        ...


class Streams(Protocol):
    """Two queues of work of one device; each is done in order, neither waits for the other or the host by itself."""

    def pinned(self, values: int) -> torch.Tensor:
        """Host memory for so many float32 values that ``copy`` can use while the host goes on."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Put a copy into the queue ``SIDE``."""
        ...

    def mark(self, queue: str) -> Mark:
        """The end of what was put into a queue up to now; the network's work goes into ``MAIN``."""
        ...


@dataclass(frozen=True, slots=True)
class _CudaMark:
    event: torch.cuda.Event
    queues: dict[str, torch.cuda.Stream]

    def wait(self) -> None:
        self.event.synchronize()

    def hold(self, queue: str) -> None:
        self.queues[queue].wait_event(self.event)


class CudaStreams:
    """The stream that is current when this is made, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch has no annotation
        self._queues = {MAIN: torch.cuda.current_stream(device), SIDE: side}

    def pinned(self, values: int) -> torch.Tensor:
        return torch.empty(values, dtype=torch.float32, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._queues[SIDE]):
            target.copy_(source, non_blocking=True)

    def mark(self, queue: str) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # PyTorch has no annotation
        event.record(self._queues[queue])
        return _CudaMark(event, self._queues)


@functools.cache
def streams_of(device: torch.device) -> Streams | None:
    """The queues of a CUDA device, made once; None for devices whose copies are awaited."""
    return CudaStreams(device) if device.type == "cuda" else None


class Uploads(Protocol):
    """Brings windows to a device."""

    def batch(self, windows: Iterable[Array], shape: tuple[int, ...]) -> AbstractContextManager[torch.Tensor]:
        """While open, float32 [n, c, z, y, x] of that shape on the device, of n windows float32 (c, z, y, x).

        Each window is copied before the next is taken.
        """
        ...


def uploads_to(device: torch.device) -> Uploads:
    """How windows come to a device."""
    streams = streams_of(device)
    return Direct(device) if streams is None else Buffered(streams, device)


class Direct:
    """Fills a batch where the windows are, and copies it if the device's memory is another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextlib.contextmanager
    def batch(self, windows: Iterable[Array], shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        host = np.empty(shape, np.float32)
        _fill(host, windows)
        yield torch.from_numpy(host).to(self._device)


def _fill(rows: Array, windows: Iterable[Array]) -> None:
    for row, window in zip(rows, windows, strict=True):
        row[...] = window


@dataclass(slots=True)
class _Slot:
    """One of the buffers: in host memory, on the device, and when either may be written again."""

    host: torch.Tensor
    there: torch.Tensor
    copied: Mark | None = None
    used: Mark | None = None


class Buffered:
    """Fills one pinned buffer while the other one's windows are copied or computed with.

    The host waits for a buffer's last copy before it fills it again; that copy waits for the last use of the memory it
    writes, and the next use for that copy.
    """

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams, self._device = streams, device
        self._slots: list[_Slot] = []
        self._turn = 0

    @contextlib.contextmanager
    def batch(self, windows: Iterable[Array], shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        slot = self._next(shape)
        if slot.copied is not None:
            slot.copied.wait()
        host, there = slot.host[: shape[0]], slot.there[: shape[0]]
        _fill(host.numpy(), windows)
        if slot.used is not None:
            slot.used.hold(SIDE)
        self._streams.copy(there, host)
        slot.copied = self._streams.mark(SIDE)
        slot.copied.hold(MAIN)
        try:
            yield there
        finally:
            slot.used = self._streams.mark(MAIN)

    def _next(self, shape: tuple[int, ...]) -> _Slot:
        """The buffer whose turn it is; all are made anew for windows of another shape, or more of them."""
        self._turn = (self._turn + 1) % BUFFERS
        fits = self._slots and self._slots[0].there.shape[1:] == shape[1:] and len(self._slots[0].there) >= shape[0]
        if not fits:
            self._slots = [self._made(shape) for _ in range(BUFFERS)]
        return self._slots[self._turn]

    def _made(self, shape: tuple[int, ...]) -> _Slot:
        there = torch.empty(shape, dtype=torch.float32, device=self._device)
        slot = _Slot(self._streams.pinned(there.numel()).view(shape), there)
        slot.used = self._streams.mark(MAIN)  # memory that is handed out again may still be in use there
        return slot


def on_host(finished: Iterable[tuple[Box, torch.Tensor]]) -> Iterator[tuple[Box, torch.Tensor]]:
    """Finished logits float32 [k, z, y, x] in the host's memory, each valid until the next is taken.

    From a GPU they come one behind: while one is looked at, the device computes and copies the next.

    Raises
    ------
    ModelError
        If logits are infinite or undefined.
    DeviceMemoryError
        If the device's memory runs out.
    """
    with naming_what_ran_out(RAN_OUT, RAN_OUT_ADVICE):
        for box, logits in _copied(iter(finished)):
            _require_finite(box, logits)
            yield box, logits


def _copied(finished: Iterator[tuple[Box, torch.Tensor]]) -> Iterator[tuple[Box, torch.Tensor]]:
    for first in finished:
        streams, all_of_them = streams_of(first[1].device), itertools.chain([first], finished)
        if streams is None:
            yield from ((box, logits.cpu()) for box, logits in all_of_them)
        else:
            yield from downloads(all_of_them, streams)


def downloads(finished: Iterable[tuple[Box, torch.Tensor]], streams: Streams) -> Iterator[tuple[Box, torch.Tensor]]:
    """Tensors of a device in pinned memory, one behind; each is valid until the next is taken."""
    buffers = [streams.pinned(0) for _ in range(BUFFERS)]
    waiting: tuple[Box, torch.Tensor, torch.Tensor, Mark] | None = None
    for turn, (box, values) in enumerate(finished):
        source, index = values.contiguous(), turn % BUFFERS
        if buffers[index].numel() < source.numel():
            buffers[index] = streams.pinned(source.numel())
        target = buffers[index][: source.numel()].view(source.shape)
        streams.mark(MAIN).hold(SIDE)
        streams.copy(target, source)
        copied = streams.mark(SIDE)
        if waiting is not None:
            yield _arrived(waiting)
        waiting = (box, target, source, copied)  # the source is kept until it was copied
    if waiting is not None:
        yield _arrived(waiting)


def _arrived(waiting: tuple[Box, torch.Tensor, torch.Tensor, Mark]) -> tuple[Box, torch.Tensor]:
    box, target, _, copied = waiting
    copied.wait()
    return box, target


def _require_finite(box: Box, logits: torch.Tensor) -> None:
    finite = bool(torch.isfinite(logits.sum()))  # one pass; a sum that overflows says nothing of its parts
    if not finite and not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the network gave infinite or undefined logits in {box}; the weights or the precision do not fit these "
            "intensities: try inference.precision=exact, which computes in float32"
        )
