"""The contract of a backend: what it is made of, who runs the network, and in which numeric class.

Implemented by the files beside this one, which ``core.features`` lists, and by other packages; ``choice`` makes them,
the predictor calls them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn, Protocol

import torch
from torch import nn

from connectomics.core.geometry import Vec3
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.precisions import Precision


@dataclass(frozen=True, slots=True)
class NumericClass:
    """What decides the last bits of a logit; equal classes give equal bytes.

    Parameters
    ----------
    backend
        Name of the backend, with the version of the compiler where it has one: ``torch``, ``openvino 2026.4.1``.
    precision
        Name of the precision.
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


@dataclass(frozen=True, slots=True)
class ModelNetworks:
    """The networks of one model, one a fold.

    Parameters
    ----------
    modules
        Each takes float32 [n, c, z, y, x] and gives logits [n, k, z, y, x].
    sha256
        Identity of their weights and architecture.
    channels, patch
        Of their input; the patch (z, y, x) in voxels.
    let_go
        Frees the memory of ``modules`` until one is asked for again.
    """

    modules: Sequence[nn.Module]
    sha256: str
    channels: int
    patch: Vec3
    let_go: Callable[[], None] = lambda: None

    def shape(self, batch: int) -> tuple[int, int, int, int, int]:
        """Return the shape of a batch: rows, channels, z, y, x."""
        return (batch, self.channels, *self.patch)


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """How networks are to be run: device (a name ``select_device`` knows), precision, rows of a batch, CPU threads.

    ``low_memory`` ones are run seldom, beside others, and give a forward pass's memory back after it where they can.
    """

    device: str
    precision: Precision
    batch: int
    threads: int
    low_memory: bool = False


def whole_batch(batch: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return a batch of windows as a network sees it: checked, and filled up with zeros.

    Parameters
    ----------
    batch
        float32 [n, c, z, y, x] on ``device``, n from 1 to ``shape[0]``; it is left as it is.
    shape
        What the network takes: rows; or rows, channels, z, y, x where it was made for one shape.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if batch.dtype != torch.float32 or batch.device != device or batch.ndim != 5:
        raise ValueError(
            f"expected float32 [n, c, z, y, x] on {device}, got {batch.dtype} {list(batch.shape)} on {batch.device}"
        )
    found, rows = batch.shape[0], shape[0]
    if not 1 <= found <= rows:
        raise ValueError(f"a batch has 1 to {rows} rows, got {found}")
    if len(shape) > 1 and tuple(batch.shape[1:]) != tuple(shape[1:]):
        raise ValueError(f"made for batches of {list(shape)}, got {list(batch.shape)}")
    if found == rows:
        return batch
    filled = batch.new_zeros((rows, *batch.shape[1:]))
    filled[:found] = batch
    return filled


def closed(*_: object, **__: object) -> NoReturn:
    """Stand where a network was: the backend is closed."""
    raise RuntimeError("the backend is closed")


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
            If the batch has another dtype, device or number of axes, no row or more than that, or another shape of
            windows than the network was made for.
        RuntimeError
            If the backend is closed.
        """
        ...

    def close(self) -> None:
        """Let go of the network and its memory; twice is fine."""
        ...


class MadeBackend(Backend, Protocol):
    """A backend as ``BackendKind`` makes it."""

    @property
    def note(self) -> str:
        """Why it does less than it can, for the provenance; or empty."""
        ...


class BackendKind(Protocol):
    """A backend's class: what ``core.features.BACKENDS`` lists, and the entry points ``connectomics.backends`` name."""

    @property
    def reference(self) -> str:
        """Name of the backend that gives, in the precision's reference, what this one is held against."""
        ...

    def make(self, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> MadeBackend:
        """Make the backend of one network; its numeric class begins with the backend's name.

        Raises
        ------
        DeviceError
            If device, precision or a package that it needs is missing, with what to do.
        """
        ...
