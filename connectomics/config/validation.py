"""Which values of the configuration are possible: one sentence for each that is not.

``load_config`` calls ``validate`` on the typed configuration; ``assembly`` checks what depends on the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from connectomics.config.schema import Config, EvaluationConfig, InferenceConfig, ModelConfig, SystemConfig, TestConfig
from connectomics.core.errors import ConfigError
from connectomics.core.features import OUTPUT_FORMATS

FORMATS = OUTPUT_FORMATS.names()
SEMANTIC_METRICS = ("dice", "iou", "precision", "recall")
INSTANCE_METRICS = ("ap", "f1", "pq", "voi", "arand")
METRICS = SEMANTIC_METRICS + INSTANCE_METRICS
LARGEST_WINDOW = 4096
TABLES = ("parquet", "csv", "none")
BLENDINGS = ("gaussian", "constant")
ENGINES = ("nnunet", "monai")
PADDINGS = ("constant", "reflect", "replicate", "circular")
CASES = ("auto", "slice", "volume")
PLANES = ("xy", "xz", "yz")
RESAMPLINGS = ("off", "plan")
BACKENDS = ("auto", "torch", "compile", "openvino")
PRECISIONS = ("exact", "fast")
ACTIVATIONS = ("softmax", "sigmoid", "none")
INTENSITY_DTYPES = ("uint8", "uint16", "float16", "float32")

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_LONGEST_SHOWN = 80


def shown(value: object) -> str:
    """``value`` as it stands in a message: one line, at most 80 characters."""
    try:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python does not write out numbers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


def validate(config: Config) -> None:
    """Refuse a configuration that holds an impossible value or values that contradict each other.

    Raises
    ------
    ConfigError
        Names the first such key, its value and what is allowed, in one sentence.
    """
    _system(config.system)
    _model(config.model, config.system.device)
    _ensemble(config)
    _expectations(config)
    _volumes(config.inference)
    _frame(config.inference)
    _precision(config.inference)
    _planes(config.inference)
    _wanted(config.inference)
    _windows(config.inference)
    _mirroring(config.inference)
    _activation(config.inference)
    _binary(config.inference)
    _output(config.inference)
    _known_answers(config.test)


def _require(possible: bool, key: str, value: object, rule: str) -> None:
    if not possible:
        raise ConfigError(f"{key} is {shown(value)}, but {rule}")


def _at_least(minimum: int, key: str, value: int | None) -> None:
    _require(value is None or value >= minimum, key, value, f"must be {minimum} or more")


def _one_of(allowed: Sequence[str], key: str, value: str) -> None:
    _require(value in allowed, key, value, f"must be one of {', '.join(allowed)}")


def _distinct(key: str, values: Sequence[object] | None) -> None:
    _require(values is None or len(set(values)) == len(values), key, values, "each value may stand only once")


def _subset_of(allowed: Sequence[str], key: str, values: Sequence[str]) -> None:
    for value in values:
        _one_of(allowed, key, value)
    _distinct(key, values)


def _names(key: str, values: Sequence[str] | None) -> None:
    possible = values is None or (len(values) > 0 and all(values))
    _require(possible, key, values, "must hold at least one name and no empty one, or be null")


def _extents(key: str, values: Sequence[int] | None, lengths: Sequence[int], largest: int = 1 << 62) -> None:
    counts = " or ".join(str(n) for n in lengths)
    possible = values is None or (len(values) in lengths and 1 <= min(values) <= max(values) <= largest)
    rule = f"must be {counts} whole numbers of 1 or more, in voxels, ending with y, x"
    _require(possible, key, values, rule if largest > LARGEST_WINDOW else f"{rule}, none above {largest}")


def _device(key: str, value: str) -> None:
    _require(bool(_DEVICE.fullmatch(value)), key, value, "must be auto, cpu, mps, cuda or cuda:N")


def _system(system: SystemConfig) -> None:
    _device("system.device", system.device)
    _one_of(BACKENDS, "system.backend", system.backend)
    rule = "must name a folder, or be null for the user's own cache"
    _require(system.cache_dir != "", "system.cache_dir", system.cache_dir, rule)
    _at_least(0, "system.seed", system.seed)
    _at_least(1, "system.num_cpus", system.num_cpus)
    _at_least(1, "system.inference.num_cpus", system.inference.num_cpus)
    _at_least(1, "system.inference.num_workers", system.inference.num_workers)
    budget = system.memory_budget_gb
    rule = "must be a positive number of gigabytes, or null for this machine's"
    _require(budget is None or 0 < budget < math.inf, "system.memory_budget_gb", budget, rule)
    batch = system.inference.batch_size
    rule = (
        "volumes are processed one by one, so it must be 1 or null; "
        "windows per forward pass are inference.sliding_window.sw_batch_size"
    )
    _require(batch in (None, 1), "system.inference.batch_size", batch, rule)
    _gpus("system.num_gpus", system.num_gpus)
    _gpus("system.inference.num_gpus", system.inference.num_gpus)


def _gpus(key: str, count: int | None) -> None:
    _at_least(0, key, count)
    rule = (
        "one process drives one device, so it must be 0, 1 or null; "
        "start one process per GPU with inference.volume_mode.start_index and step"
    )
    _require(count is None or count <= 1, key, count, rule)


def _model(model: ModelConfig, device: str) -> None:
    deep = model.use_deep_supervision
    rule = "inference uses the full-resolution head only, so it must be false or null"
    _require(not deep, "model.use_deep_supervision", deep, rule)
    if model.nnunet_device is not None:
        _device("model.nnunet_device", model.nnunet_device)
        rule = f"system.device is {shown(device)} and one process drives one device; state it once"
        agree = device in ("auto", model.nnunet_device)
        _require(agree, "model.nnunet_device", model.nnunet_device, rule)
    digest = model.sha256
    rule = "must be the 64 hexadecimal digits that `connectomics inspect` prints"
    _require(digest is None or bool(re.fullmatch(r"[0-9a-fA-F]{64}", digest)), "model.sha256", digest, rule)
    _names("model.folds", model.folds)
    _distinct("model.folds", model.folds)
    for fold in model.folds or ():
        rule = "a fold is a number from 0 on, or all"
        _require(fold == "all" or fold.isdecimal(), "model.folds", fold, rule)
    _require(model.previous_stage != "", "model.previous_stage", "", "must be a path, or null")
    name = model.checkpoint_name
    rule = "must be a file name without folders, such as checkpoint_best.pth"
    _require(name not in ("", ".", "..") and not set(name) & set("/\\"), "model.checkpoint_name", name, rule)


def _ensemble(config: Config) -> None:
    """An ensemble's models are stated one by one; what belongs to a single model cannot be said for several."""
    model, key = config.model, "model.ensemble"
    _names(key, model.ensemble)
    weights = model.ensemble_weights
    count = 1 + len(model.ensemble or ())
    rule = f"must be {count} positive numbers, one for the first model and one for each of {key}"
    possible = weights is None or (len(weights) == count and all(0 < w < math.inf for w in weights))
    _require(possible, "model.ensemble_weights", weights, rule)
    if not model.ensemble:
        return
    for name, value in (
        ("model.nnunet_plans", model.nnunet_plans),
        ("model.nnunet_dataset", model.nnunet_dataset),
        ("model.sha256", model.sha256),
    ):
        _require(value is None, name, value, f"{key} names more models and this belongs to one; leave it null")
    act = config.inference.test_time_augmentation.act
    rule = f"{key} averages probabilities, so there are no logits to keep; state null"
    _require(act != "none", "inference.test_time_augmentation.act", act, rule)
    engine = config.inference.sliding_window.engine
    _require(engine == "nnunet", "inference.sliding_window.engine", engine, f"{key} needs nnunet")


def _expectations(config: Config) -> None:
    data, model = config.data, config.model
    for name, minimum, in_data, in_model in (
        ("in_channels", 1, data.in_channels, model.in_channels),
        ("out_channels", 1, data.out_channels, model.out_channels),
    ):
        _at_least(minimum, f"data.{name}", in_data)
        _at_least(minimum, f"model.{name}", in_model)
        agree = in_data is None or in_model is None or in_data == in_model
        _require(agree, f"data.{name}", in_data, f"model.{name} is {in_model}; state the number once")


def _volumes(inference: InferenceConfig) -> None:
    mode, key = inference.volume_mode, "inference.volume_mode"
    _at_least(0, f"{key}.start_index", mode.start_index)
    _at_least(1, f"{key}.step", mode.step)
    _names(f"{key}.file_list", mode.file_list)
    _distinct(f"{key}.file_list", mode.file_list)
    pattern = mode.file_pattern
    _require(pattern != "", f"{key}.file_pattern", pattern, "must be a path or pattern, or null")
    rule = f"{key}.file_list is given too; set one of them to null"
    _require(pattern is None or mode.file_list is None, f"{key}.file_pattern", pattern, rule)
    suffix = mode.output_suffix
    rule = "must be letters, digits, '.', '_' or '-', for it becomes part of file names"
    _require(bool(re.fullmatch(r"[A-Za-z0-9._-]+", suffix)), f"{key}.output_suffix", suffix, rule)
    path = inference.data.output_path
    _require(path != "", "inference.data.output_path", path, "must name a folder")


def _precision(inference: InferenceConfig) -> None:
    if inference.precision is not None:
        _one_of(PRECISIONS, "inference.precision", inference.precision)
    most = inference.max_disagreement
    _require(0 <= most <= 1, "inference.max_disagreement", most, "must be a share from 0 to 1")


def _frame(inference: InferenceConfig) -> None:
    _one_of(CASES, "inference.case", inference.case)
    size = inference.voxel_size_nm
    possible = size is None or (len(size) == 3 and all(0 < v < math.inf for v in size))
    rule = "must be 3 positive numbers (z, y, x), in nanometres"
    _require(possible, "inference.voxel_size_nm", size, rule)
    spacing = inference.spacing
    possible = spacing is None or (len(spacing) == 3 and all(0 < v < math.inf for v in spacing))
    _require(possible, "inference.spacing", spacing, "must be 3 positive numbers (z, y, x), in the unit of the plans")
    _one_of(RESAMPLINGS, "inference.resample", inference.resample)
    rule = "takes effect only with inference.resample=plan"
    _require(spacing is None or inference.resample == "plan", "inference.spacing", spacing, rule)
    axes = inference.axes
    possible = axes is None or (len(set(axes)) == len(axes) and {"y", "x"} <= set(axes) <= set("czyx"))
    rule = "must name the axes in the file's order by c, z, y, x, each at most once and y, x always"
    _require(possible, "inference.axes", axes, rule)
    _extents("inference.block_shape", inference.block_shape, (3,))


def _planes(inference: InferenceConfig) -> None:
    """Several planes are averaged as the models of an ensemble are."""
    planes, key = inference.planes, "inference.planes"
    _require(len(planes) > 0, key, planes, f"must name at least one of {', '.join(PLANES)}")
    _subset_of(PLANES, key, planes)
    if planes == ["xy"]:
        rule = f"takes effect only where {key} names xz or yz"
        allowed = inference.allow_anisotropic_planes
        _require(not allowed, "inference.allow_anisotropic_planes", allowed, rule)
        return
    engine = inference.sliding_window.engine
    _require(engine == "nnunet", "inference.sliding_window.engine", engine, f"{key} other than [xy] needs nnunet")
    act = inference.test_time_augmentation.act
    rule = f"{key} averages probabilities, so there are no logits to keep; state null"
    _require(len(planes) == 1 or act != "none", "inference.test_time_augmentation.act", act, rule)


def _wanted(inference: InferenceConfig) -> None:
    roi, mask, binary = inference.roi, inference.mask, inference.postprocessing.binary
    possible = roi is None or (len(roi) == 2 and len(roi[0]) == len(roi[1]) == 3)
    possible = possible and (roi is None or all(0 <= a < b for a, b in zip(*roi, strict=True)))
    rule = (
        "must be [[z, y, x], [z, y, x]]: the first voxel and the one after the last, which lies beyond it on each axis"
    )
    _require(possible, "inference.roi", roi, rule)
    _require(mask != "", "inference.mask", mask, "must name a volume, or be null")
    key = "inference.postprocessing.binary"
    rule = "inference.roi and inference.mask cut objects, and it needs whole ones; state one or the other"
    whole = roi is None and mask is None
    _require(
        whole or binary.remove_small_objects == 0, f"{key}.remove_small_objects", binary.remove_small_objects, rule
    )
    _require(whole or not binary.fill_holes, f"{key}.fill_holes", binary.fill_holes, rule)


def _windows(inference: InferenceConfig) -> None:
    window, key = inference.sliding_window, "inference.sliding_window"
    _extents(f"{key}.window_size", window.window_size, (2, 3), LARGEST_WINDOW)
    overlap = window.overlap
    rule = "must be at least 0 and below 1 (overlap = 1 - tile_step_size)"
    _require(overlap is None or 0 <= overlap < 1, f"{key}.overlap", overlap, rule)
    _at_least(1, f"{key}.sw_batch_size", window.sw_batch_size)
    _one_of(BLENDINGS, f"{key}.blending", window.blending)
    _one_of(ENGINES, f"{key}.engine", window.engine)
    _one_of(PADDINGS, f"{key}.padding_mode", window.padding_mode)
    rule = f"nnU-Net pads with zeros; other modes need {key}.engine=monai"
    possible = window.padding_mode == "constant" or window.engine == "monai"
    _require(possible, f"{key}.padding_mode", window.padding_mode, rule)


def _mirroring(inference: InferenceConfig) -> None:
    tta, key = inference.test_time_augmentation, "inference.test_time_augmentation"
    axes = tta.flip_axes
    rule = "must name axes by 0 = z, 1 = y, 2 = x"
    _require(axes is None or set(axes) <= {0, 1, 2}, f"{key}.flip_axes", axes, rule)
    _distinct(f"{key}.flip_axes", axes)
    rule = "must be mean, for nnU-Net averages the logits of its mirrored passes"
    _require(tta.ensemble_mode == "mean", f"{key}.ensemble_mode", tta.ensemble_mode, rule)


def _activation(inference: InferenceConfig) -> None:
    tta, key = inference.test_time_augmentation, "inference.test_time_augmentation"
    binary, saved = inference.postprocessing.binary, inference.output.save_probabilities
    rule = f"must be one of {', '.join(ACTIVATIONS)}, or null for the model's own"
    _require(tta.act is None or tta.act in ACTIVATIONS, f"{key}.act", tta.act, rule)
    logits = tta.act == "none"
    rule = "must be null, for inference.postprocessing.binary compares probabilities with its threshold"
    _require(not (logits and binary.enabled), f"{key}.act", tta.act, rule)
    rule = "labels do not depend on it; set inference.output.save_probabilities=true to save logits"
    _require(saved or not logits, f"{key}.act", tta.act, rule)
    channels = tta.select_channel
    possible = channels is None or (len(channels) > 0 and min(channels) >= 0)
    _require(possible, f"{key}.select_channel", channels, "must name channels from 0 on, or be null for all")
    _distinct(f"{key}.select_channel", channels)
    rule = (
        "it selects among probabilities; set inference.output.save_probabilities=true or "
        "inference.postprocessing.binary.enabled=true"
    )
    _require(channels is None or saved or binary.enabled, f"{key}.select_channel", channels, rule)


def _binary(inference: InferenceConfig) -> None:
    binary, key = inference.postprocessing.binary, "inference.postprocessing.binary"
    _require(0 <= binary.threshold <= 1, f"{key}.threshold", binary.threshold, "must lie between 0 and 1")
    small = binary.remove_small_objects
    _at_least(0, f"{key}.remove_small_objects", small)
    rule = f"it takes effect only with {key}.enabled=true"
    _require(binary.enabled or small == 0, f"{key}.remove_small_objects", small, rule)
    _require(binary.enabled or not binary.fill_holes, f"{key}.fill_holes", binary.fill_holes, rule)


def _output(inference: InferenceConfig) -> None:
    post, output = inference.postprocessing, inference.output
    scale, dtype, key = post.intensity_scale, post.intensity_dtype, "inference.postprocessing"
    rule = "must be a positive number, or null"
    _require(scale is None or 0 < scale < math.inf, f"{key}.intensity_scale", scale, rule)
    if dtype is not None:
        _one_of(INTENSITY_DTYPES, f"{key}.intensity_dtype", dtype)
    rule = "it is about saved probabilities; set inference.output.save_probabilities=true"
    _require(scale is None or output.save_probabilities, f"{key}.intensity_scale", scale, rule)
    _require(dtype is None or output.save_probabilities, f"{key}.intensity_dtype", dtype, rule)
    rule = f"must name at least one of {', '.join(FORMATS)}"
    _require(len(output.formats) > 0, "inference.output.formats", output.formats, rule)
    _subset_of(FORMATS, "inference.output.formats", output.formats)
    _one_of(TABLES, "inference.output.table", output.table)


def _known_answers(test: TestConfig) -> None:
    images, labels = test.data.test_image, test.data.test_label
    _names("test.data.test_image", images)
    _distinct("test.data.test_image", images)
    _names("test.data.test_label", labels)
    named = images is not None or test.data.test_prediction is not None
    rule = "needs test.data.test_image or test.data.test_prediction"
    _require(labels is None or named, "test.data.test_label", labels, rule)
    _names("test.data.test_prediction", test.data.test_prediction)
    rule = "needs test.data.test_label"
    for key, names in (("test_instances", test.data.test_instances), ("test_ignore", test.data.test_ignore)):
        _names(f"test.data.{key}", names)
        _require(names is None or labels is not None, f"test.data.{key}", names, rule)
    _evaluation(test.evaluation)


def _evaluation(evaluation: EvaluationConfig) -> None:
    metrics = evaluation.metrics
    _subset_of(METRICS, "test.evaluation.metrics", metrics)
    rule = f"must name at least one of {', '.join(METRICS)}, or set test.evaluation.enabled=false"
    possible = len(metrics) > 0 or not evaluation.enabled
    _require(possible, "test.evaluation.metrics", metrics, rule)
    rule = f"it is about classes; name any of {', '.join(SEMANTIC_METRICS)} in test.evaluation.metrics"
    possible = not evaluation.foreground or bool(set(metrics) & set(SEMANTIC_METRICS))
    _require(possible, "test.evaluation.foreground", evaluation.foreground, rule)
    _at_least(0, "test.evaluation.ignore_label", evaluation.ignore_label)
    bounds = evaluation.size_bounds
    rule = "must be whole numbers of 1 or more, ascending, in voxels"
    possible = bounds is None or (len(bounds) > 0 and bounds == sorted(set(bounds)) and bounds[0] >= 1)
    _require(possible, "test.evaluation.size_bounds", bounds, rule)
    rule = "it is about average precision; name ap in test.evaluation.metrics"
    _require(bounds is None or "ap" in metrics, "test.evaluation.size_bounds", bounds, rule)
