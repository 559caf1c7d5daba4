"""Run pre-trained nnU-Net v2 models on electron-microscopy volumes of any size.

These names are the public API, see docs/api.md. Each is imported when it is first used, so that
``import connectomics`` itself loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connectomics.assembly.engine.make_engine import build_engine
    from connectomics.assembly.volumes import list_sources
    from connectomics.config.load import load_config
    from connectomics.config.schema import Config
    from connectomics.core.errors import ConnectomicsError
    from connectomics.core.geometry import Box
    from connectomics.jobs.outcome import VolumeOutcome
    from connectomics.lightning.inference import InferenceManager, Prediction, VolumeProcessor
    from connectomics.models.checkpoint import read_spec
    from connectomics.volumes.opening import open_volume

__all__ = [
    "Box",
    "Config",
    "ConnectomicsError",
    "InferenceManager",
    "Prediction",
    "VolumeOutcome",
    "VolumeProcessor",
    "build_engine",
    "list_sources",
    "load_config",
    "open_volume",
    "read_spec",
]

_HOMES = {
    "Box": "core.geometry",
    "Config": "config.schema",
    "ConnectomicsError": "core.errors",
    "InferenceManager": "lightning.inference",
    "Prediction": "lightning.inference",
    "VolumeOutcome": "jobs.outcome",
    "VolumeProcessor": "lightning.inference",
    "build_engine": "assembly.engine.make_engine",
    "list_sources": "assembly.volumes",
    "load_config": "config.load",
    "open_volume": "volumes.opening",
    "read_spec": "models.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'connectomics' has no attribute {name!r}; public are {', '.join(__all__)}")
    value: object = vars(importlib.import_module(f"connectomics.{_HOMES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
