"""The engine: everything made once for many volumes, from the configuration and a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import psutil

from connectomics.assembly.engine.backends import fitting_backends
from connectomics.assembly.engine.budget import memory_budget_bytes
from connectomics.assembly.engine.cascade import check_first_stage, first_stage_config
from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.identity import deviations_of, program_version, result_facts
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.engine.planes import check_planes, section_axes
from connectomics.assembly.engine.rules import check_activation, label_rule, probability_rule
from connectomics.assembly.engine.windows import make_predictor, make_window
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ModelError
from connectomics.core.geometry import AxisOrder
from connectomics.inference.resample import check_rules
from connectomics.models.backends.cached import CACHED_BYTES, CachedBackend
from connectomics.models.backends.choice import ChosenBackends
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.torch_eager import free_device_bytes, window_bytes
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.spec import ModelSpec
from connectomics.planning.memory import share_freed_memory
from connectomics.runs.volume import RunSettings
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter


def build_engine(config: Config, checkpoint: Path | None = None) -> Engine:
    """Make everything that serves all volumes.

    Parameters
    ----------
    config
        The configuration.
    checkpoint
        From the command line; replaces ``model.nnunet_checkpoint``.

    Raises
    ------
    ConfigError, ModelError, DeviceError
        If the configuration, the model or the device does not fit.
    """
    share_freed_memory()
    loaded = load_models(config, checkpoint)
    spec = loaded[0][1].spec
    check_activation(config, spec)
    fitting = fitting_backends(config, [m for _, m in loaded], [make_window(config, m.spec).patch for _, m in loaded])
    stated, config, chosen, reference = config, fitting.config, fitting.chosen, fitting.reference
    models = tuple(_engine_model(config, path, model) for path, model in loaded)
    first, fast = chosen.backends[0][0], reference is not None
    cached_backends = _cached(chosen) if fast else ()
    segmenter = _segmenter(config, models, cached_backends or chosen.backends)
    exact = None if reference is None else _segmenter(config, models, reference.backends)
    binary = config.inference.postprocessing.binary
    filters = BinaryFilters(binary.remove_small_objects, binary.fill_holes) if binary.enabled else BinaryFilters()
    settings = RunSettings(
        Path(config.inference.data.output_path),
        program_version(),
        memory_budget_bytes(config),
        first.numeric_class.as_dict(),
        allow_mixed=config.system.allow_mixed_devices,
        readers=max(1, config.system.inference.num_workers or 1),
    )
    facts = result_facts(config, models, segmenter, filters, fast=fast)
    previous = _first_stage(stated, [model.spec for model in models])  # which has a batch of its own
    deviations = deviations_of(config, models, segmenter)
    if fast and first.device.type == "cpu":
        deviations += ("bfloat16 instead of float32 (inference.precision=fast)",)
    if previous is not None:
        deviations += tuple(f"the previous stage: {text}" for text in previous.deviations)
    base_bytes = psutil.Process().memory_info().rss + CACHED_BYTES * sum(map(len, cached_backends))
    free = free_device_bytes(first.device)
    return Engine(
        models,
        segmenter,
        filters,
        settings,
        facts=facts,
        deviations=deviations,
        base_bytes=base_bytes,
        device_bytes=free,
        previous=previous,
        exact=exact,
        cached_backends=tuple(itertools.chain(*cached_backends)),
        notes=chosen.notes,
    )


def _cached(chosen: ChosenBackends) -> tuple[tuple[CachedBackend, ...], ...]:
    """The backends, if they can remember: on the CPU, one window at a time, for larger batches do not recur."""
    first = chosen.backends[0][0]
    if first.device.type != "cpu" or first.numeric_class.batch > 1:
        return ()
    return tuple(tuple(map(CachedBackend, row)) for row in chosen.backends)


def _segmenter(config: Config, models: tuple[EngineModel, ...], backends: Sequence[tuple[Backend, ...]]) -> Segmenter:
    spec = models[0].spec
    weights = config.model.ensemble_weights or [1.0] * len(models)
    return Segmenter(
        tuple(m for each in zip(models, backends, weights, strict=True) for m in _members(config, *each)),
        spec.classes,
        label_rule(config, spec),
        probability_rule(config, spec) if config.inference.output.save_probabilities else None,
    )


def _first_stage(config: Config, specs: Sequence[ModelSpec]) -> Engine | None:
    own = first_stage_config(config, specs)
    if own is None:
        return None
    engine = build_engine(own)
    check_first_stage(config, specs, engine.spec)
    return engine


def _engine_model(config: Config, path: Path, model: LoadedModel) -> EngineModel:
    window = make_window(config, model.spec)
    return EngineModel(path, model.spec, window, window_bytes(model.skeleton, window.patch))


def _members(
    config: Config, model: EngineModel, backends: tuple[Backend, ...], weight: float
) -> tuple[EnsembleMember, ...]:
    """A model along each plane."""
    spec = model.spec
    check_planes(config, spec, model.checkpoint)
    by_slice = spec.slice_case if config.inference.case == "auto" else config.inference.case == "slice"
    check_resampling(config, spec, by_slice=by_slice)
    if by_slice and spec.previous_stage is not None and any(scheme.masked for scheme in spec.normalisations):
        raise ModelError(
            f"configuration '{spec.configuration}' is the second stage of a cascade, normalises within a mask "
            "(use_mask_for_norm), and each section is a case; that is not supported: set inference.case=volume, or use "
            "nnU-Net itself for it"
        )
    predictor = make_predictor(config, backends, model.window, spec)
    values = () if spec.previous_stage is None else spec.foreground_labels
    return tuple(
        EnsembleMember(
            predictor,
            spec.normalisations,
            by_slice,
            AxisOrder(spec.axis_order).after(AxisOrder.across(axis)),
            weight=weight,
            previous_values=values,
            section_axis=axis,
        )
        for axis in section_axes(config)
    )


def check_resampling(config: Config, spec: ModelSpec, *, by_slice: bool) -> None:
    """Refuse ``inference.resample=plan`` where nnU-Net resamples nothing, or otherwise than this program can."""
    if config.inference.resample == "off":
        return
    if by_slice:
        raise ConfigError(
            "inference.resample=plan: each section is a case of its own here, and nnU-Net gives 2D images no "
            "spacing to resample by; set inference.resample=off"
        )
    check_rules(spec.resampling_data, spec.resampling_probabilities, spec.resampling_labels)
