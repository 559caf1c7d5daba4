"""What differs between releases of nnunetv2: bounds, pairs that do not fit, moved classes, float32 sums."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from packaging.requirements import Requirement

from connectomics.models.nnunet_releases import BEYOND, LOWEST, current_class, float32_sums, known_bad

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
STATED = {each.name: each for each in map(Requirement, PROJECT["dependencies"])}


def test_the_bounds_are_those_of_the_package() -> None:
    text = "{}>={},<{}".format("nnunetv2", *(".".join(map(str, bound)) for bound in (LOWEST, BEYOND)))
    assert STATED["nnunetv2"] == Requirement(text)


@pytest.mark.parametrize(
    ("nnunet", "torch_", "networks", "words"),
    [
        ("2.8.1", "2.13.0+cpu", "0.4.4", []),
        ("2.5.1", "2.6.0", "0.3.1", []),
        ("2.6.4", "2.9.1", "0.4.2", ["torch!=2.9.*"]),
        ("2.5.2", "2.8.0", "0.4.1", ["dynamic-network-architectures<0.4"]),
        ("2.7.0", "2.8.0", "0.3.1", ["dynamic-network-architectures>=0.4.1,<0.5"]),
        ("2.4.2", "2.8.0", "0.3.1", ["nnunetv2>=2.5.1,<2.9"]),
        ("2.9.0", "2.8.0", "0.4.4", ["nnunetv2>=2.5.1,<2.9"]),
    ],
)
def test_pairs_that_are_known_not_to_fit(nnunet: str, torch_: str, networks: str, words: list[str]) -> None:
    """What is advised is a requirement that the version found does not fulfil."""
    installed = {"nnunetv2": nnunet, "torch": torch_, "dynamic_network_architectures": networks}
    found = known_bad(installed)
    assert [advised for _, advised in found] == words
    for _, advised in found:
        requirement = Requirement(advised)
        assert installed[requirement.name.replace("-", "_")] not in requirement.specifier


def test_this_environment_is_not_known_to_be_bad() -> None:
    names = ("nnunetv2", "torch", "dynamic_network_architectures")
    assert known_bad({name: importlib.metadata.version(name) for name in names}) == []


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("module", ["unet", "residual_unet", "any"])
def test_moved_classes_are_found(name: str, module: str) -> None:
    import pydoc

    assert pydoc.locate(current_class(f"dynamic_network_architectures.architectures.{module}.{name}")) is not None
    assert current_class(f"somewhere.{module}.{name}") == f"somewhere.{module}.{name}"


def test_sums_are_float32_in_nnunet_alone_and_only_for_a_while() -> None:
    before = (predict_from_raw_data.torch, predict_from_raw_data.compute_gaussian)
    with float32_sums():
        inside = predict_from_raw_data.torch
        assert inside.half is torch.float32
        assert inside.Tensor is torch.Tensor
        gaussian = predict_from_raw_data.compute_gaussian((4, 4), device=torch.device("cpu"))
        assert gaussian.dtype == torch.float32
        assert torch.half is torch.float16
    assert (predict_from_raw_data.torch, predict_from_raw_data.compute_gaussian) == before
