"""Models as users have them: nnunetv2's own planners (ResEnc M, L, XL), its other checkpoints, deep supervision."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch

from connectomics.core.errors import ModelError
from connectomics.models.checkpoint import load_model, read_spec
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest

import nnunet_models
from nnunet_models import DATASET_NAME, make_dataset, make_model

PRESETS = ("M", "L", "XL")
ALWAYS = (("L", "2d"), ("L", "3d_fullres"))


def planned(folder: Path, preset: str) -> dict[str, Any]:
    """Plans that nnunetv2's planner of a preset makes for a small anisotropic dataset, an eighth as wide."""
    raw, preprocessed = folder / "raw" / DATASET_NAME, folder / "preprocessed" / DATASET_NAME
    for place in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        place.mkdir(parents=True)
    for case in range(4):
        for name in (f"imagesTr/case_{case}_0000.tif", f"labelsTr/case_{case}.tif"):
            tifffile.imwrite(raw / name, np.zeros((2, 2, 2), np.uint8))
        (raw / "imagesTr" / f"case_{case}.json").write_text('{"spacing": [4, 1, 1]}')
    (raw / "dataset.json").write_text(json.dumps(make_dataset(reader="Tiff3DIO")))
    intensities = {"max": 255.0, "mean": 99.0, "median": 99.0, "min": 0.0, "std": 9.0}
    fingerprint = {
        "spacings": [[4.0, 1.0, 1.0]] * 4,
        "shapes_after_crop": [[16, 48, 48]] * 4,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {
            "0": intensities | {"percentile_00_5": 1.0, "percentile_99_5": 250.0}
        },
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    home = "nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners"
    places = {"nnUNet_raw": str(folder / "raw"), "nnUNet_preprocessed": str(folder / "preprocessed")}
    with mock.patch.dict(os.environ, places), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = vars(importlib.import_module(home))[f"nnUNetPlannerResEnc{preset}"](DATASET_NAME)
        planner.UNet_base_num_features = 4
        planner.plan_experiment()
    torch.set_num_threads(1)
    plans: dict[str, Any] = json.loads((preprocessed / f"nnUNetResEncUNet{preset}Plans.json").read_text())
    return plans


def logits_of_nnunet(root: Path, window: torch.Tensor, checkpoint_name: str = "checkpoint_final.pth") -> torch.Tensor:
    """What the network of nnUNetPredictor says."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        trainer = nnunet_models._trainer_class(root.name.split("__")[0])
        name = "nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name"
        with mock.patch(name, lambda _: trainer):
            predictor = nnUNetPredictor(device=torch.device("cpu"))
            predictor.initialize_from_trained_model_folder(str(root), (0,), checkpoint_name)
    network = predictor.network.eval()
    with torch.no_grad():
        return network(window) if network_is_3d(network) else network(window[:, :, 0])[:, :, None]


def network_is_3d(network: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.Conv3d) for module in network.modules())


def assert_equal_to_nnunet(root: Path, checkpoint_name: str = "checkpoint_final.pth", path: Path | None = None) -> None:
    loaded = load_model(ModelRequest(path or root, checkpoint_name=checkpoint_name))
    window = torch.randn(1, 1, *loaded.spec.patch_shape, generator=torch.Generator().manual_seed(4))
    expected = logits_of_nnunet(root, window, checkpoint_name)
    assert torch.equal(loaded.networks[0](window), expected)
    assert expected.argmax(1).unique().numel() > 1


@pytest.mark.parametrize(
    ("preset", "configuration"),
    [
        pytest.param(preset, configuration, marks=() if (preset, configuration) in ALWAYS else pytest.mark.long)
        for preset in PRESETS
        for configuration in ("2d", "3d_fullres")
    ],
)
def test_presets_load_as_nnunet_loads_them(tmp_path: Path, preset: str, configuration: str) -> None:
    plans = planned(tmp_path, preset)
    plans["configurations"] = {configuration: plans["configurations"][configuration]}
    network = plans["configurations"][configuration]["architecture"]
    assert network["network_class_name"].endswith("ResidualEncoderUNet")
    dataset = make_dataset(reader="Tiff3DIO")
    root = tmp_path / f"nnUNetTrainer__nnUNetResEncUNet{preset}Plans__{configuration}"
    (root / "fold_0").mkdir(parents=True)
    (root / "plans.json").write_text(json.dumps(plans))
    (root / "dataset.json").write_text(json.dumps(dataset))
    axes = (0, 1, 2)[: len(plans["configurations"][configuration]["patch_size"])]
    nnunet_models._write_checkpoint(
        root / "fold_0" / "checkpoint_final.pth",
        plans,
        dataset,
        "0",
        axes,
        "nnUNetTrainer",
        nnunet_models.enliven,
        seed=3,
    )
    spec = read_spec(root)
    assert (spec.plans_name, spec.configuration) == (f"nnUNetResEncUNet{preset}Plans", configuration)
    assert spec.patch_shape[1:] == tuple(plans["configurations"][configuration]["patch_size"][-2:])
    assert_equal_to_nnunet(root)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fold with three checkpoints of different weights, as in a training that ended."""
    folder = tmp_path_factory.mktemp("small")
    options: dict[str, Any] = {"dimensions": 2, "patch": (16, 16), "features": (4, 8)}
    root = make_model(folder / "final", **options)
    for seed, name in enumerate(("checkpoint_best.pth", "checkpoint_latest.pth"), start=1):
        other = make_model(folder / name, **options, seed=seed)
        shutil.copy(other / "fold_0" / "checkpoint_final.pth", root / "fold_0" / name)
    return root


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth"])
def test_each_checkpoint_is_the_one_asked_for(small: Path, tmp_path: Path, name: str) -> None:
    assert_equal_to_nnunet(small, name)
    spec = read_spec(ModelRequest(small, checkpoint_name=name))
    assert spec.checkpoint_name == name
    assert sum(spec.sha256 == read_spec(f).sha256 for f in (small / "fold_0").iterdir()) == 1
    (tmp_path / "copy").mkdir()
    convert_model(ModelRequest(small, checkpoint_name=name), tmp_path / "copy")
    assert_equal_to_nnunet(small, name, tmp_path / "copy")


def test_a_missing_checkpoint_names_those_that_exist(small: Path) -> None:
    for options in ({}, {"folds": ("0",)}):
        with pytest.raises(
            ModelError, match=r"checkpoint_last\.pth.*found there: .*_best\.pth, .*_final\.pth, .*_latest"
        ):
            read_spec(ModelRequest(small, checkpoint_name="checkpoint_last.pth", **options))


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerNoDeepSupervision"])
@pytest.mark.parametrize("stated", [None, True, False])
def test_deep_supervision_on_or_off(tmp_path: Path, trainer: str, stated: bool | None) -> None:
    """Trained with or without, and plans that state it or not: always the one head at full resolution."""
    options: dict[str, Any] = {"dimensions": 3, "patch": (8, 8, 8), "reader": "Tiff3DIO", "architecture": "resenc"}
    root = make_model(tmp_path, **options, trainer=trainer)
    if stated is not None:
        plans = json.loads((root / "plans.json").read_text())
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["deep_supervision"] = stated
        (root / "plans.json").write_text(json.dumps(plans))
    assert_equal_to_nnunet(root)
