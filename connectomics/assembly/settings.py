"""The configuration, resolved once into small values; the rest of this room takes of them what it reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from connectomics.config.inference_keys import PLANES, InferenceConfig
from connectomics.config.load import Given, as_config
from connectomics.config.schema import Config, DataConfig, ModelConfig, SystemConfig
from connectomics.config.validation import changed_values
from connectomics.core.errors import NO_MODEL, ConfigError
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.core.places import local_path
from connectomics.core.process import cpus
from connectomics.models.backends.precisions import Precision, default_precision, precision_named
from connectomics.models.locate import ModelRequest
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.volumes.volume import Nanometres, Spacing

BUDGET_SHARE = 0.5  # of the machine's memory, where no budget is stated
NNUNET_THREADS = 8  # nnU-Net's own upper bound of threads in a forward pass


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which models: one, or an ensemble with a weight each, what is expected of them, and their previous stage."""

    requests: tuple[ModelRequest, ...]
    weights: tuple[float, ...]
    expected: Mapping[str, object]
    previous_stage: str | None = None


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """How networks are run; None leaves a thing to the machine, or to what ``connectomics tune`` measured."""

    device: str
    backend: str
    stated_precision: str | None
    max_disagreement: float
    batch: int | None
    stated_threads: int | None
    cache: Path | None
    budget_bytes: int

    @property
    def precision(self) -> Precision:
        """What is stated, else the device's default."""
        stated = self.stated_precision
        return default_precision(self.device) if stated is None else precision_named(stated)

    @property
    def threads(self) -> int:
        """CPU threads of a forward pass: what is stated, else this process's CPUs, at most nnU-Net's own 8."""
        return self.stated_threads or min(NNUNET_THREADS, cpus())


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """How windows are laid; ``shape`` is (y, x) or (z, y, x), None the model's own, as ``flip_axes`` are."""

    shape: tuple[int, ...] | None
    overlap: float | None
    blending: str
    engine: str
    padding_mode: str
    mirroring: bool
    flip_axes: tuple[int, ...] | None

    @property
    def whole(self) -> bool:
        """Whether the engine predicts whole cases, which cannot be cut."""
        return self.engine == "monai"


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """What is kept of logits; ``threshold`` and ``filters`` are those of binary post-processing, None and none."""

    threshold: float | None = None
    filters: BinaryFilters = dataclasses.field(default_factory=BinaryFilters)
    activation: str | None = None
    channels: tuple[int, ...] | None = None
    save_probabilities: bool = False
    intensity_scale: float | None = None
    intensity_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """How a volume is read and what a case is; ``planes`` are the axes (0 = z, …) across which sections lie."""

    axes: str | None
    voxel_size_nm: Nanometres | None
    case: str
    planes: tuple[int, ...]
    allow_anisotropic: bool
    resample: bool
    spacing: Spacing | None
    allow_large_resampling: bool

    @property
    def plane_names(self) -> list[str]:
        """Names of the planes in the order they are computed in, whatever the order they are stated in."""
        return [PLANES[axis] for axis in self.planes]


@dataclass(frozen=True, slots=True)
class RegionSettings:
    """What of a volume is wanted: a box, what a mask names, both, or all."""

    box: Box | None = None
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Where results go and which files are left; ``block_shape`` (z, y, x) None lets memory decide."""

    folder: Path
    suffix: str
    formats: tuple[str, ...]
    pyramid: bool
    overwrite: bool
    block_shape: Vec3 | None


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What changes no voxel: names for the provenance, the keys that are not at their defaults, limits of this call."""

    experiment_name: str
    description: str
    seed: int
    changed: Mapping[str, object]
    decodes: bool
    readers: int
    allow_mixed: bool
    stale_s: float


@dataclass(frozen=True, slots=True)
class InferenceSettings:
    """All of a configuration that labelling volumes needs, in parts."""

    models: ModelSettings
    networks: NetworkSettings
    windows: WindowSettings
    labels: LabelSettings
    volumes: VolumeSettings
    region: RegionSettings
    outputs: OutputSettings
    call: CallSettings


def resolve(config: Config | Given | None, checkpoint: str | os.PathLike[str] | None = None) -> InferenceSettings:
    """Resolve a configuration or what ``as_config`` makes one of; the checkpoint of the command line replaces
    ``model.nnunet_checkpoint``.

    Raises
    ------
    ConfigError
        If no model is named, or device and number of GPUs contradict each other.
    """
    config = as_config(config)
    system, inference = config.system, config.inference
    window, mirroring = inference.sliding_window, inference.test_time_augmentation
    return InferenceSettings(
        model_settings(config.model, config.data, checkpoint),
        network_settings(config),
        WindowSettings(
            _tuple(window.window_size),
            window.overlap,
            blending=window.blending,
            engine=window.engine,
            padding_mode=window.padding_mode,
            mirroring=mirroring.enabled,
            flip_axes=_tuple(mirroring.flip_axes),
        ),
        _labels(inference),
        volumes=_volumes(inference),
        region=RegionSettings(None if inference.roi is None else Box(*map(vec3, inference.roi)), inference.mask),
        outputs=OutputSettings(
            Path(inference.data.output_path),
            inference.volume_mode.output_suffix,
            formats=tuple(inference.output.formats),
            pyramid=inference.output.pyramid,
            overwrite=inference.output.overwrite,
            block_shape=None if inference.block_shape is None else vec3(inference.block_shape),
        ),
        call=CallSettings(
            config.experiment_name,
            config.description,
            seed=system.seed,
            changed=changed_values(config),
            decodes=bool(config.decoding),
            readers=max(1, system.inference.num_workers or 1),
            allow_mixed=system.allow_mixed_devices,
            stale_s=system.stale_after_s,
        ),
    )


def model_settings(
    model: ModelConfig, data: DataConfig, checkpoint: str | os.PathLike[str] | None = None
) -> ModelSettings:
    """Which models a configuration names, and what it expects of them; ConfigError if it names none."""
    named = model.nnunet_checkpoint if checkpoint is None else checkpoint
    if named is None:
        raise ConfigError(NO_MODEL)
    paths = [local_path(named, "the model"), *map(Path, model.ensemble or ())]
    stated = {
        "model.in_channels": model.in_channels,
        "model.out_channels": model.out_channels,
        "data.in_channels": data.in_channels,
        "data.out_channels": data.out_channels,
        "data.do_2d": data.do_2d,
    }
    return ModelSettings(
        tuple(model_request(model, path) for path in paths),
        tuple(model.ensemble_weights or [1.0] * len(paths)),
        {key: value for key, value in stated.items() if value is not None},
        model.previous_stage,
    )


def model_request(model: ModelConfig, path: Path) -> ModelRequest:
    """How the configuration wants the model at ``path`` to be read."""
    return ModelRequest(
        path,
        folds=model.folds,
        checkpoint_name=model.checkpoint_name,
        plans=Path(model.nnunet_plans) if model.nnunet_plans else None,
        dataset=Path(model.nnunet_dataset) if model.nnunet_dataset else None,
        sha256=model.sha256,
        trust_code=model.trust_code,
        architecture=model.architecture,
    )


def network_settings(config: Config) -> NetworkSettings:
    """How a configuration wants networks to be run; ConfigError where its words on GPUs contradict each other."""
    system, inference = config.system, config.inference
    return NetworkSettings(
        _device(system, config.model.nnunet_device or system.device),
        system.backend,
        inference.precision,
        inference.max_disagreement,
        batch=inference.sliding_window.sw_batch_size,
        stated_threads=system.inference.num_cpus or system.num_cpus,
        cache=_cache(system.cache_dir),
        budget_bytes=memory_budget_bytes(system.memory_budget_gb),
    )


def memory_budget_bytes(stated_gb: float | None) -> int:
    """Host memory a run may use: what is stated (10^9 bytes), else half of the machine's."""
    return int(stated_gb * 1e9) if stated_gb is not None else int(psutil.virtual_memory().total * BUDGET_SHARE)


def _device(system: SystemConfig, device: str) -> str:
    gpus = system.num_gpus if system.inference.num_gpus is None else system.inference.num_gpus
    if gpus == 0 and device == "auto":
        return "cpu"
    if gpus == 0 and device != "cpu":
        raise ConfigError(f"num_gpus=0 allows no GPU, but the device is '{device}'; set num_gpus=1 or device=cpu")
    if gpus == 1 and device == "cpu":
        raise ConfigError("num_gpus=1 asks for a GPU, but the device is 'cpu'; set system.device=cuda or num_gpus=0")
    return "cuda" if gpus == 1 and device == "auto" else device


def _cache(stated: str | None) -> Path | None:
    """Where compiled networks are kept: what is stated, else in the user's own cache; None where there is no home."""
    if stated is not None:
        return Path(stated)
    own = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(own) if Path(own).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "connectomics"


def _labels(inference: InferenceConfig) -> LabelSettings:
    post, mirroring = inference.postprocessing, inference.test_time_augmentation
    binary = post.binary
    return LabelSettings(
        binary.threshold if binary.enabled else None,
        BinaryFilters(binary.remove_small_objects, binary.fill_holes) if binary.enabled else BinaryFilters(),
        activation=mirroring.act,
        channels=_tuple(mirroring.select_channel),
        save_probabilities=inference.output.save_probabilities,
        intensity_scale=post.intensity_scale,
        intensity_dtype=post.intensity_dtype,
    )


def _volumes(inference: InferenceConfig) -> VolumeSettings:
    size, spacing = inference.voxel_size_nm, inference.spacing
    return VolumeSettings(
        inference.axes,
        None if size is None else (size[0], size[1], size[2]),
        inference.case,
        tuple(axis for axis, plane in enumerate(PLANES) if plane in inference.planes),
        allow_anisotropic=inference.allow_anisotropic_planes,
        resample=inference.resample == "plan",
        spacing=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
        allow_large_resampling=inference.allow_large_resampling,
    )


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
