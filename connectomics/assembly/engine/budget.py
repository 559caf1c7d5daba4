"""What memory and CPUs a run may use, and whether a batch of windows leaves enough memory for everything else."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from connectomics.config.schema import Config
from connectomics.core.geometry import Vec3
from connectomics.models.backends.torch_eager import window_bytes
from connectomics.models.checkpoint import LoadedModel

BUDGET_SHARE = 0.5  # of the machine's memory, where no budget is stated
BATCH_SHARE = 0.5  # of the budget, for the windows of a batch that is not stated


def memory_budget_bytes(config: Config) -> int:
    """Host memory a run may use: what is stated, else half of the machine's."""
    stated = config.system.memory_budget_gb
    return int(stated * 1e9) if stated is not None else int(psutil.virtual_memory().total * BUDGET_SHARE)


def holds_batch(config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3], batch: int) -> bool:
    """Whether the networks' work on so many windows (z, y, x) takes at most ``BATCH_SHARE`` of the budget."""
    need = max(window_bytes(model.skeleton, patch) for model, patch in zip(models, patches, strict=True))
    return batch * need <= memory_budget_bytes(config) * BATCH_SHARE
