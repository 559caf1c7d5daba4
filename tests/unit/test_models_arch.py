"""The architecture registry, nnU-Net's trainers by their source, and custom trainers."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.models.arch.nnunet_models import (
    NetworkPlan,
    NNUNetModel,
    build_architecture,
    register_architecture,
)
from connectomics.models.arch.trainers import own_network_trainer, stock_trainers
from connectomics.models.checkpoint import load_model
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest

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


NEW_SIGNATURE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from side_module import SLOPE


class CustomTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        assert plans_manager.plans_name == "nnUNetPlans"
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        for module in network.modules():
            if "negative_slope" in vars(module):
                module.negative_slope = SLOPE
        return network
"""
STOCK_NETWORK = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class CustomTrainer(nnUNetTrainer):
    pass
"""
WINDOW = torch.ones(1, 1, 1, 16, 16).cumsum(3)


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of CustomTrainer; two folders for trainers, ``first`` and ``second``, beside it."""
    root = make_model(tmp_path, dimensions=2, patch=(16, 16), features=(4, 8))
    file = root / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(file, weights_only=False) | {"trainer_name": "CustomTrainer"}, file)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    folders = [str(tmp_path / name) for name in ("absent", "first", "second")]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["", *folders]))
    return root


def logits_of_nnunet(root: Path) -> torch.Tensor:
    """What nnUNetPredictor's network says, its trainer found by nnunetv2's own search."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        def find(name: str) -> type:  # without nnunetv2's own trainers, some of which cannot be imported
            for folder in filter(os.path.isdir, os.environ["nnUNet_extTrainer"].split(os.pathsep)):  # noqa: SIM112
                found = recursive_find_python_class(
                    folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True
                )
                if found is not None:
                    assert issubclass(found, nnUNetTrainer)
                    return found
            raise LookupError(name)

        with mock.patch("nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name", find):
            predictor = nnUNetPredictor(device=torch.device("cpu"))
            predictor.initialize_from_trained_model_folder(str(root), None)
    with torch.no_grad():
        return predictor.network.eval()(WINDOW[:, :, 0])[:, :, None]


@pytest.mark.parametrize("trainer", [CUSTOM_TRAINER, NEW_SIGNATURE, STOCK_NETWORK], ids=["old", "new", "stock network"])
def test_a_custom_trainer_builds_the_network_it_builds_for_nnunet(custom: Path, trainer: str) -> None:
    second = custom.parent / "second"
    (second / "custom_trainer.py").write_text(trainer)
    (second / "side_module.py").write_text("SLOPE = 0.5")
    (network,) = load_model(ModelRequest(custom, trust_code=True)).networks
    assert torch.equal(network(WINDOW), logits_of_nnunet(custom))
    assert not {"custom_trainer", "side_module"} & set(sys.modules)
    assert str(second) not in sys.path


def test_a_custom_trainer_needs_trust_and_is_not_imported_without(custom: Path) -> None:
    (custom.parent / "second" / "custom_trainer.py").write_text(f"{STOCK_NETWORK}\nraise SystemExit('it ran')")
    with pytest.raises(UnsafeModelError, match=r"outside of nnunetv2 \(.*second/custom_trainer\.py\); nothing of it"):
        load_model(ModelRequest(custom))


def test_a_custom_trainer_that_is_nowhere_is_unknown(custom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"unknown trainer 'CustomTrainer'.*model\.trust_code"):
        load_model(ModelRequest(custom, trust_code=True))
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(ModelError, match="unknown trainer 'CustomTrainer'"):
        load_model(ModelRequest(custom, trust_code=True))


def test_only_the_module_with_the_trainer_is_imported(custom: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = custom.parent / "first", custom.parent / "second"
    (first / "a_bomb.py").write_text("raise SystemExit('it ran')")
    (first / "b_broken.py").write_text("class (:")
    (first / "package").mkdir()
    (first / "package" / "__init__.py").touch()
    (first / "package" / "trainers.py").write_text(NEW_SIGNATURE.replace("from side", "from .side"))
    (first / "package" / "side_module.py").write_text("SLOPE = 0.25")
    (second / "custom_trainer.py").write_text("raise SystemExit('the second folder was searched first')")
    (network,) = load_model(ModelRequest(custom, trust_code=True)).networks
    assert {module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)} == {0.25}
    assert "b_broken.py: passed over" in caplog.text


def test_a_trainer_that_a_module_imports_counts_as_its_own(custom: Path) -> None:
    second = custom.parent / "second"
    (second / "a_list.py").write_text("from z_trainer import Original as CustomTrainer")
    (second / "z_trainer.py").write_text(CUSTOM_TRAINER.replace("class CustomTrainer", "class Original"))
    (network,) = load_model(ModelRequest(custom, trust_code=True)).networks
    assert torch.equal(network(WINDOW), logits_of_nnunet(custom))


def test_a_known_module_of_the_same_name_is_left_alone(custom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (custom.parent / "second" / "custom_trainer.py").write_text(CUSTOM_TRAINER)
    other = types.ModuleType("custom_trainer")
    monkeypatch.setitem(sys.modules, "custom_trainer", other)
    assert load_model(ModelRequest(custom, trust_code=True)).spec.trainer_name == "CustomTrainer"
    assert sys.modules["custom_trainer"] is other


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import package_nobody_has\nclass CustomTrainer: pass", r"ModuleNotFoundError: .*package_nobody_has"),
        ("class CustomTrainer(Undefined): pass", "NameError"),
        ("class CustomTrainer: pass", "not a subclass of nnUNetTrainer"),
        ("CustomTrainer = 3", "not a subclass of nnUNetTrainer"),
        ("if False:\n    class CustomTrainer: pass", "KeyError"),
    ],
)
def test_a_custom_trainer_that_is_none_is_named(custom: Path, text: str, words: str) -> None:
    (custom.parent / "second" / "custom_trainer.py").write_text(text)
    with pytest.raises(ModelError, match=rf"'CustomTrainer'.*second/custom_trainer\.py.*{words}"):
        load_model(ModelRequest(custom, trust_code=True))


OWN_NETWORK = """
import torch
from torch import nn


class Own:
    class Network(nn.Module):
        def __init__(self, input_channels, num_classes, width, activation, deep_supervision):
            super().__init__()
            assert not deep_supervision
            self.register_buffer("scale", torch.tensor([float(torch.arange(3).sum().item())]), persistent=False)
            self.layers = nn.Sequential(nn.Conv2d(input_channels, width, 3, padding=1), activation(),
                                        nn.Conv2d(width, num_classes, 1))

        def forward(self, x):
            return self.layers(x * self.scale)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x
"""


def test_an_architecture_of_ones_own_comes_with_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans may name any class: a class within a class, a layer, and buffers that are computed while it is built."""
    root = make_model(tmp_path, dimensions=2, patch=(16, 16), features=(4, 8))
    (tmp_path / "own_networks_of_a_test.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    plans = json.loads((root / "plans.json").read_text())
    plans["configurations"]["2d"]["architecture"] = {
        "network_class_name": "own_networks_of_a_test.Own.Network",
        "arch_kwargs": {"width": 5, "activation": "own_networks_of_a_test.Doubled"},
        "_kw_requires_import": ["activation"],
    }
    (root / "plans.json").write_text(json.dumps(plans))
    layers = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Identity(), nn.Conv2d(5, 2, 1))
    file = root / "fold_0" / "checkpoint_final.pth"
    weights = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    torch.save(torch.load(file, weights_only=False) | {"network_weights": weights}, file)
    with pytest.raises(UnsafeModelError, match=r"names 'own_networks_of_a_test\.Own\.Network'"):
        load_model(ModelRequest(root))
    assert "own_networks_of_a_test" not in sys.modules
    (network,) = load_model(ModelRequest(root, trust_code=True)).networks
    with torch.no_grad():
        assert torch.equal(network(WINDOW)[:, :, 0], layers[2](2 * layers[0](3 * WINDOW[:, :, 0])))
    (tmp_path / "copy").mkdir()
    convert_model(ModelRequest(root, trust_code=True), tmp_path / "copy")
    with pytest.raises(UnsafeModelError, match=r"model\.trust_code"):
        load_model(ModelRequest(tmp_path / "copy"))
    with torch.no_grad():
        assert torch.equal(
            load_model(ModelRequest(tmp_path / "copy", trust_code=True)).networks[0](WINDOW), network(WINDOW)
        )


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
