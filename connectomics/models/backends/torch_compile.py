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
from typing import Any, ClassVar

import torch

from connectomics.core.errors import DeviceError
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import BackendRequest, MadeBackend, ModelNetworks
from connectomics.models.backends.device import select_device
from connectomics.models.backends.torch_eager import TorchBackend

COMPILERS = ("g++", "clang++", "cl")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"


class CompiledBackend:
    """As ``TorchBackend``, with the network compiled for one shape when it is made."""

    reference: ClassVar[str] = "torch"
    note: ClassVar[str] = ""

    def __init__(self, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> None:
        self.device = select_device(request.device)
        if self.device.type == "cpu":
            _require_compiler()
        settled = networks.modules[fold].to(self.device).eval().requires_grad_(False)
        compiled: Any = torch.compile(settled, fullgraph=True, dynamic=False, options={"freezing": True})
        self._eager = TorchBackend.around(compiled, request)
        name = f"compile {torch.__version__.partition('+')[0]}"
        self.numeric_class = replace(self._eager.numeric_class, backend=name)
        try:
            with _generating_in(artefacts.compiler_folder()):
                self.forward(torch.zeros(networks.shape(request.batch), device=self.device))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DeviceError(
                f"backend 'compile' cannot compile this network ({type(error).__name__}: {reason}); set "
                "system.backend=torch"
            ) from error

    @classmethod
    def make(cls, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> MadeBackend:
        """See ``BackendKind``."""
        return cls(networks, fold, request, artefacts)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        # tensors made in inference mode are of another kind, for which it would compile once more
        with torch.inference_mode(False):
            return self._eager.forward(batch.clone())

    def close(self) -> None:
        """See ``Backend``."""
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
