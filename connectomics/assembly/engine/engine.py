"""The values that are made once for many volumes: an engine and its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from connectomics.assembly.settings import InferenceSettings
from connectomics.inference.predictor import SlidingWindow
from connectomics.models.backends.cached import CachedBackend
from connectomics.models.spec import ModelSpec
from connectomics.runs.job import RunSettings
from connectomics.stages.predict.segmenter import Segmenter

NNUNET_STEP = 0.5


@dataclass(frozen=True, slots=True)
class EngineModel:
    """One model of an engine; ``window_bytes`` is what its network takes for a window beside input and logits."""

    checkpoint: Path
    spec: ModelSpec
    window: SlidingWindow
    window_bytes: int


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What an engine's results are, for result keys and provenance.

    ``facts`` decide the result, ``deviations`` say in which ways this is not nnU-Net's own inference, and ``notes`` why
    backends that ``auto`` tried first were not taken, or the one that was does less than it can.
    """

    facts: Mapping[str, object]
    deviations: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Host memory of the process with program and models, before the first volume, and free memory of a device.

    ``device_bytes`` is None where the models are in the host's memory.
    """

    base_bytes: int
    device_bytes: int | None


@dataclass(frozen=True, slots=True)
class ExactReference:
    """What a fast engine is held against: the same models in float32, and backends that keep what the sample computed.

    The backends are the fast engine's own.
    """

    segmenter: Segmenter
    cached_backends: tuple[CachedBackend, ...] = ()


@dataclass(frozen=True, slots=True)
class Engine:
    """All that is made once for many volumes, from what the configuration says (``inference``).

    Each model is one of ``segmenter.members`` for each plane, one after the other. ``previous`` is the first stage of a
    cascade, where a model gives its labels, and ``reference`` what a fast precision is held against.
    """

    inference: InferenceSettings
    models: tuple[EngineModel, ...]
    segmenter: Segmenter
    settings: RunSettings
    identity: EngineIdentity
    memory: EngineMemory
    previous: Engine | None = None
    reference: ExactReference | None = None

    @property
    def spec(self) -> ModelSpec:
        """The first model; all of an ensemble have its channels and labels."""
        return self.models[0].spec

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """All models."""
        return tuple(model.spec for model in self.models)

    @property
    def of_members(self) -> tuple[EngineModel, ...]:
        """The model of each of ``segmenter.members``."""
        planes = len(self.segmenter.members) // len(self.models)
        return tuple(model for model in self.models for _ in range(planes))
