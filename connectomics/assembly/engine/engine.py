"""The values that are made once for many volumes: an engine and its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from connectomics.inference.predictor import SlidingWindow
from connectomics.models.backends.cached import CachedBackend
from connectomics.models.spec import ModelSpec
from connectomics.runs.volume import RunSettings
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import Segmenter

NNUNET_STEP = 0.5


@dataclass(frozen=True, slots=True)
class EngineModel:
    """One model of an engine.

    Parameters
    ----------
    checkpoint
        Where it was loaded from.
    spec
        What it is.
    window
        Window, step, blending, mirroring.
    window_bytes
        What its network takes for a window beside input and logits.
    """

    checkpoint: Path
    spec: ModelSpec
    window: SlidingWindow
    window_bytes: int


@dataclass(frozen=True, slots=True)
class Engine:
    """All that is made once for many volumes.

    Parameters
    ----------
    models
        The models, each of which is one of ``segmenter.members`` for each plane, one after the other.
    segmenter
        Predictors and rules for labels and probabilities.
    filters
        Whole-volume filters of the labels.
    settings
        Folder, budget, numeric class.
    facts
        Settings that decide the result, for result keys and provenance.
    deviations
        In which ways this is not nnU-Net's own inference; empty when it is.
    base_bytes
        Host memory of the process with the program and the models, before the first volume.
    device_bytes
        Free memory of the device beside the models, None where they are in the host's.
    previous
        The first stage of a cascade, where a model gives its labels.
    exact
        Where the precision is fast, the segmenter it is held against: the same models in float32.
    cached_backends
        Backends that need not compute again what they compute for the sample of fast against exact.
    notes
        Why backends that ``auto`` tried first were not taken, or the one that was does less than it can.
    """

    models: tuple[EngineModel, ...]
    segmenter: Segmenter
    filters: BinaryFilters
    settings: RunSettings
    facts: Mapping[str, object]
    deviations: tuple[str, ...]
    base_bytes: int
    device_bytes: int | None
    previous: Engine | None = None
    exact: Segmenter | None = None
    cached_backends: tuple[CachedBackend, ...] = ()
    notes: tuple[str, ...] = ()

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
