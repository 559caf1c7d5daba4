"""Which values of the configuration are possible: one sentence for each that is not.

``load_config`` calls ``validate`` on the typed configuration; ``assembly`` checks what depends on the model. What a key
alone must be stands with it in the schema; here is what keys must be together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from connectomics.config.inference_keys import InferenceConfig
from connectomics.config.key_rules import RULES, KeyRule
from connectomics.config.schema import METRICS, SEMANTIC_METRICS, Config, EvaluationConfig, TestConfig
from connectomics.core.errors import ConfigError

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
    for key, value, rule in _ruled(config, ""):
        for one in value if rule.each else [value]:
            _require(rule.holds(one), key, one, rule.text)
    _model(config)
    _ensemble(config)
    _expectations(config)
    _frame(config.inference)
    _planes(config.inference)
    _wanted(config.inference)
    _activation(config.inference)
    _binary(config.inference)
    _output(config.inference)
    _known_answers(config.test)


def _ruled(section: Any, prefix: str) -> Iterator[tuple[str, Any, KeyRule]]:
    """Each key that is not null with its value and each of its rules."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _ruled(value, f"{key}.")
        elif value is not None:
            yield from ((key, value, rule) for rule in field.metadata[RULES])


def _require(possible: bool, key: str, value: object, rule: str) -> None:
    if not possible:
        raise ConfigError(f"{key} is {shown(value)}, but {rule}")


def _model(config: Config) -> None:
    stated, device = config.model.nnunet_device, config.system.device
    rule = f"system.device is {shown(device)} and one process drives one device; state it once"
    _require(stated is None or device in ("auto", stated), "model.nnunet_device", stated, rule)


def _ensemble(config: Config) -> None:
    """An ensemble's models are stated one by one; what belongs to a single model cannot be said for several."""
    model, key = config.model, "model.ensemble"
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
    for name, in_data, in_model in (
        ("in_channels", data.in_channels, model.in_channels),
        ("out_channels", data.out_channels, model.out_channels),
    ):
        agree = in_data is None or in_model is None or in_data == in_model
        _require(agree, f"data.{name}", in_data, f"model.{name} is {in_model}; state the number once")


def _frame(inference: InferenceConfig) -> None:
    mode, window = inference.volume_mode, inference.sliding_window
    key = "inference.volume_mode"
    rule = f"{key}.file_list is given too; set one of them to null"
    alone = mode.file_pattern is None or mode.file_list is None
    _require(alone, f"{key}.file_pattern", mode.file_pattern, rule)
    rule = "takes effect only with inference.resample=plan"
    possible = inference.spacing is None or inference.resample == "plan"
    _require(possible, "inference.spacing", inference.spacing, rule)
    key = "inference.sliding_window"
    rule = f"nnU-Net pads with zeros; other modes need {key}.engine=monai"
    possible = window.padding_mode == "constant" or window.engine == "monai"
    _require(possible, f"{key}.padding_mode", window.padding_mode, rule)


def _planes(inference: InferenceConfig) -> None:
    """Several planes are averaged as the models of an ensemble are."""
    planes, key = inference.planes, "inference.planes"
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
    key = "inference.postprocessing.binary"
    rule = "inference.roi and inference.mask cut objects, and it needs whole ones; state one or the other"
    whole = roi is None and mask is None
    _require(
        whole or binary.remove_small_objects == 0, f"{key}.remove_small_objects", binary.remove_small_objects, rule
    )
    _require(whole or not binary.fill_holes, f"{key}.fill_holes", binary.fill_holes, rule)


def _activation(inference: InferenceConfig) -> None:
    tta, key = inference.test_time_augmentation, "inference.test_time_augmentation"
    binary, saved = inference.postprocessing.binary, inference.output.save_probabilities
    logits = tta.act == "none"
    rule = "must be null, for inference.postprocessing.binary compares probabilities with its threshold"
    _require(not (logits and binary.enabled), f"{key}.act", tta.act, rule)
    rule = "labels do not depend on it; set inference.output.save_probabilities=true to save logits"
    _require(saved or not logits, f"{key}.act", tta.act, rule)
    channels = tta.select_channel
    rule = (
        "it selects among probabilities; set inference.output.save_probabilities=true or "
        "inference.postprocessing.binary.enabled=true"
    )
    _require(channels is None or saved or binary.enabled, f"{key}.select_channel", channels, rule)


def _binary(inference: InferenceConfig) -> None:
    binary, key = inference.postprocessing.binary, "inference.postprocessing.binary"
    small = binary.remove_small_objects
    rule = f"it takes effect only with {key}.enabled=true"
    _require(binary.enabled or small == 0, f"{key}.remove_small_objects", small, rule)
    _require(binary.enabled or not binary.fill_holes, f"{key}.fill_holes", binary.fill_holes, rule)


def _output(inference: InferenceConfig) -> None:
    post, saved = inference.postprocessing, inference.output.save_probabilities
    rule = "it is about saved probabilities; set inference.output.save_probabilities=true"
    for name, value in (("intensity_scale", post.intensity_scale), ("intensity_dtype", post.intensity_dtype)):
        _require(value is None or saved, f"inference.postprocessing.{name}", value, rule)


def _known_answers(test: TestConfig) -> None:
    images, labels = test.data.test_image, test.data.test_label
    named = images is not None or test.data.test_prediction is not None
    rule = "needs test.data.test_image or test.data.test_prediction"
    _require(labels is None or named, "test.data.test_label", labels, rule)
    rule = "needs test.data.test_label"
    for key, names in (("test_instances", test.data.test_instances), ("test_ignore", test.data.test_ignore)):
        _require(names is None or labels is not None, f"test.data.{key}", names, rule)
    _evaluation(test.evaluation)


def _evaluation(evaluation: EvaluationConfig) -> None:
    metrics = evaluation.metrics
    rule = f"must name at least one of {', '.join(METRICS)}, or set test.evaluation.enabled=false"
    possible = len(metrics) > 0 or not evaluation.enabled
    _require(possible, "test.evaluation.metrics", metrics, rule)
    rule = f"it is about classes; name any of {', '.join(SEMANTIC_METRICS)} in test.evaluation.metrics"
    possible = not evaluation.foreground or bool(set(metrics) & set(SEMANTIC_METRICS))
    _require(possible, "test.evaluation.foreground", evaluation.foreground, rule)
    bounds = evaluation.size_bounds
    rule = "it is about average precision; name ap in test.evaluation.metrics"
    _require(bounds is None or "ap" in metrics, "test.evaluation.size_bounds", bounds, rule)
