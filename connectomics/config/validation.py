"""Which values of the configuration are possible: one sentence for each that is not.

``load_config`` calls ``validate`` on the typed configuration; ``assembly`` checks what depends on the model. What a key
alone must be stands with it in the schema; here is what keys must be together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from connectomics.config.key_rules import RULES
from connectomics.config.schema import METRICS, SEMANTIC_METRICS, Config
from connectomics.core.errors import ConfigError
from connectomics.core.places import refusal

Judged = Iterator[tuple[str, bool, str]]  # a key, whether its value suits others, and what is said where it does not
TTA, WINDOW, BINARY = "test_time_augmentation", "inference.sliding_window", "inference.postprocessing.binary"
NO_PATHS = ("experiment_name", "description")  # every other text may be a path
ONE_BY_ONE = ("inference.volume_mode.file_list", "test.data.")  # a volume that cannot be opened fails alone
ACT, ENGINE = f"inference.{TTA}.act", f"{WINDOW}.engine"
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
    for key, value, field in stated_values(config):
        for rule in field.metadata[RULES] if value is not None else ():
            for one in value if rule.each else [value]:
                if not rule.holds(one):
                    raise ConfigError(f"{key} is {shown(one)}, but {rule.text}")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not key.startswith(NO_PATHS + ONE_BY_ONE) and refusal(one):
                raise ConfigError(f"{key} is {shown(one)}, but {refusal(one)}")
    for together in TOGETHER:
        for key, suits, text in together(config):
            if not suits:
                raise ConfigError(f"{key} is {shown(_at(config, key))}, but {text}")


def stated_values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield each key of a section with its value and its declaration, in the schema's order."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from stated_values(value, f"{key}.")
        else:
            yield key, value, field


def changed_values(config: Config) -> dict[str, object]:
    """Every key that is not at its default, with its value; the steps of decoding as mappings."""
    pairs = zip(stated_values(Config()), stated_values(config), strict=True)
    found = {key: value for (key, default, _), (_, value, _) in pairs if value != default}
    if config.decoding:
        found["decoding"] = [dataclasses.asdict(step) for step in config.decoding]
    return found


def _at(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _models(config: Config) -> Judged:
    """An ensemble's models are stated one by one, and averaged; so are several planes."""
    model, device = config.model, config.system.device
    text = f"system.device is {shown(device)} and one process drives one device; state it once"
    yield "model.nnunet_device", model.nnunet_device is None or device in ("auto", model.nnunet_device), text
    weights, count = model.ensemble_weights, 1 + len(model.ensemble or ())
    suits = weights is None or (len(weights) == count and all(0 < weight < math.inf for weight in weights))
    text = f"must be {count} positive numbers, one for the first model and one for each of model.ensemble"
    yield "model.ensemble_weights", suits, text
    for key in ("model.nnunet_plans", "model.nnunet_dataset", "model.sha256") if model.ensemble else ():
        yield key, _at(config, key) is None, "model.ensemble names more models and this belongs to one; leave it null"
    planes = config.inference.planes
    engine, act = _at(config, ENGINE) == "nnunet", _at(config, ACT) != "none"
    text = "averages probabilities, so there are no logits to keep; state null"
    if model.ensemble:
        yield ACT, act, f"model.ensemble {text}"
        yield ENGINE, engine, "model.ensemble needs nnunet"
    if planes != ["xy"]:
        yield ENGINE, engine, "inference.planes other than [xy] needs nnunet"
        yield ACT, act or len(planes) == 1, f"inference.planes {text}"
    allowed = config.inference.allow_anisotropic_planes
    text = "takes effect only where inference.planes names xz or yz"
    yield "inference.allow_anisotropic_planes", not (allowed and planes == ["xy"]), text
    for name in ("in_channels", "out_channels"):
        in_data, in_model = _at(config, f"data.{name}"), _at(config, f"model.{name}")
        suits = in_data is None or in_model is None or in_data == in_model
        yield f"data.{name}", suits, f"model.{name} is {in_model}; state the number once"


def _volumes(config: Config) -> Judged:
    """Components, moreover, are cleaned up where foreground is made, and where nothing cuts them."""
    inference, key = config.inference, "inference.volume_mode"
    alone = inference.volume_mode.file_pattern is None or inference.volume_mode.file_list is None
    yield f"{key}.file_pattern", alone, f"{key}.file_list is given too; set one of them to null"
    suits = inference.spacing is None or inference.resample == "plan"
    yield "inference.spacing", suits, "takes effect only with inference.resample=plan"
    window, binary = inference.sliding_window, inference.postprocessing.binary
    suits = window.padding_mode == "constant" or window.engine == "monai"
    yield f"{WINDOW}.padding_mode", suits, f"nnU-Net pads with zeros; other modes need {ENGINE}=monai"
    whole = inference.roi is None and inference.mask is None
    cut = "inference.roi and inference.mask cut objects, and it needs whole ones; state one or the other"
    for name, idle in (
        ("remove_small_objects", binary.remove_small_objects == 0),
        ("fill_holes", not binary.fill_holes),
    ):
        yield f"{BINARY}.{name}", idle or whole, cut
        yield f"{BINARY}.{name}", idle or binary.enabled, f"it takes effect only with {BINARY}.enabled=true"


def _probabilities(config: Config) -> Judged:
    """Keys of probabilities are for those that are saved or make the foreground."""
    saved, binary = config.inference.output.save_probabilities, config.inference.postprocessing.binary.enabled
    logits, channels = _at(config, ACT) == "none", config.inference.test_time_augmentation.select_channel
    yield ACT, not (logits and binary), f"must be null, for {BINARY} compares probabilities with its threshold"
    text = "labels do not depend on it; set inference.output.save_probabilities=true to save logits"
    yield ACT, saved or not logits, text
    text = f"it selects among probabilities; set inference.output.save_probabilities=true or {BINARY}.enabled=true"
    yield f"inference.{TTA}.select_channel", channels is None or saved or binary, text
    for key in ("inference.postprocessing.intensity_scale", "inference.postprocessing.intensity_dtype"):
        text = "it is about saved probabilities; set inference.output.save_probabilities=true"
        yield key, _at(config, key) is None or saved, text


def _known_answers(config: Config) -> Judged:
    data, evaluation, key = config.test.data, config.test.evaluation, "test.evaluation.metrics"
    suits = data.test_label is None or data.test_image is not None or data.test_prediction is not None
    yield "test.data.test_label", suits, "needs test.data.test_image or test.data.test_prediction"
    for name in ("test.data.test_instances", "test.data.test_ignore"):
        yield name, _at(config, name) is None or data.test_label is not None, "needs test.data.test_label"
    named, semantic = set(evaluation.metrics), ", ".join(SEMANTIC_METRICS)
    text = f"must name at least one of {', '.join(METRICS)}, or set test.evaluation.enabled=false"
    yield key, bool(named) or not evaluation.enabled, text
    text = f"it is about classes; name any of {semantic} in {key}"
    yield "test.evaluation.foreground", not evaluation.foreground or bool(named & set(SEMANTIC_METRICS)), text
    text = f"it is about average precision; name ap in {key}"
    yield "test.evaluation.size_bounds", evaluation.size_bounds is None or "ap" in named, text


TOGETHER: tuple[Callable[[Config], Judged], ...] = (_models, _volumes, _probabilities, _known_answers)
