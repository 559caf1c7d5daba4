"""What every architecture promises: ``ArchitectureContract``, a suite for pytest.

A package that adds an architecture subclasses the suite, states its name and some plans, and lets pytest collect it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from connectomics.core.errors import ModelError
from connectomics.models.arch.nnunet_models import NetworkPlan, NNUNetModel, build_architecture


def with_values(model: NNUNetModel) -> NNUNetModel:
    """Return the network on the CPU in eval mode, with the same weights each time."""
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
        else:
            tensor.zero_()
    return model


class ArchitectureContract:
    """What an architecture promises for each of its plans.

    Attributes
    ----------
    name
        As ``model.architecture`` names it.
    plans
        Plans it can build.
    impossible
        Plans it has to refuse.
    """

    name: ClassVar[str]
    plans: ClassVar[Sequence[NetworkPlan]]
    impossible: ClassVar[Sequence[NetworkPlan]] = ()

    def test_it_takes_and_gives_five_axes(self) -> None:
        for plan in self.plans:
            model = build_architecture(self.name, plan)
            assert isinstance(model, NNUNetModel) and model.dimensions == plan.dimensions
            batch = torch.rand(2, plan.channels, *plan.patch_shape)
            assert with_values(model)(batch).shape == (2, plan.classes, *plan.patch_shape)

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        for plan in self.plans:
            model = with_values(build_architecture(self.name, plan))
            batch = torch.rand(2, plan.channels, *plan.patch_shape)
            alone = torch.cat([model(row[None]) for row in batch])
            assert torch.allclose(model(batch), alone, rtol=1e-4, atol=1e-5)

    def test_two_networks_of_a_plan_take_each_others_weights(self) -> None:
        for plan in self.plans:
            one, other = (build_architecture(self.name, plan) for _ in range(2))
            given, expected = one.network.state_dict(), other.network.state_dict()
            assert [(k, v.shape, v.dtype) for k, v in given.items()] == [
                (k, v.shape, v.dtype) for k, v in expected.items()
            ]

    def test_impossible_plans_are_refused_with_a_sentence(self) -> None:
        for plan in self.impossible:
            with pytest.raises(ModelError) as refused:
                build_architecture(self.name, plan)
            assert plan.where in str(refused.value) and "\n" not in str(refused.value)
