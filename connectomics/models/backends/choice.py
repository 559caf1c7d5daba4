"""Which backend runs the networks: the one that is named, or the first that this machine has.

``assembly`` asks once, before the first block; all networks of a run are of one numeric class.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from connectomics.core.errors import ConfigError, DeviceError
from connectomics.core.features import BACKENDS
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.contract import Backend, BackendKind, BackendRequest, MadeBackend, ModelNetworks
from connectomics.models.backends.device import select_device

log = logging.getLogger(__name__)
AUTO = "auto"
FIRST_ON_CPU = ("openvino", "torch")
"""What auto tries. ``compile`` has to be named: it needs a C++ compiler and compiles for a quarter of a minute."""


@dataclass(frozen=True, slots=True)
class ChosenBackends:
    """Backends of each model, one a fold; why others that come first were not taken, or these do less than they can."""

    backends: tuple[tuple[Backend, ...], ...]
    notes: tuple[str, ...] = ()


def backend_kind(name: str) -> BackendKind:
    """Return the class of a backend that the configuration names, not ``auto``."""
    found: BackendKind = BACKENDS.load(name)
    return found


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
        A name in ``BACKENDS``, or ``auto``: on the CPU the first of ``FIRST_ON_CPU`` that works, elsewhere torch.
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
    if name != AUTO and name not in BACKENDS:
        raise ConfigError(f"'{name}' is not a backend; use {AUTO}, {', '.join(BACKENDS.names())}")
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


def _noted(backends: tuple[tuple[MadeBackend, ...], ...], notes: Sequence[str]) -> ChosenBackends:
    own = (backend.note for row in backends for backend in row if backend.note)
    return ChosenBackends(backends, tuple(dict.fromkeys([*notes, *own])))


def _made(
    name: str, terms: BackendRequest, models: Sequence[ModelNetworks], artefacts: Artefacts
) -> tuple[tuple[MadeBackend, ...], ...]:
    make = backend_kind(name).make
    return tuple(tuple(make(m, fold, terms, artefacts) for fold in range(len(m.modules))) for m in models)
