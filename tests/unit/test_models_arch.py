"""The architecture registry, nnU-Net's trainers by their source, and custom trainers."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from connectomics.errors import ModelError
from connectomics.models.arch.nnunet_models import (
    NetworkPlan,
    NNUNetModel,
    build_architecture,
    register_architecture,
)
from connectomics.models.arch.trainers import own_network_trainer, stock_trainers
from connectomics.models.checkpoint import load_model

from nnunet_models import make_model


def test_every_importable_trainer_is_judged_as_python_judges_it() -> None:
    """Reading the source says the same as importing: who builds a network of its own."""
    warnings.simplefilter("ignore")
    judged = 0
    for name, source in stock_trainers().items():
        try:
            trainer = vars(importlib.import_module(source.module))[name]
        except ImportError:
            continue  # the very modules that must not be imported needlessly
        stock = vars(importlib.import_module(stock_trainers()["nnUNetTrainer"].module))["nnUNetTrainer"]
        own = trainer.build_network_architecture is not stock.build_network_architecture
        expected = trainer if own else None
        assert own_network_trainer(name, where="c.pth", trust_code=False) is expected, name
        judged += 1
    assert judged > 40


def test_a_stock_trainer_is_judged_without_importing_its_module() -> None:
    module = stock_trainers()["nnUNetTrainerDA5"].module
    sys.modules.pop(module, None)
    assert own_network_trainer("nnUNetTrainerDA5", where="c.pth", trust_code=False) is None
    assert module not in sys.modules


def test_a_module_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, stock_trainers()["nnUNetTrainerBN"].module, None)
    with pytest.raises(ModelError, match=r"c\.pth: the trainer 'nnUNetTrainerBN'.*cannot be imported"):
        own_network_trainer("nnUNetTrainerBN", where="c.pth", trust_code=False)


def test_a_class_that_is_no_trainer_is_unknown() -> None:
    with pytest.raises(ModelError, match="unknown trainer 'PrefetchLoader'"):
        own_network_trainer("PrefetchLoader", where="c.pth", trust_code=False)


CUSTOM_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans


class CustomTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
        num_output_channels, enable_deep_supervision=True,
    ):
        return get_network_from_plans(
            architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
            num_output_channels, deep_supervision=enable_deep_supervision,
        )
"""


def test_a_custom_trainer_comes_with_trust_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_model(tmp_path, dimensions=2, patch=(16, 16), features=(4, 8))
    file = root / "fold_0" / "checkpoint_final.pth"
    expected = load_model(root).networks[0](torch.ones(1, 1, 1, 16, 16).cumsum(3))
    content = torch.load(file, weights_only=False)
    torch.save(content | {"trainer_name": "CustomTrainer"}, file)
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "custom_trainer_for_tests.py").write_text(CUSTOM_TRAINER)
    with pytest.raises(ModelError, match="unknown trainer 'CustomTrainer'"):
        load_model(root, trust_code=True)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    with pytest.raises(ModelError, match=r"unknown trainer 'CustomTrainer'.*model\.trust_code"):
        load_model(root)
    assert "custom_trainer_for_tests" not in sys.modules
    (network,) = load_model(root, trust_code=True).networks
    assert torch.equal(network(torch.ones(1, 1, 1, 16, 16).cumsum(3)), expected)


def plan(**changes: object) -> NetworkPlan:
    values: dict[str, object] = {
        "trainer_name": "nnUNetTrainer",
        "dimensions": 2,
        "channels": 1,
        "classes": 2,
        "network_class": "",
        "arguments": {},
        "imports": (),
        "patch_shape": (1, 8, 8),
        "plans": {},
        "configuration": {},
        "where": "plans.json",
        "checkpoint": "c.pth",
        "trust_code": False,
    }
    return NetworkPlan(**(values | changes))  # type: ignore[arg-type]  # the values have their fields' types


def test_a_registered_architecture_is_built_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from connectomics.models.arch import nnunet_models

    monkeypatch.setattr(nnunet_models, "_ARCHITECTURES", dict(nnunet_models._ARCHITECTURES))

    @register_architecture("one convolution")
    def build(plan: NetworkPlan) -> NNUNetModel:
        return NNUNetModel(nn.Conv2d(plan.channels, plan.classes, 1), plan.dimensions)

    assert build_architecture("one convolution", plan())(torch.ones(3, 1, 1, 4, 5)).shape == (3, 2, 1, 4, 5)
    with pytest.raises(ModelError, match=r"'two'; known: nnunet, one convolution"):
        build_architecture("two", plan())
    with pytest.raises(ValueError, match="already registered"):
        register_architecture("nnunet")(build)


def test_a_3d_network_gets_all_axes() -> None:
    model = NNUNetModel(nn.Conv3d(1, 2, 3, padding=1), 3)
    assert model(torch.ones(1, 1, 4, 5, 6)).shape == (1, 2, 4, 5, 6)


def test_a_strange_plan_is_built_on_the_meta_device_only() -> None:
    """Nothing is allocated before the weights are known to fit: this one would need terabytes."""
    stages = 12
    arguments = {
        "n_stages": stages,
        "features_per_stage": [8192] * stages,
        "conv_op": "torch.nn.Conv2d",
        "kernel_sizes": 31,
        "strides": 1,
        "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2,
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    model = build_architecture("nnunet", plan(network_class=name, arguments=arguments, imports=("conv_op",)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() * 4 for p in model.parameters()) > 1e12


def test_the_signature_of_own_trainers_is_the_one_we_call() -> None:
    """nnunetv2 changed it once; this fails when it does so again."""
    trainer = own_network_trainer("nnUNetTrainerBN", where="c.pth", trust_code=False)
    assert trainer is not None
    assert list(inspect.signature(trainer.build_network_architecture).parameters) == [
        "plans_manager",
        "configuration_manager",
        "num_input_channels",
        "num_output_channels",
        "enable_deep_supervision",
    ]
