"""The engine: everything made once for many volumes, from the configuration and a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from connectomics.build.backends import fitting_backends
from connectomics.build.budget import memory_budget_bytes
from connectomics.build.cascade import check_first_stage, first_stage_config
from connectomics.build.models import load_members
from connectomics.build.planes import check_planes, section_axes, stated_planes
from connectomics.build.rules import check_activation, label_rule, probability_rule
from connectomics.config.schema import Config
from connectomics.errors import ConfigError, ModelError
from connectomics.geometry import AxisOrder
from connectomics.inference.predictor import Predictor, RollingPredictor, SlidingWindow
from connectomics.inference.resample import check_rules
from connectomics.inference.windows import as_patch
from connectomics.models.backends.choice import Chosen
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.remembering import REMEMBERED_BYTES, Remembering
from connectomics.models.backends.torch_eager import free_device_bytes, window_bytes
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.spec import ModelSpec
from connectomics.pipeline.finish import Filters
from connectomics.pipeline.memory import share_freed_memory
from connectomics.pipeline.predict import Member, Segmenter
from connectomics.pipeline.run import RunSettings

NNUNET_STEP = 0.5
PACKAGES = (
    "connectomics",
    "nnunetv2",
    "torch",
    "numpy",
    "scipy",
    "scikit-image",
    "tensorstore",
)  # that compute or write


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
    remembering
        Backends that need not compute again what they compute for the sample of fast against exact.
    notes
        Why backends that ``auto`` tried first were not taken, or the one that was does less than it can.
    """

    models: tuple[EngineModel, ...]
    segmenter: Segmenter
    filters: Filters
    settings: RunSettings
    facts: Mapping[str, object]
    deviations: tuple[str, ...]
    base_bytes: int
    device_bytes: int | None
    previous: Engine | None = None
    exact: Segmenter | None = None
    remembering: tuple[Remembering, ...] = ()
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


def program_version() -> str:
    """Name and version of this program as it goes into run keys."""
    return f"connectomics {_version('connectomics')}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute, for provenance."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: _version(name) for name in PACKAGES}


@functools.cache
def _version(name: str) -> str:
    """Of an installed package; looking it up takes milliseconds, and every volume's provenance names it."""
    return importlib.metadata.version(name)


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
    loaded = load_members(config, checkpoint)
    spec = loaded[0][1].spec
    check_activation(config, spec)
    fitting = fitting_backends(config, [m for _, m in loaded], [make_window(config, m.spec).patch for _, m in loaded])
    stated, config, chosen, reference = config, fitting.config, fitting.chosen, fitting.reference
    models = tuple(_engine_model(config, path, model) for path, model in loaded)
    first, fast = chosen.backends[0][0], reference is not None
    remembering = _remembering(chosen) if fast else ()
    segmenter = _segmenter(config, models, remembering or chosen.backends)
    exact = None if reference is None else _segmenter(config, models, reference.backends)
    binary = config.inference.postprocessing.binary
    filters = Filters(binary.remove_small_objects, binary.fill_holes) if binary.enabled else Filters()
    settings = RunSettings(
        Path(config.inference.data.output_path),
        program_version(),
        memory_budget_bytes(config),
        first.numeric_class.as_dict(),
        config.system.allow_mixed_devices,
        max(1, config.system.inference.num_workers or 1),
    )
    facts = _facts(config, models, segmenter, filters, fast=fast)
    previous = _first_stage(stated, [model.spec for model in models])  # which has a batch of its own
    deviations = _deviations(config, models, segmenter)
    if fast and first.device.type == "cpu":
        deviations += ("bfloat16 instead of float32 (inference.precision=fast)",)
    if previous is not None:
        deviations += tuple(f"the previous stage: {text}" for text in previous.deviations)
    base_bytes = psutil.Process().memory_info().rss + REMEMBERED_BYTES * sum(map(len, remembering))
    free = free_device_bytes(first.device)
    return Engine(
        models,
        segmenter,
        filters,
        settings,
        facts,
        deviations,
        base_bytes,
        free,
        previous,
        exact,
        tuple(itertools.chain(*remembering)),
        chosen.notes,
    )


def _remembering(chosen: Chosen) -> tuple[tuple[Remembering, ...], ...]:
    """The backends, if they can remember: on the CPU, one window at a time, for larger batches do not recur."""
    first = chosen.backends[0][0]
    if first.device.type != "cpu" or first.numeric_class.batch > 1:
        return ()
    return tuple(tuple(map(Remembering, row)) for row in chosen.backends)


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


def _members(config: Config, model: EngineModel, backends: tuple[Backend, ...], weight: float) -> tuple[Member, ...]:
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
        Member(
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


def make_window(config: Config, spec: ModelSpec) -> SlidingWindow:
    """How a model's windows are laid.

    Raises
    ------
    ConfigError
        If what is stated does not fit the model.
    """
    stated = config.inference.sliding_window
    patch = spec.patch_shape
    if stated.window_size is not None:
        patch = as_patch(stated.window_size, spec.patch_shape)
        if spec.dimensions == 2 and patch[0] != 1:
            raise ConfigError(
                f"inference.sliding_window.window_size is {stated.window_size}, but the model is 2D; state (y, x)"
            )
    return SlidingWindow(
        patch,
        NNUNET_STEP if stated.overlap is None else round(1.0 - stated.overlap, 12),  # 1 - 0.9 is not 0.1
        stated.blending,
        _mirror_axes(config, spec),
        stated.sw_batch_size or 1,
    )


def _mirror_axes(config: Config, spec: ModelSpec) -> tuple[int, ...]:
    stated = config.inference.test_time_augmentation
    if not stated.enabled:
        return ()
    if stated.flip_axes is None:
        return spec.mirror_axes
    if spec.dimensions == 2 and 0 in stated.flip_axes:
        raise ConfigError(
            "inference.test_time_augmentation.flip_axes names 0 (z), but the model is 2D; use 1 (y) and 2 (x)"
        )
    return tuple(stated.flip_axes)


def make_predictor(config: Config, backends: tuple[Backend, ...], window: SlidingWindow, spec: ModelSpec) -> Predictor:
    """The predictor that lays a model's windows for these backends, one a fold."""
    if config.inference.sliding_window.engine == "nnunet":
        return RollingPredictor(backends, window, spec.classes)
    from connectomics.inference.monai_window import MonaiPredictor

    return MonaiPredictor(backends, window, config.inference.sliding_window.padding_mode)


def _facts(
    config: Config, models: tuple[EngineModel, ...], segmenter: Segmenter, filters: Filters, *, fast: bool
) -> dict[str, object]:
    """Settings that decide labels and probabilities alike, as JSON values."""
    stated = config.inference
    common: dict[str, object] = {
        "engine": stated.sliding_window.engine,
        "padding_mode": stated.sliding_window.padding_mode,
        "threshold": segmenter.labels.threshold,
        "foreground": list(segmenter.labels.foreground),
        "painted": list(segmenter.labels.painted),
        "remove_small_objects": filters.minimum_voxels,
        "fill_holes": filters.fill_holes,
        "axes": stated.axes,
        "voxel_size_nm": stated.voxel_size_nm,
    }
    if fast:
        common["precision"] = "fast"
    planes = stated_planes(config)
    members = segmenter.members[:: len(planes)]  # of each model the first; the others differ in the plane alone
    own: list[dict[str, object]] = [
        {
            "model_sha256": model.spec.sha256,
            "window_size": list(model.window.patch),
            "tile_step_size": model.window.step,
            "blending": model.window.blending,
            "mirror_axes": list(model.window.mirror_axes),
            "case": "slice" if member.by_slice else "volume",
        }
        for model, member in zip(models, members, strict=True)
    ]
    if planes != ["xy"]:
        common["planes"] = planes
    if len(own) == 1:
        return common | own[0]
    for facts, member in zip(own, members, strict=True):
        facts["weight"] = member.weight
    return common | {"ensemble": own}


def _deviations(config: Config, models: tuple[EngineModel, ...], segmenter: Segmenter) -> tuple[str, ...]:
    inference, planes = config.inference, stated_planes(config)
    tests = [
        (planes != ["xy"], f"{'a mean over the planes' if len(planes) > 1 else 'the plane'} {', '.join(planes)}"),
        (inference.sliding_window.engine != "nnunet", "MONAI's window grid"),
        (inference.postprocessing.binary.enabled, "labels by a threshold"),
        (inference.roi is not None, "background outside inference.roi"),
        (inference.mask is not None, "background outside inference.mask"),
        (len({m.weight for m in segmenter.members}) > 1, "a weighted mean of probabilities"),
    ]
    for model, member in zip(models, segmenter.members[:: len(planes)], strict=True):
        spec, window = model.spec, model.window
        of = f" of {model.checkpoint}" if len(models) > 1 else ""
        mirrored = inference.test_time_augmentation.enabled and window.mirror_axes != spec.mirror_axes
        tests += [
            (window.patch != spec.patch_shape, f"window size{of} {window.patch} instead of {spec.patch_shape}"),
            (window.step != NNUNET_STEP, f"tile step size{of} {window.step:g} instead of {NNUNET_STEP}"),
            (window.blending != "gaussian", f"constant blending{of}"),
            (mirrored, f"mirror axes{of} {window.mirror_axes} instead of {spec.mirror_axes}"),
            (member.by_slice != spec.slice_case, f"case{of} {'slice' if member.by_slice else 'volume'}"),
        ]
    return tuple(text for holds, text in tests if holds)
