"""The engine: everything made once for many volumes, from the configuration and a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence

import psutil

from connectomics.assembly.engine.backends import fitting_backends
from connectomics.assembly.engine.cascade import check_first_stage, first_stage_settings
from connectomics.assembly.engine.engine import Engine, EngineIdentity, EngineMemory, EngineModel, ExactReference
from connectomics.assembly.engine.identity import deviations_of, program_version, result_facts
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.engine.rules import (
    check_activation,
    check_planes,
    label_rule,
    make_predictor,
    make_window,
    probability_rule,
)
from connectomics.assembly.settings import InferenceSettings, resolve
from connectomics.config.load import Given
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ModelError
from connectomics.core.geometry import AxisOrder
from connectomics.inference.resample import check_rules
from connectomics.models.backends.cached import CACHED_BYTES, CachedBackend
from connectomics.models.backends.choice import ChosenBackends
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.device import free_device_bytes
from connectomics.models.backends.precisions import precision_named
from connectomics.models.backends.torch_eager import window_bytes
from connectomics.models.spec import ModelSpec
from connectomics.planning.memory import share_freed_memory
from connectomics.runs.job import RunSettings
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter


def build_engine(config: Config | Given | None = None, checkpoint: str | os.PathLike[str] | None = None) -> Engine:
    """Make everything that serves all volumes.

    Parameters
    ----------
    config
        The configuration, a YAML file, or a mapping.
    checkpoint
        From the command line; replaces ``model.nnunet_checkpoint``.

    Raises
    ------
    ConfigError, ModelError, DeviceError
        If the configuration, the model or the device does not fit.
    """
    return make_engine(resolve(config, checkpoint))


def make_engine(stated: InferenceSettings) -> Engine:
    """Make an engine as ``build_engine`` does, of settings that are resolved."""
    share_freed_memory()
    loaded = load_models(stated.models)
    check_activation(stated.labels.activation, loaded[0][1].spec)
    patches = [make_window(stated.windows, None, model.spec).patch for _, model in loaded]
    fitting = fitting_backends(stated.networks, [model for _, model in loaded], patches)
    chosen, reference = fitting.chosen, fitting.reference
    models = tuple(
        EngineModel(
            path,
            model.spec,
            make_window(stated.windows, fitting.batch, model.spec),
            window_bytes(model.skeleton, patch),
        )
        for (path, model), patch in zip(loaded, patches, strict=True)
    )
    first = chosen.backends[0][0]
    precision = precision_named(first.numeric_class.precision)
    cached_backends = () if reference is None else _cached(chosen)
    segmenter = _segmenter(stated, models, cached_backends or chosen.backends)
    specs, previous = [model.spec for model in models], None
    if (first_stage := first_stage_settings(stated, specs)) is not None:
        previous = make_engine(first_stage)  # with a batch of its own
        check_first_stage(stated, specs, previous.spec)
    deviations = deviations_of(stated, models, segmenter) + precision.deviations.get(first.device.type, ())
    if previous is not None:
        deviations += tuple(f"the previous stage: {text}" for text in previous.identity.deviations)
    base_bytes = psutil.Process().memory_info().rss + CACHED_BYTES * sum(map(len, cached_backends))
    return Engine(
        stated,
        models,
        segmenter,
        RunSettings(
            stated.outputs.folder,
            program_version(),
            stated.networks.budget_bytes,
            first.numeric_class.as_dict(),
            allow_mixed=stated.call.allow_mixed,
            readers=stated.call.readers,
            stale_s=stated.call.stale_s,
        ),
        identity=EngineIdentity(result_facts(stated, models, segmenter, precision), deviations, chosen.notes),
        memory=EngineMemory(base_bytes, free_device_bytes(first.device)),
        previous=previous,
        reference=None
        if reference is None
        else ExactReference(
            _segmenter(stated, models, reference.backends), tuple(itertools.chain.from_iterable(cached_backends))
        ),
    )


def under(engine: Engine, stated: InferenceSettings) -> Engine:
    """The engine for volumes that are read, cut and kept as ``stated`` says; its networks stay as they are."""
    previous, own = engine.previous, first_stage_settings(stated, engine.specs)
    if previous is not None and own is not None:
        previous = dataclasses.replace(previous, inference=own)
    settings = dataclasses.replace(engine.settings, folder=stated.outputs.folder)
    return dataclasses.replace(engine, inference=stated, settings=settings, previous=previous)


def _cached(chosen: ChosenBackends) -> tuple[tuple[CachedBackend, ...], ...]:
    """The backends, if they can remember: on the CPU, one window at a time, for larger batches do not recur."""
    first = chosen.backends[0][0]
    if first.device.type != "cpu" or first.numeric_class.batch > 1:
        return ()
    return tuple(tuple(map(CachedBackend, row)) for row in chosen.backends)


def _segmenter(
    stated: InferenceSettings, models: tuple[EngineModel, ...], backends: Sequence[tuple[Backend, ...]]
) -> Segmenter:
    spec, labels = models[0].spec, stated.labels
    triples = zip(models, backends, stated.models.weights, strict=True)
    return Segmenter(
        tuple(member for each in triples for member in _members(stated, *each)),
        spec.classes,
        label_rule(labels, spec),
        probability_rule(labels, stated.outputs.formats, spec) if labels.save_probabilities else None,
    )


def _members(
    stated: InferenceSettings, model: EngineModel, backends: tuple[Backend, ...], weight: float
) -> tuple[EnsembleMember, ...]:
    """A model along each plane."""
    spec, volumes = model.spec, stated.volumes
    check_planes(volumes.plane_names, spec, model.checkpoint)
    by_slice = spec.slice_case if volumes.case == "auto" else volumes.case == "slice"
    check_resampling(spec, resample=volumes.resample, by_slice=by_slice)
    if by_slice and spec.previous_stage is not None and any(scheme.masked for scheme in spec.normalisations):
        raise ModelError(
            f"configuration '{spec.configuration}' is the second stage of a cascade, normalises within a mask "
            "(use_mask_for_norm), and each section is a case; that is not supported: set inference.case=volume, or use "
            "nnU-Net itself for it"
        )
    predictor = make_predictor(stated.windows, backends, model.window, spec)
    values = () if spec.previous_stage is None else spec.foreground_labels
    return tuple(
        EnsembleMember(
            predictor,
            spec.normalisations,
            AxisOrder(spec.axis_order).after(AxisOrder.across(axis)),
            weight=weight,
            previous_values=values,
            section_axis=axis if by_slice else None,
        )
        for axis in volumes.planes
    )


def check_resampling(spec: ModelSpec, *, resample: bool, by_slice: bool) -> None:
    """Refuse ``inference.resample=plan`` where nnU-Net resamples nothing, or otherwise than this program can."""
    if not resample:
        return
    if by_slice:
        raise ConfigError(
            "inference.resample=plan: each section is a case of its own here, and nnU-Net gives 2D images no "
            "spacing to resample by; set inference.resample=off, or inference.case=volume"
        )
    check_rules(spec.resampling_data, spec.resampling_probabilities, spec.resampling_labels)
