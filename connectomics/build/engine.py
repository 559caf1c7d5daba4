"""The engine: everything made once for many volumes, from the configuration and a checkpoint."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from connectomics.config.schema import Config
from connectomics.errors import ConfigError, ModelError
from connectomics.geometry import AxisOrder
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.inference.predictor import Predictor, RollingPredictor, SlidingWindow
from connectomics.inference.resample import check_rules
from connectomics.inference.windows import as_patch
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.models.checkpoint import LoadedModel, load_model
from connectomics.models.spec import ModelSpec
from connectomics.pipeline.finish import Filters
from connectomics.pipeline.predict import Segmenter
from connectomics.pipeline.run import RunSettings

NNUNET_STEP = 0.5
NNUNET_THREADS = 8  # nnU-Net's own upper bound of threads in a forward pass
BUDGET_SHARE = 0.5  # of the machine's memory, where no budget is stated


@dataclass(frozen=True, slots=True)
class Engine:
    """All that is made once for many volumes.

    Parameters
    ----------
    checkpoint
        Where the model was loaded from.
    spec
        The model.
    window
        Window, step, blending, mirroring.
    segmenter
        Predictor and rules for labels and probabilities.
    filters
        Whole-volume filters of the labels.
    by_slice
        Whether each section is a case of its own.
    settings
        Folder, budget, numeric class.
    facts
        Settings that decide the result, for result keys and provenance.
    deviations
        In which ways this is not nnU-Net's own inference; empty when it is.
    """

    checkpoint: Path
    spec: ModelSpec
    window: SlidingWindow
    segmenter: Segmenter
    filters: Filters
    by_slice: bool
    settings: RunSettings
    facts: Mapping[str, object]
    deviations: tuple[str, ...]


def program_version() -> str:
    """Name and version of this program as it goes into run keys."""
    return f"connectomics {importlib.metadata.version('connectomics')}"


def memory_budget_bytes(config: Config) -> int:
    """Host memory a run may use: what is stated, else half of the machine's."""
    stated = config.system.memory_budget_gb
    return int(stated * 1e9) if stated is not None else int(psutil.virtual_memory().total * BUDGET_SHARE)


def threads(config: Config) -> int:
    """CPU threads of a forward pass: what is stated, else this process's CPUs, at most nnU-Net's own 8."""
    stated = config.system.inference.num_cpus or config.system.num_cpus
    available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return stated or min(NNUNET_THREADS, available)


def device_name(config: Config) -> str:
    """The device the network runs on.

    Raises
    ------
    ConfigError
        If no GPU is allowed and one is asked for.
    """
    device = config.model.nnunet_device or config.system.device
    gpus = config.system.inference.num_gpus
    gpus = config.system.num_gpus if gpus is None else gpus
    if gpus == 0 and device == "auto":
        return "cpu"
    if gpus == 0 and device != "cpu":
        raise ConfigError(f"num_gpus=0 allows no GPU, but the device is '{device}'; set num_gpus=1 or device=cpu")
    if gpus == 1 and device == "cpu":
        raise ConfigError("num_gpus=1 asks for a GPU, but the device is 'cpu'; set system.device=cuda or num_gpus=0")
    return "cuda" if gpus == 1 and device == "auto" else device


def checkpoint_path(config: Config, checkpoint: Path | None) -> Path:
    """The model that the command line, or else the configuration, names.

    Raises
    ------
    ConfigError
        If none is named.
    """
    if checkpoint is not None:
        return checkpoint
    if config.model.nnunet_checkpoint is None:
        raise ConfigError("no model is named; give --checkpoint PATH or set model.nnunet_checkpoint")
    return Path(config.model.nnunet_checkpoint)


def load(config: Config, checkpoint: Path | None) -> LoadedModel:
    """Load the model the configuration or the command line names and hold it against what is expected of it.

    Raises
    ------
    ConfigError
        If no checkpoint is named.
    ModelError
        If it cannot be loaded or is not what the configuration says.
    """
    model, stated = config.model, checkpoint_path(config, checkpoint)
    loaded = load_model(
        stated,
        folds=model.folds,
        checkpoint_name=model.checkpoint_name,
        plans=Path(model.nnunet_plans) if model.nnunet_plans else None,
        dataset=Path(model.nnunet_dataset) if model.nnunet_dataset else None,
        sha256=model.sha256,
        trust_code=model.trust_code,
        architecture=model.architecture,
    )
    _check_expectations(config, loaded.spec, stated)
    return loaded


def _check_expectations(config: Config, spec: ModelSpec, path: Path) -> None:
    expected: tuple[tuple[str, object, object], ...] = (
        ("model.in_channels", config.model.in_channels, spec.channels),
        ("model.out_channels", config.model.out_channels, spec.classes),
        ("data.in_channels", config.data.in_channels, spec.channels),
        ("data.out_channels", config.data.out_channels, spec.classes),
        ("data.do_2d", config.data.do_2d, spec.dimensions == 2),
    )
    for key, stated, found in expected:
        if stated is not None and stated != found:
            raise ModelError(f"{path}: {key} is {stated}, but the model has {found}; mend the key or leave it null")


def describe(config: Config, checkpoint: Path) -> dict[str, object]:
    """What ``connectomics inspect`` prints of a model, as JSON values."""
    spec = load(config, checkpoint).spec
    axes = "zyx"  # of the volume; patch, spacing and mirror axes are those of the transposed axes
    return {
        "model": str(checkpoint),
        "configuration": f"{spec.configuration} ({spec.dimensions}D)",
        "trainer": spec.trainer_name,
        "plans": spec.plans_name,
        "dataset": spec.dataset_name,
        "folds": ", ".join(spec.folds),
        "axes": "".join(axes[a] for a in spec.axis_order),
        "patch (z, y, x)": list(spec.patch_shape),
        "spacing (z, y, x)": list(spec.spacing),
        "channels": ", ".join(spec.channel_names),
        "normalisation": ", ".join(n.scheme for n in spec.normalisations),
        "labels": ", ".join(f"{value}={name}" for name, value in spec.label_names),
        "regions": ", ".join(f"{name}={'+'.join(map(str, values))}" for name, values in spec.regions) or "none",
        "case": "each section" if spec.slice_case else "the whole volume",
        "mirror axes": "".join(axes[a] for a in spec.mirror_axes) or "none",
        "image reader": spec.image_reader,
        "parameters": spec.parameters,
        "sha256": spec.weights_sha256,
        "files": [f"{name} {digest}" for name, digest in spec.files],
    }


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
    loaded = load(config, checkpoint)
    spec = loaded.spec
    activation = _activation(config, spec)
    window = _window(config, spec)
    backends = tuple(
        TorchBackend(n, device=device_name(config), batch=window.batch, threads=threads(config))
        for n in loaded.networks
    )
    by_slice = spec.slice_case if config.inference.case == "auto" else config.inference.case == "slice"
    _check_resampling(config, spec, by_slice=by_slice)
    segmenter = Segmenter(
        _predictor(config, backends, window, spec),
        spec.normalisations,
        _label_rule(config, spec),
        _probability_rule(config, spec, activation) if config.inference.output.save_probabilities else None,
        order=AxisOrder(spec.axis_order),
    )
    binary = config.inference.postprocessing.binary
    filters = Filters(binary.remove_small_objects, binary.fill_holes) if binary.enabled else Filters()
    settings = RunSettings(
        Path(config.inference.data.output_path),
        program_version(),
        memory_budget_bytes(config),
        backends[0].numeric_class.as_dict(),
        config.system.allow_mixed_devices,
        max(1, config.system.inference.num_workers or 1),
    )
    facts = _facts(config, spec, window, segmenter, filters, by_slice)
    return Engine(
        checkpoint_path(config, checkpoint),
        spec,
        window,
        segmenter,
        filters,
        by_slice,
        settings,
        facts,
        _deviations(config, spec, window, by_slice),
    )


def _check_resampling(config: Config, spec: ModelSpec, *, by_slice: bool) -> None:
    """Refuse ``inference.resample=plan`` where nnU-Net resamples nothing, or otherwise than this program can."""
    if config.inference.resample == "off":
        return
    if by_slice:
        raise ConfigError(
            "inference.resample=plan: each section is a case of its own here, and nnU-Net gives 2D images no "
            "spacing to resample by; set inference.resample=off"
        )
    check_rules(spec.resampling_data, spec.resampling_probabilities)


def _window(config: Config, spec: ModelSpec) -> SlidingWindow:
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
        stated.sw_batch_size,
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


def _predictor(config: Config, backends: tuple[Backend, ...], window: SlidingWindow, spec: ModelSpec) -> Predictor:
    if config.inference.sliding_window.engine == "nnunet":
        return RollingPredictor(backends, window, spec.classes)
    from connectomics.inference.monai_window import MonaiPredictor

    return MonaiPredictor(backends, window, config.inference.sliding_window.padding_mode)


def _selected(config: Config, spec: ModelSpec) -> tuple[int, ...] | None:
    stated = config.inference.test_time_augmentation.select_channel
    if stated is None:
        return None
    if any(not 0 <= c < spec.classes for c in stated):
        raise ConfigError(
            f"inference.test_time_augmentation.select_channel is {stated}, but the model has classes 0 to "
            f"{spec.classes - 1}"
        )
    return tuple(stated)


def _label_rule(config: Config, spec: ModelSpec) -> LabelRule:
    binary = config.inference.postprocessing.binary
    painted = spec.class_values if spec.regions else ()
    if not binary.enabled:
        return LabelRule(spec.label_dtype, painted=painted)
    first = 0 if spec.regions else 1  # among labels, the first is the background
    foreground = _selected(config, spec) or tuple(range(first, spec.classes))
    return LabelRule(np.dtype(np.uint8), binary.threshold, foreground, painted)


def _activation(config: Config, spec: ModelSpec) -> str:
    """What makes probabilities of the model's logits, or none.

    Raises
    ------
    ConfigError
        If the configuration states the other family's.
    """
    stated = config.inference.test_time_augmentation.act
    own, outputs = (
        ("sigmoid", "regions, which overlap") if spec.regions else ("softmax", "labels, which exclude others")
    )
    if stated not in (None, "none", own):
        raise ConfigError(
            f"inference.test_time_augmentation.act is '{stated}', but the model gives {outputs}, so its probabilities "
            f"are a {own}; state null or {own}"
        )
    return stated or own


def _probability_rule(config: Config, spec: ModelSpec, activation: str) -> ProbabilityRule:
    post = config.inference.postprocessing
    channels = _selected(config, spec) or tuple(range(spec.classes))
    rule = ProbabilityRule(
        channels,
        activation,
        1.0 if post.intensity_scale is None else post.intensity_scale,
        np.dtype(post.intensity_dtype or np.float32),
    )
    if config.inference.output.formats == ["png"] and not rule.fits_png:
        raise ConfigError(
            f"inference.output.formats is [png], which cannot hold probabilities of {len(channels)} classes as "
            f"{rule.dtype}; add h5, tiff or zarr, or keep one class (select_channel) as uint8 (intensity_dtype)"
        )
    return rule


def _facts(
    config: Config, spec: ModelSpec, window: SlidingWindow, segmenter: Segmenter, filters: Filters, by_slice: bool
) -> dict[str, object]:
    """Settings that decide labels and probabilities alike, as JSON values."""
    stated = config.inference
    return {
        "model_sha256": spec.sha256,
        "engine": stated.sliding_window.engine,
        "padding_mode": stated.sliding_window.padding_mode,
        "window_size": list(window.patch),
        "tile_step_size": window.step,
        "blending": window.blending,
        "mirror_axes": list(window.mirror_axes),
        "case": "slice" if by_slice else "volume",
        "threshold": segmenter.labels.threshold,
        "foreground": list(segmenter.labels.foreground),
        "painted": list(segmenter.labels.painted),
        "remove_small_objects": filters.minimum_voxels,
        "fill_holes": filters.fill_holes,
        "axes": stated.axes,
        "voxel_size_nm": stated.voxel_size_nm,
    }


def _deviations(config: Config, spec: ModelSpec, window: SlidingWindow, by_slice: bool) -> tuple[str, ...]:
    augmentation = config.inference.test_time_augmentation
    tests = (
        (window.patch != spec.patch_shape, f"window size {window.patch} instead of {spec.patch_shape}"),
        (window.step != NNUNET_STEP, f"tile step size {window.step:g} instead of {NNUNET_STEP}"),
        (window.blending != "gaussian", "constant blending"),
        (
            augmentation.enabled and window.mirror_axes != spec.mirror_axes,
            f"mirror axes {window.mirror_axes} instead of {spec.mirror_axes}",
        ),
        (config.inference.sliding_window.engine != "nnunet", "MONAI's window grid"),
        (by_slice != spec.slice_case, f"case {'slice' if by_slice else 'volume'}"),
        (config.inference.postprocessing.binary.enabled, "labels by a threshold"),
    )
    return tuple(text for holds, text in tests if holds)
