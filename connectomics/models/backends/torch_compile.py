"""PyTorch's compiler: weights frozen into generated C++ on the CPU, which needs a C++ compiler; Triton on CUDA.

What it generates is kept in the folder of ``Artefacts``, never in the machine's common one. Made by ``choice``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from connectomics.core.errors import DeviceError
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import NumericClass
from connectomics.models.backends.torch_eager import TorchBackend, select_device

COMPILERS = ("g++", "clang++", "cl")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"


class CompiledBackend:
    """As ``TorchBackend``, with the network compiled for one shape when it is made.

    Parameters
    ----------
    network
        Takes float32 [n, c, z, y, x], gives [n, k, z, y, x]; it is moved to the device and put in eval mode.
    device
        A name ``select_device`` knows.
    shape
        Of each batch the network sees: rows, channels, z, y, x.
    threads
        CPU threads within one operation.
    precision
        ``exact`` or ``fast``.
    artefacts
        Where generated code is kept.

    Raises
    ------
    DeviceError
        If the device or a C++ compiler is missing, or the network cannot be compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: str,
        shape: tuple[int, int, int, int, int],
        threads: int,
        precision: str,
        artefacts: Artefacts,
    ) -> None:
        chosen = select_device(device)
        if chosen.type == "cpu":
            _require_compiler()
        settled = network.to(chosen).eval().requires_grad_(False)
        compiled: Any = torch.compile(settled, fullgraph=True, dynamic=False, options={"freezing": True})
        self._eager = TorchBackend(compiled, device=device, batch=shape[0], threads=threads, precision=precision)
        self._numeric_class = replace(
            self._eager.numeric_class, backend=f"compile {torch.__version__.partition('+')[0]}"
        )
        try:
            with _generating_in(artefacts.compiler_folder()):
                self.forward(torch.zeros(shape, device=chosen))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DeviceError(
                f"backend 'compile' cannot compile this network ({type(error).__name__}: {reason}); set "
                "system.backend=torch"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where ``forward`` expects its input and leaves its output."""
        return self._eager.device

    @property
    def numeric_class(self) -> NumericClass:
        """What decides the last bits of the logits."""
        return self._numeric_class

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, k, z, y, x] of windows float32 [n, c, z, y, x]; both on ``device``.

        Raises
        ------
        ValueError
            If the batch has another dtype, device or number of axes, no row, or too many.
        RuntimeError
            If the backend is closed.
        """
        # tensors made in inference mode are of another kind, for which it would compile once more
        with torch.inference_mode(False):
            return self._eager.forward(batch.clone())

    def close(self) -> None:
        """Let go of the network and its memory; twice is fine."""
        self._eager.close()


def _require_compiler() -> None:
    stated = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((stated,) if stated else COMPILERS)):
        raise DeviceError(
            f"backend 'compile' is not available: it needs a C++ compiler ({stated or ', '.join(COMPILERS)}), and none "
            "is found; install one, or set system.backend=openvino or torch"
        )


@contextlib.contextmanager
def _generating_in(folder: Path) -> Iterator[None]:
    """While open, PyTorch's compiler keeps its files in ``folder``."""
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = str(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = before
