"""How a model's windows are laid, from the configuration and the model."""

from __future__ import annotations

from connectomics.assembly.engine.engine import NNUNET_STEP
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError
from connectomics.inference.predictor import Predictor, RollingPredictor, SlidingWindow
from connectomics.inference.windows import as_patch
from connectomics.models.backends.contract import Backend
from connectomics.models.spec import ModelSpec


def make_window(config: Config, spec: ModelSpec) -> SlidingWindow:
    """How a model's windows are laid.

    Raises
    ------
    ConfigError
        If what is stated does not fit the model.
    """
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
        batch=stated.sw_batch_size or 1,
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


def make_predictor(config: Config, backends: tuple[Backend, ...], window: SlidingWindow, spec: ModelSpec) -> Predictor:
    """The predictor that lays a model's windows for these backends, one a fold."""
    if config.inference.sliding_window.engine == "nnunet":
        return RollingPredictor(backends, window, spec.classes)
    from connectomics.inference.monai_window import MonaiPredictor

    return MonaiPredictor(backends, window, config.inference.sliding_window.padding_mode)
