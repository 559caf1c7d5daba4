"""The precisions: what networks compute in, what that adds to result keys, and what it is held against.

``core.features`` lists them; backends, ``assembly``, ``planning`` and ``forecast`` ask these values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from connectomics.core.errors import DeviceError
from connectomics.core.features import PRECISIONS
from connectomics.models.backends.device import select_device


@dataclass(frozen=True, slots=True)
class Precision:
    """What networks compute in.

    Parameters
    ----------
    name
        As the configuration and numeric classes have it.
    half_on
        Kinds of devices with this precision, on which PyTorch's autocast chooses the type: half precision on CUDA, as
        in nnU-Net, bfloat16 on the CPU. Empty: float32, on any device.
    default_on
        Kinds of devices that compute so where nothing is stated.
    reference
        The precision that each volume's labels are held against, or None.
    facts
        What it adds to the facts of a result key.
    deviations
        In which ways it is not nnU-Net's own inference, by kind of device.
    most_disagreement
        Share of the labels of a sample that may differ from PyTorch's in float32, for ``auto`` to take a backend.
    """

    name: str
    half_on: tuple[str, ...] = ()
    default_on: tuple[str, ...] = ()
    reference: Precision | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    deviations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_disagreement: float = math.inf

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the type of products and convolutions on a device; a DeviceError if it lacks this precision."""
        if not self.half_on:
            return torch.float32
        if device.type not in self.half_on:
            raise DeviceError(
                f"device '{device.type}' has no {self.name} precision here; set inference.precision={EXACT.name}"
            )
        return torch.get_autocast_dtype(device.type)

    @contextlib.contextmanager
    def arithmetic(self, device: torch.device) -> Iterator[None]:
        """While open, PyTorch computes on a device in this precision, with the same bits each time."""
        with contextlib.ExitStack() as entered:
            if self.half_on:
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


EXACT = Precision("exact", most_disagreement=1e-4)
FAST = Precision(
    "fast",
    half_on=("cuda", "cpu"),
    default_on=("cuda",),
    reference=EXACT,
    facts={"precision": "fast"},
    deviations={"cpu": ("bfloat16 instead of float32 (inference.precision=fast)",)},
)


def precision_named(name: str) -> Precision:
    """Return the precision that the configuration or a numeric class names."""
    found: Precision = PRECISIONS.load(name)
    return found


def default_precision(device: str) -> Precision:
    """Return ``fast`` on CUDA, where nnU-Net computes so, and ``exact`` elsewhere."""
    kind = select_device(device).type
    return next((p for p in map(precision_named, PRECISIONS.names()) if kind in p.default_on), EXACT)
