"""Rules for what is kept of logits: labels and probabilities, from the configuration and the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from connectomics.assembly.settings import LabelSettings
from connectomics.core.errors import ConfigError
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.models.spec import ModelSpec
from connectomics.stages.output.export import formats_holding


def _selected(stated: tuple[int, ...] | None, spec: ModelSpec) -> tuple[int, ...] | None:
    if stated is None:
        return None
    if any(not 0 <= c < spec.classes for c in stated):
        raise ConfigError(
            f"inference.test_time_augmentation.select_channel is {list(stated)}, but the model has classes 0 to "
            f"{spec.classes - 1}"
        )
    return stated


def label_rule(stated: LabelSettings, spec: ModelSpec) -> LabelRule:
    """nnU-Net's rule, or a threshold where binary post-processing is on."""
    painted = spec.class_values if spec.regions else ()
    if stated.threshold is None:
        return LabelRule(spec.label_dtype, painted=painted)
    first = 0 if spec.regions else 1  # among labels, the first is the background
    foreground = _selected(stated.channels, spec) or tuple(range(first, spec.classes))
    return LabelRule(np.dtype(np.uint8), stated.threshold, foreground, painted)


def check_activation(stated: str | None, spec: ModelSpec) -> str:
    """What makes probabilities of the model's logits, or none.

    Raises
    ------
    ConfigError
        If the configuration states the other family's.
    """
    own, outputs = (
        ("sigmoid", "regions, which overlap") if spec.regions else ("softmax", "labels, which exclude others")
    )
    if stated not in (None, "none", own):
        raise ConfigError(
            f"inference.test_time_augmentation.act is '{stated}', but the model gives {outputs}, so its probabilities "
            f"are a {own}; state null or {own}"
        )
    return stated or own


def probability_rule(stated: LabelSettings, formats: Sequence[str], spec: ModelSpec) -> ProbabilityRule:
    """What is stored of probabilities.

    Raises
    ------
    ConfigError
        If the stated activation is not the model's, the unit does not suit the type, or the formats cannot hold them.
    """
    channels = _selected(stated.channels, spec) or tuple(range(spec.classes))
    rule = ProbabilityRule(
        channels,
        check_activation(stated.activation, spec),
        1.0 if stated.intensity_scale is None else stated.intensity_scale,
        np.dtype(stated.intensity_dtype or np.float32),
    )
    _check_unit(rule, stated.intensity_scale)
    if not formats_holding(formats, len(channels), rule.dtype):
        raise ConfigError(
            f"inference.output.formats is [{', '.join(formats)}], which cannot hold probabilities of {len(channels)} "
            f"classes as {rule.dtype}; add h5, tiff or zarr, or keep one class (select_channel) as uint8 "
            "(intensity_dtype)"
        )
    return rule


def _check_unit(rule: ProbabilityRule, stated: float | None) -> None:
    """Refuse a type that clips what is stored, or leaves 0 and 1 of probabilities."""
    keys, kind = "inference.postprocessing.intensity", rule.dtype.kind
    largest = float(np.iinfo(rule.dtype).max if kind in "iu" else np.finfo(rule.dtype).max)
    if rule.activation == "none":
        if kind == "u":
            raise ConfigError(
                f"{keys}_dtype is {rule.dtype}, but logits (inference.test_time_augmentation.act=none) go below 0; "
                f"state {keys}_dtype=float32, or act=null for probabilities"
            )
    elif rule.scale > largest:
        raise ConfigError(
            f"{keys}_scale is {rule.scale:g}, but {rule.dtype} ends at {largest:g}, so all probabilities above "
            f"{largest / rule.scale:.3g} would be stored alike; state {keys}_scale={largest:g} or another {keys}_dtype"
        )
    elif kind in "iu" and stated is None:
        raise ConfigError(
            f"{keys}_dtype is {rule.dtype} without a scale, which leaves 0 and 1 of probabilities; state "
            f"{keys}_scale={largest:g}, with which 1 is stored as {largest:g}"
        )
