"""Profiles as ``connectomics tune`` would leave them, with times that a test chooses."""

from __future__ import annotations

from pathlib import Path

from connectomics.assembly.engine.models import load_models
from connectomics.assembly.settings import model_settings
from connectomics.config.schema import DataConfig, ModelConfig
from connectomics.planning.profile import Profile, Trial, profile_path, save_profile


def keep_profile(cache: Path, model: Path, *trials: Trial) -> Path:
    """Keep what was measured of a model with its own window on this machine's CPU."""
    (_, loaded), *_ = load_models(model_settings(ModelConfig(), DataConfig(), model))
    path = profile_path(cache, [loaded.spec], [loaded.spec.patch_shape], "cpu")
    save_profile(path, Profile(trials), "cpu")
    return path


def torch_trial(batch: int, window_s: float, threads: int = 1, precision: str = "exact") -> Trial:
    """PyTorch, eager, measured to label as the reference does."""
    return Trial("torch", precision, batch, threads, window_s, 1.0, 0.0, "", window_s, window_s)
