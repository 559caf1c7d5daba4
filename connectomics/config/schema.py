"""The typed configuration: every key there is, and the only home of each default.

``connectomics.config.load`` fills it from YAML and ``key=value`` words; ``assembly`` reads it. None means
"the model or the machine decides". ``tutorials/nnunet_mito_inference.yaml`` explains each key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SystemInferenceConfig:
    """``system.inference``: what replaces the values of ``system`` while predicting; None keeps those."""

    batch_size: int | None = None
    num_gpus: int | None = None
    num_cpus: int | None = None
    num_workers: int | None = None


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """``system``: the machine.

    ``device`` is auto (the first CUDA device when there is one, otherwise the CPU), cpu, mps, cuda or cuda:N;
    a named device that is missing is an error. ``backend`` is torch (the reference), compile, openvino, or auto (the
    fastest that is there). ``num_cpus`` counts threads of a forward pass; ``memory_budget_gb`` limits host memory, in
    10^9 bytes. ``cache_dir`` keeps compiled networks and what ``connectomics tune`` measured.
    """

    device: str = "auto"
    backend: str = "torch"
    cache_dir: str | None = None
    seed: int = 0
    num_gpus: int | None = None
    num_cpus: int | None = None
    memory_budget_gb: float | None = None
    allow_mixed_devices: bool = False
    inference: SystemInferenceConfig = field(default_factory=SystemInferenceConfig)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``model``: which trained network, and what is expected of it."""

    architecture: str = "nnunet"
    nnunet_checkpoint: str | None = None
    nnunet_plans: str | None = None
    nnunet_dataset: str | None = None
    nnunet_device: str | None = None
    use_deep_supervision: bool | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    sha256: str | None = None
    trust_code: bool = False
    folds: list[str] | None = None
    checkpoint_name: str = "checkpoint_final.pth"
    ensemble: list[str] | None = None
    ensemble_weights: list[float] | None = None
    previous_stage: str | None = None


@dataclass(frozen=True, slots=True)
class DataConfig:
    """``data``: what the user expects of volumes and model; checked against the model, never changing it."""

    do_2d: bool | None = None
    in_channels: int | None = None
    out_channels: int | None = None


@dataclass(frozen=True, slots=True)
class InferenceDataConfig:
    """``inference.data``: where results go."""

    output_path: str = "outputs"


@dataclass(frozen=True, slots=True)
class VolumeModeConfig:
    """``inference.volume_mode``: the list of volumes and this process's share of it."""

    enabled: bool = True
    start_index: int = 0
    step: int = 1
    stop_on_error: bool = False
    file_list: list[str] | None = None
    file_pattern: str | None = None
    output_suffix: str = "labels"


@dataclass(frozen=True, slots=True)
class SlidingWindowConfig:
    """``inference.sliding_window``: windows in voxels, (y, x) or (z, y, x); overlap = 1 - tile_step_size."""

    window_size: list[int] | None = None
    overlap: float | None = None
    sw_batch_size: int | None = None
    blending: str = "gaussian"
    padding_mode: str = "constant"
    engine: str = "nnunet"


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """``inference.test_time_augmentation``: mirroring (axes 0 = z, 1 = y, 2 = x) and activation."""

    enabled: bool = True
    flip_axes: list[int] | None = None
    ensemble_mode: str = "mean"
    act: str | None = None
    select_channel: list[int] | None = None


@dataclass(frozen=True, slots=True)
class BinaryConfig:
    """``inference.postprocessing.binary``: foreground probability above ``threshold``, then cleaned up."""

    enabled: bool = False
    threshold: float = 0.5
    remove_small_objects: int = 0
    fill_holes: bool = False


@dataclass(frozen=True, slots=True)
class PostprocessingConfig:
    """``inference.postprocessing``: after the network; ``intensity_*`` say how probabilities are saved."""

    binary: BinaryConfig = field(default_factory=BinaryConfig)
    intensity_scale: float | None = None
    intensity_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """``inference.output``: which files are left."""

    formats: list[str] = field(default_factory=lambda: ["h5"])
    pyramid: bool = True
    table: str = "parquet"
    save_probabilities: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """``inference``: how volumes become labels. ``voxel_size_nm`` and ``block_shape`` are (z, y, x).

    ``planes`` are those along which a 2D model runs. ``roi`` is the first voxel that is wanted and the one after the
    last, each (z, y, x); ``mask`` names a volume. ``precision`` is exact (float32) or fast, whose labels may differ in
    a share ``max_disagreement`` of a sample.
    """

    case: str = "auto"
    planes: list[str] = field(default_factory=lambda: ["xy"])
    allow_anisotropic_planes: bool = False
    precision: str | None = None
    max_disagreement: float = 1e-4
    voxel_size_nm: list[float] | None = None
    axes: str | None = None
    block_shape: list[int] | None = None
    roi: list[list[int]] | None = None
    mask: str | None = None
    resample: str = "off"
    spacing: list[float] | None = None
    allow_large_resampling: bool = False
    data: InferenceDataConfig = field(default_factory=InferenceDataConfig)
    volume_mode: VolumeModeConfig = field(default_factory=VolumeModeConfig)
    sliding_window: SlidingWindowConfig = field(default_factory=SlidingWindowConfig)
    test_time_augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    postprocessing: PostprocessingConfig = field(default_factory=PostprocessingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True, slots=True)
class TestDataConfig:
    """``test.data``: volumes of ``--mode test``, or results of ``--mode evaluate``; in the same order, their truth."""

    test_image: list[str] | None = None
    test_prediction: list[str] | None = None
    test_label: list[str] | None = None
    test_instances: list[str] | None = None
    test_ignore: list[str] | None = None


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """``test.evaluation``: what is measured where labels are given."""

    enabled: bool = True
    metrics: list[str] = field(default_factory=lambda: ["dice", "iou", "precision", "recall"])
    foreground: bool = False
    ignore_label: int | None = None
    size_bounds: list[int] | None = None


@dataclass(frozen=True, slots=True)
class TestConfig:
    """``test``: the run with known answers."""

    data: TestDataConfig = field(default_factory=TestDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    experiment_name: str = "connectomics"
    description: str = ""
    system: SystemConfig = field(default_factory=SystemConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    decoding: list[Any] = field(default_factory=list)  # of ``stages.decode.step_contract.DecodingStep``
    test: TestConfig = field(default_factory=TestConfig)
