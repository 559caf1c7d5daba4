"""Which backend runs the networks: the one that is named, or the first that this machine has.

``assembly`` asks once, before the first block; all networks of a run are of one numeric class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from connectomics.core.errors import ConfigError, DeviceError
from connectomics.core.geometry import Vec3
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.cuda import CudaBackend
from connectomics.models.backends.torch_eager import TorchBackend, select_device

log = logging.getLogger(__name__)
AUTO = "auto"
FIRST_ON_CPU = ("openvino", "torch")
"""What auto tries. ``compile`` has to be named: it needs a C++ compiler and compiles for a quarter of a minute."""


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


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """How networks are to be run: device (a name ``select_device`` knows), precision, rows of a batch, CPU threads.

    ``low_memory`` ones are run seldom, beside others, and give a forward pass's memory back after it where they can.
    """

    device: str
    precision: str
    batch: int
    threads: int
    low_memory: bool = False


@dataclass(frozen=True, slots=True)
class ChosenBackends:
    """Backends of each model, one a fold; why others that come first were not taken, or these do less than they can."""

    backends: tuple[tuple[Backend, ...], ...]
    notes: tuple[str, ...] = ()


def _torch(networks: ModelNetworks, fold: int, terms: BackendRequest, artefacts: Artefacts) -> Backend:
    if terms.precision == "fast" and select_device(terms.device).type == "cuda":
        return CudaBackend(
            networks.modules[fold],
            device=terms.device,
            shape=(terms.batch, networks.channels, *networks.patch),
            threads=terms.threads,
        )
    return TorchBackend(
        networks.modules[fold],
        device=terms.device,
        batch=terms.batch,
        threads=terms.threads,
        precision=terms.precision,
    )


def _compile(networks: ModelNetworks, fold: int, terms: BackendRequest, artefacts: Artefacts) -> Backend:
    from connectomics.models.backends.torch_compile import CompiledBackend

    return CompiledBackend(
        networks.modules[fold],
        device=terms.device,
        shape=(terms.batch, networks.channels, *networks.patch),
        threads=terms.threads,
        precision=terms.precision,
        artefacts=artefacts,
    )


def _openvino(networks: ModelNetworks, fold: int, terms: BackendRequest, artefacts: Artefacts) -> Backend:
    from connectomics.models.backends.openvino import OpenVinoBackend

    if select_device(terms.device).type != "cpu":
        raise DeviceError(f"backend 'openvino' runs on the CPU, but the device is '{terms.device}'; use backend torch")
    networks.let_go()
    backend = OpenVinoBackend(
        functools.partial(networks.modules.__getitem__, fold),
        shape=(terms.batch, networks.channels, *networks.patch),
        threads=terms.threads,
        precision=terms.precision,
        model=f"{networks.sha256} {fold}",
        artefacts=artefacts,
        low_memory=terms.low_memory,
    )
    networks.let_go()
    return backend


BACKENDS: Mapping[str, Callable[[ModelNetworks, int, BackendRequest, Artefacts], Backend]] = {
    "torch": _torch,
    "compile": _compile,
    "openvino": _openvino,
}


def choose(
    name: str,
    terms: BackendRequest,
    models: Sequence[ModelNetworks],
    artefacts: Artefacts,
    measured: Sequence[tuple[str, BackendRequest]] = (),
) -> ChosenBackends:
    """Backends for all networks of all models, of the one kind that is named.

    Parameters
    ----------
    name
        A key of ``BACKENDS``, or ``auto``: on the CPU the first of ``FIRST_ON_CPU`` that works, elsewhere torch.
    terms
        How they are run.
    models
        The networks.
    artefacts
        Where compiled networks are kept.
    measured
        Backends and how each is run, the fastest first, that auto tries before all others.

    Raises
    ------
    ConfigError
        If there is no such backend.
    DeviceError
        If the backend that is named, or the last that auto tries, is not available here, with the reason.
    """
    if name not in (AUTO, *BACKENDS):
        raise ConfigError(f"'{name}' is not a backend; use {AUTO}, {', '.join(BACKENDS)}")
    candidates = [(name, terms)]
    if name == AUTO:
        others = FIRST_ON_CPU if select_device(terms.device).type == "cpu" else ("torch",)
        candidates = [*measured, *((kind, terms) for kind in others if (kind, terms) not in measured)]
    notes: list[str] = []
    for candidate, its_terms in candidates[:-1]:
        try:
            return _noted(_made(candidate, its_terms, models, artefacts), notes)
        except DeviceError as error:
            notes.append(f"{candidate} was not taken: {error}")
            log.warning("system.backend=auto: %s", notes[-1])
    last, its_terms = candidates[-1]
    return _noted(_made(last, its_terms, models, artefacts), notes)


def _noted(backends: tuple[tuple[Backend, ...], ...], notes: Sequence[str]) -> ChosenBackends:
    own = (backend.note for row in backends for backend in row if isinstance(backend, CudaBackend) and backend.note)
    return ChosenBackends(backends, tuple(dict.fromkeys([*notes, *own])))


def _made(
    name: str, terms: BackendRequest, models: Sequence[ModelNetworks], artefacts: Artefacts
) -> tuple[tuple[Backend, ...], ...]:
    make = BACKENDS[name]
    return tuple(tuple(make(m, fold, terms, artefacts) for fold in range(len(m.modules))) for m in models)


def default_precision(device: str) -> str:
    """``fast`` on CUDA, where nnU-Net computes so, and ``exact`` elsewhere."""
    return "fast" if select_device(device).type == "cuda" else "exact"
