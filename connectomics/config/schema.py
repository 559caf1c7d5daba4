"""The typed configuration: every key there is, and the only home of each default.

``connectomics.config.load`` fills it from YAML and ``key=value`` words; ``assembly`` reads it. None means
"the model or the machine decides". What is said of a key here is what the guide, the tutorial and ``connectomics config
keys`` show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from connectomics.config import key_rules as rule
from connectomics.config.inference_keys import InferenceConfig
from connectomics.config.key_rules import KeyRule, key
from connectomics.core.features import BACKENDS

SEMANTIC_METRICS = ("dice", "iou", "precision", "recall")
INSTANCE_METRICS = ("ap", "f1", "pq", "voi", "arand")
METRICS = SEMANTIC_METRICS + INSTANCE_METRICS


@dataclass(frozen=True, slots=True)
class SystemInferenceConfig:
    """``system.inference``: what replaces the values of ``system`` while predicting; null keeps those."""

    batch_size: int | None = key(
        None,
        "volumes at a time, 1; windows per pass are `sliding_window.sw_batch_size`",
        KeyRule(
            lambda batch: batch == 1,
            "volumes are processed one by one, so it must be 1 or null; windows per forward pass are "
            "inference.sliding_window.sw_batch_size",
        ),
    )
    num_gpus: int | None = key(None, "replaces `system.num_gpus`", rule.at_least(0), rule.ONE_GPU)
    num_cpus: int | None = key(None, "replaces `system.num_cpus`", rule.at_least(1))
    num_workers: int | None = key(None, "threads that read ahead in the survey; null: 1", rule.at_least(1))


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """``system``: the machine."""

    device: str = key(
        "auto",
        "auto (the first CUDA device, otherwise the CPU), cpu, mps, cuda or cuda:N; one that is missing is an error",
        rule.DEVICE,
    )
    backend: str = key(
        "torch",
        "torch (the reference), openvino, compile, or auto: the fastest that is there; see [faster](#faster)",
        rule.one_of("auto", *BACKENDS.names()),
    )
    cache_dir: str | None = key(
        None,
        "folder of compiled networks and of what `tune` measured; null: `connectomics/` in the user's cache "
        "(`$XDG_CACHE_HOME`)",
        rule.not_empty("must name a folder, or be null for the user's own cache"),
    )
    seed: int = key(0, "seed of the random generators; inference draws no random numbers", rule.at_least(0))
    num_gpus: int | None = key(
        None,
        "0: stay on the CPU, 1: insist on a GPU; for more start one process per GPU",
        rule.at_least(0),
        rule.ONE_GPU,
    )
    num_cpus: int | None = key(
        None,
        "threads of a forward pass; null: this process's CPUs, at most 8 as in nnU-Net; of unfinished work those it "
        "was begun with",
        rule.at_least(1),
    )
    memory_budget_gb: float | None = key(
        None,
        "host memory of the process, in 10⁹ bytes; null: half of the machine's",
        rule.positive("must be a positive number of gigabytes, or null for this machine's"),
    )
    allow_mixed_devices: bool = key(
        False,
        "true: continue a run that another numeric class (another kind of device, say) began; the last digits may "
        "differ",
    )
    stale_after_s: float = key(
        180.0,
        "seconds without a sign of life after which a process on another machine counts as dead and its work is taken "
        "over; 2 or more; `connectomics doctor FOLDER` measures [what a disk needs](recovery.md#what-a-disk-must-do)",
        rule.at_least(2),
        rule.positive("must be a finite number of seconds"),
    )
    inference: SystemInferenceConfig = field(default_factory=SystemInferenceConfig)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``model``: which trained network, and what is expected of it."""

    architecture: str = key("nnunet", "name in the architecture registry")
    nnunet_checkpoint: str | None = key(
        None, "the model, a `.pth` file or a nnU-Net training folder; `--checkpoint` replaces it"
    )
    nnunet_plans: str | None = key(None, "plans.json; null: it lies beside the checkpoint or above it")
    nnunet_dataset: str | None = key(None, "dataset.json; null: it lies beside the checkpoint or above it")
    nnunet_device: str | None = key(None, "the model's device; null: `system.device`", rule.DEVICE)
    use_deep_supervision: bool | None = key(
        None,
        "true is refused: inference uses the full-resolution head only",
        KeyRule(lambda deep: not deep, "inference uses the full-resolution head only, so it must be false or null"),
    )
    in_channels: int | None = key(None, "when given, checked against the model", rule.at_least(1))
    out_channels: int | None = key(None, "when given, checked against the model (background counts)", rule.at_least(1))
    sha256: str | None = key(
        None,
        "when given, the model must have this digest",
        rule.matching("[0-9a-fA-F]{64}", "must be the 64 hexadecimal digits that `connectomics inspect` prints"),
    )
    trust_code: bool = key(False, "true: checkpoint and plans may bring code of their own, which can do anything")
    folds: list[str] | None = key(
        None,
        "folds of a training folder, such as [0, 1] or [all]; null: all there are (the mean of their logits)",
        rule.NAMES,
        rule.DISTINCT,
        KeyRule(lambda fold: fold == "all" or fold.isdecimal(), "a fold is a number from 0 on, or all", each=True),
    )
    checkpoint_name: str = key(
        "checkpoint_final.pth",
        "which file of each fold; checkpoint_best.pth is the other that nnU-Net writes",
        KeyRule(
            lambda name: name not in ("", ".", "..") and not set(name) & set("/\\"),
            "must be a file name without folders, such as checkpoint_best.pth",
        ),
    )
    ensemble: list[str] | None = key(
        None,
        "more models whose probabilities are averaged with the first's, as "
        "[nnUNetv2_ensemble does](#ensembles-of-models)",
        rule.NAMES,
    )
    ensemble_weights: list[float] | None = key(None, "one number for each model, the first first; null: all alike")
    previous_stage: str | None = key(
        None,
        "for a second stage of a cascade: the first stage's model, or its labels; `*` is the volume's name, see "
        "[cascades](#cascades)",
        rule.not_empty("must be a path, or null"),
    )


@dataclass(frozen=True, slots=True)
class DataConfig:
    """``data``: what the user expects of volumes and model; checked against the model, never changing it."""

    do_2d: bool | None = key(None, "when given, the model must be 2D (true) or 3D (false)")
    in_channels: int | None = key(None, "channels of a volume; when given, checked against the model", rule.at_least(1))
    out_channels: int | None = key(None, "labels, background included; when given, checked too", rule.at_least(1))


@dataclass(frozen=True, slots=True)
class TestDataConfig:
    """``test.data``: volumes of ``--mode test``, or results of ``--mode evaluate``; in the same order, their truth."""

    test_image: list[str] | None = key(
        None, "a volume or a list of volumes for `--mode test`", rule.NAMES, rule.DISTINCT
    )
    test_prediction: list[str] | None = key(None, "existing results for `--mode evaluate`", rule.NAMES)
    test_label: list[str] | None = key(None, "their true labels in the same order; null: predict only", rule.NAMES)
    test_instances: list[str] | None = key(
        None,
        "ids of the true objects of each, where metrics of objects are asked for and `decoding` makes some",
        rule.NAMES,
    )
    test_ignore: list[str] | None = key(None, "a mask for each; where it is not 0, voxels are not counted", rule.NAMES)


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """``test.evaluation``: what is measured where labels are given."""

    enabled: bool = key(True, "compare with test_label")
    metrics: list[str] = key(
        ["dice", "iou", "precision", "recall"],
        "any of dice, iou, precision, recall, for each label; for ids of objects ap, f1, pq, voi, arand; see "
        "[scores](#scores)",
        rule.one_of(*METRICS, each=True),
        rule.DISTINCT,
    )
    foreground: bool = key(False, "true: everything above 0 is one class, in prediction and truth")
    ignore_label: int | None = key(None, "voxels with this label in the truth are not counted", rule.at_least(0))
    size_bounds: list[int] | None = key(
        None,
        "voxels, such as [5000, 15000]: average precision by size of the true objects",
        KeyRule(
            lambda bounds: len(bounds) > 0 and bounds == sorted(set(bounds)) and bounds[0] >= 1,
            "must be whole numbers of 1 or more, ascending, in voxels",
        ),
    )


@dataclass(frozen=True, slots=True)
class TestConfig:
    """``test``: the run with known answers."""

    data: TestDataConfig = field(default_factory=TestDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    experiment_name: str = key("connectomics", "a name, written into each result's provenance")
    description: str = key("", "free text, written into the provenance")
    system: SystemConfig = field(default_factory=SystemConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    # of ``stages.decode.step_contract.DecodingStep``
    decoding: list[Any] = key(
        [],
        "steps that turn labels into objects, NAME_SUFFIX_instances.h5 and a table, such as "
        "`[{name: connected_components, connectivity: 26}, {name: filters, min_voxels: 100}]`, see "
        "[Instances](#instances)",
    )
    test: TestConfig = field(default_factory=TestConfig)
