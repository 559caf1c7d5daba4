"""How a model is run and what is kept of its logits: windows, planes, labels, probabilities, as the model allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from connectomics.assembly.engine.engine import NNUNET_STEP
from connectomics.assembly.settings import LabelSettings, VolumeSettings, WindowSettings
from connectomics.core.errors import ConfigError, ModelError, VolumeError
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.inference.predictor import Predictor, RollingPredictor, SlidingWindow
from connectomics.inference.windows import as_patch
from connectomics.models.backends.contract import Backend
from connectomics.models.spec import ModelSpec
from connectomics.stages.output.export import formats_holding
from connectomics.volumes.volume import Nanometres, Spacing

KEY = "inference.planes"
LARGEST_RATIO = 1.5  # of the longest edge of a voxel to the shortest


def make_window(stated: WindowSettings, batch: int | None, spec: ModelSpec) -> SlidingWindow:
    """How a model's windows are laid, ``batch`` of them a forward pass; ConfigError where they do not fit it."""
    patch = spec.patch_shape
    if stated.shape is not None:
        patch = as_patch(stated.shape, spec.patch_shape)
        if spec.dimensions == 2 and patch[0] != 1:
            raise ConfigError(
                f"inference.sliding_window.window_size is {list(stated.shape)}, but the model is 2D; state (y, x)"
            )
    return SlidingWindow(
        patch,
        NNUNET_STEP if stated.overlap is None else round(1.0 - stated.overlap, 12),  # 1 - 0.9 is not 0.1
        stated.blending,
        _mirror_axes(stated, spec),
        batch=batch or 1,
    )


def _mirror_axes(stated: WindowSettings, spec: ModelSpec) -> tuple[int, ...]:
    if not stated.mirroring:
        return ()
    if stated.flip_axes is None:
        return spec.mirror_axes
    if spec.dimensions == 2 and 0 in stated.flip_axes:
        raise ConfigError(
            "inference.test_time_augmentation.flip_axes names 0 (z), but the model is 2D; use 1 (y) and 2 (x)"
        )
    return stated.flip_axes


def make_predictor(
    stated: WindowSettings, backends: tuple[Backend, ...], window: SlidingWindow, spec: ModelSpec
) -> Predictor:
    """The predictor that lays a model's windows for these backends, one a fold."""
    if not stated.whole:
        return RollingPredictor(backends, window, spec.classes)
    from connectomics.inference.monai_window import MonaiPredictor

    return MonaiPredictor(backends, window, stated.padding_mode)


def check_planes(planes: list[str], spec: ModelSpec, path: Path) -> None:
    """Refuse (ModelError) planes other than xy for a model that is 3D, or the second stage of a cascade."""
    if planes == ["xy"]:
        return
    if spec.dimensions != 2:
        raise ModelError(
            f"{path}: is a 3D model, and {KEY} is {planes}: planes are for 2D models, a 3D one sees all three axes at "
            f"once; set {KEY}=[xy]"
        )
    if spec.previous_stage is not None:
        raise ModelError(
            f"{path}: is the second stage of a cascade, and {KEY} is {planes}; a cascade runs along xy only: set "
            f"{KEY}=[xy]"
        )


def check_isotropic(stated: VolumeSettings, edges: Nanometres | Spacing | None, name: str) -> None:
    """Refuse planes other than xy in a volume whose voxels are longer along one axis.

    Nothing is refused with ``inference.resample=plan``, which brings each plane to the pixels of the model's training,
    nor where the edges of a voxel (z, y, x), in any unit, are not known.

    Raises
    ------
    VolumeError
        If the longest edge is more than ``LARGEST_RATIO`` times the shortest.
    """
    planes = stated.plane_names
    if planes == ["xy"] or stated.resample or stated.allow_anisotropic or edges is None:
        return
    if max(edges) > LARGEST_RATIO * min(edges):
        raise VolumeError(
            f"{name}: its voxels measure {edges[0]:g} x {edges[1]:g} x {edges[2]:g} (z, y, x), and {KEY} is "
            f"{planes}: the model would see sections stretched {max(edges) / min(edges):.3g} times, "
            f"expected at most {LARGEST_RATIO:g}; set {KEY}=[xy], bring the planes to the model's pixels by "
            "inference.resample=plan, or set inference.allow_anisotropic_planes=true"
        )


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
    """What makes probabilities of the model's logits; ConfigError where the other family's is stated."""
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
