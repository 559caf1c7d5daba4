"""How a model's windows are laid, from the configuration and the model."""

from __future__ import annotations

from connectomics.assembly.engine.engine import NNUNET_STEP
from connectomics.assembly.settings import WindowSettings
from connectomics.core.errors import ConfigError
from connectomics.inference.predictor import Predictor, RollingPredictor, SlidingWindow
from connectomics.inference.windows import as_patch
from connectomics.models.backends.contract import Backend
from connectomics.models.spec import ModelSpec


def make_window(stated: WindowSettings, batch: int | None, spec: ModelSpec) -> SlidingWindow:
    """How a model's windows are laid, ``batch`` of them a forward pass; None for one.

    Raises
    ------
    ConfigError
        If what is stated does not fit the model.
    """
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
