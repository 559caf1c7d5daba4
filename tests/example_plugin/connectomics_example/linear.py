"""An architecture of another package: each class is a weighted sum of the channels."""

from __future__ import annotations

from torch import nn

from connectomics.core.errors import ModelError
from connectomics.models.arch.nnunet_models import NetworkPlan, NNUNetModel


def build_linear(plan: NetworkPlan) -> NNUNetModel:
    """Build the network of a plan."""
    if plan.dimensions not in (2, 3):
        raise ModelError(f"{plan.where}: {plan.dimensions} axes, expected 2 or 3; give another plans file")
    kind = nn.Conv2d if plan.dimensions == 2 else nn.Conv3d
    return NNUNetModel(kind(plan.channels, plan.classes, 1), plan.dimensions)
