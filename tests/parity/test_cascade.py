"""The second stage of a cascade sees what nnU-Net's does: labels of the first stage, cropped, resampled, one-hot."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from connectomics.core.errors import ModelError
from connectomics.core.geometry import BlockGrid, vec3
from connectomics.inference.interpolation import AxisResampling
from connectomics.inference.label_resampling import LabelResampling
from connectomics.inference.resample import check_rules
from connectomics.lightning.inference import InferenceManager
from connectomics.models.plan_text import PlanText
from connectomics.models.plans import resampling_rule

import oracle
from nnunet_models import make_model, make_plans
from parity_table import NONE, REGIONS, TORCH, ArrayVolume, scene, train_second_stage

CPU = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]
LARGE = "inference.allow_large_resampling=true"


@pytest.mark.parametrize("function", ["linear", "nearest", "torch"])
@pytest.mark.parametrize("separate", [None, 0, 1, 2])
def test_labels_are_resampled_as_nnunet_does_in_any_cut(function: str, separate: int | None) -> None:
    """Also where a voxel lies between two labels, which happens at every edge when an axis is doubled."""
    torch.set_num_threads(1)
    random = np.random.default_rng(separate or 7)
    for i in range(12):
        old = vec3(random.integers(2, 24, 3).tolist())
        new = vec3([2 * n for n in old]) if i % 3 == 0 else vec3(random.integers(1, 36, 3).tolist())
        labels = random.integers(-1, 4, [-(-n // 3) for n in old]).repeat(3, 0).repeat(3, 1).repeat(3, 2)
        labels = labels[tuple(slice(n) for n in old)].astype(np.int32)
        image = labels[None].astype(np.float32)  # the type that nnU-Net's readers give
        order = 0 if function == "nearest" else 1
        if function == "torch":
            spacing = [5.0 if axis == separate else 1.0 for axis in range(3)]
            theirs = resample_torch_fornnunet(image, new, spacing, [1.0] * 3, is_seg=True, num_threads=1)[0]
        else:
            theirs = resample_data_or_seg(image, new, True, separate, order, separate is not None, order_z=0)[0]
        orders = [0 if axis == separate else order for axis in range(3)]
        axes = [AxisResampling(*each, function == "torch") for each in zip(old, new, orders, strict=True)]
        rule = LabelResampling(tuple(axes), separate)
        ours = np.empty(new, np.int32)
        for block in BlockGrid(new, (7, 11, 13)):
            near = rule.reach(block.core)
            ours[block.core.slices] = rule.apply(labels[near.slices], block.core, near)
        np.testing.assert_array_equal(ours, theirs)


@dataclass(frozen=True, slots=True)
class Trial:
    """A second stage, the spacing of its plan (model's axes) and of an image (None: nothing is resampled)."""

    dimensions: int = 3
    plan: tuple[float, ...] = (1.0, 1.0, 1.0)
    image: tuple[float, float, float] | None = None
    resampling: dict[str, object] | None = None
    axis_order: tuple[int, int, int] = (0, 1, 2)
    regions: bool = False
    channels: int = 1
    folds: tuple[str, ...] = ("0",)
    mirror: tuple[int, ...] = ()


EVEN = Trial(image=(0.7, 1.3, 0.9))
THICK = Trial(plan=(4.0, 1.0, 1.0), image=(5.3, 1.4, 0.8))
TRIALS = {
    "as it is": Trial(channels=2, folds=("0", "1")),
    "as it is, transposed, regions": Trial(axis_order=(2, 0, 1), regions=True, mirror=(0,)),
    "2D": Trial(dimensions=2, plan=(1.0, 1.0)),
    "2D resampled": Trial(dimensions=2, plan=(1.0, 1.0), image=(2.0, 1.3, 0.8)),
    "even": replace(EVEN, regions=True),
    "thick": THICK,
    "thick, transposed": Trial(plan=(1.0, 4.0, 1.0), image=(5.3, 1.4, 0.7), axis_order=(2, 0, 1), channels=2),
    "torch even": replace(EVEN, resampling=TORCH),
    "torch thick": replace(THICK, resampling=TORCH),
    "not resampled": replace(EVEN, resampling=NONE),
    "labels of order 0": replace(
        EVEN,
        resampling={"resampling_fn_seg_kwargs": {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": None}},
    ),
}

FURTHER = ("2D", "thick", "torch even", "not resampled")  # the parity table has the like


def model_of(trial: Trial, folder: Path) -> Path:
    return make_model(
        folder,
        dimensions=trial.dimensions,
        channels=trial.channels,
        classes=3,
        patch=(16, 24) if trial.dimensions == 2 else (8, 16, 16),
        folds=trial.folds,
        mirror_axes=trial.mirror,
        reader="SimpleITKIO",
        spacing=trial.plan,
        features=(4, 8, 12),
        seed=4,
        labels=REGIONS if trial.regions else None,
        regions_class_order=[1, 2] if trial.regions else None,
        axis_order=trial.axis_order,
        resampling=trial.resampling,
        previous_stage="3d_lowres",
        give_weights=functools.partial(train_second_stage, regions=trial.regions),
    )


def scene_of(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """An image bordered by zeros, with a hole, and labels that another network may have found in it."""
    extent = (20, 26, 29) if trial.image is None or trial.image[0] < 5 else (9, 26, 29)
    image, classes = scene(trial.channels, extent, 8)
    pixels = (image * 250).astype(np.uint8)
    pixels[:, :, :3] = 0
    pixels[..., -2:] = 0
    pixels[:, 2:5, 9:12, 9:12] = 0
    _, y, x = np.indices(extent)
    pixels[:, y + x < 12] = 0  # a corner outside of the mask
    return pixels, np.roll(classes, (1, 2), (1, 2)).astype(np.uint8)


LABELS: dict[str, object] = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
DEFAULT: dict[str, object] = {"resampling_fn_seg_kwargs": LABELS}


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"resampling_fn_seg_kwargs": {**LABELS, "order": 3}}, "of order 3 .* up to 1"),
        ({"resampling_fn_seg_kwargs": {**LABELS, "order_z": 1}}, "across sections with order 1, supported is order 0"),
        ({"resampling_fn_seg_kwargs": {**LABELS, "is_seg": False}}, "is_seg=False, which is not supported"),
        ({"resampling_fn_seg": "resample_mine"}, "resample_mine, expected"),
        (NONE | DEFAULT | {"resampling_fn_seg": "resample_data_or_seg_to_shape"}, "that they would not fit together"),
        (
            TORCH | {"resampling_fn_seg_kwargs": {"is_seg": True, "memefficient_seg_resampling": True}},
            "memefficient_seg_resampling=True, which is not supported",
        ),
    ],
)
def test_labels_that_the_plans_resample_otherwise_are_refused(stated: dict[str, object], said: str) -> None:
    ours = make_plans(dimensions=3, patch=(8, 16, 16))["configurations"]["3d_fullres"]
    names = ("resampling_fn_data", "resampling_fn_probabilities", "resampling_fn_seg")
    check_rules(*(resampling_rule(PlanText(ours, "plans"), name) for name in names))
    with pytest.raises(ModelError, match=said):
        check_rules(*(resampling_rule(PlanText(ours | stated, "plans"), name) for name in names))


def test_three_hundred_labels_have_a_channel_each(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_model(
        tmp_path,
        dimensions=3,
        classes=301,
        patch=(8, 8, 8),
        reader="SimpleITKIO",
        mirror_axes=(),
        features=(4, 8),
        previous_stage="3d_lowres",
    )
    manager = InferenceManager.from_checkpoint(model, [*CPU, "inference.resample=plan"])
    image = (scene(1, (6, 8, 9), 3)[0] * 250).astype(np.uint8)
    previous = np.random.default_rng(0).integers(0, 301, (4, 3, 4)).repeat(2, 0).repeat(3, 1).repeat(3, 2)
    previous = previous[:6, :8, :9].astype(np.uint16)
    spacing = (0.8, 1.2, 1.1)
    ours = manager.predict(image, spacing, previous)
    reader = ArrayVolume(image)
    (cases,) = manager.segmenter(spacing, ArrayVolume(previous[None]).read).survey(reader, "image")
    predictor = oracle.make_predictor(model, ["0"])
    theirs = oracle.predict(predictor, image, summaries=cases[0].channels, spacing=spacing, previous=previous)
    assert ours.labels.dtype == np.uint16 and theirs.max() > 255
    np.testing.assert_array_equal(ours.labels, theirs)


def test_a_second_stage_in_an_ensemble_and_both_stages_in_memory(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trial = Trial()
    image, previous = scene_of(trial)
    second = model_of(trial, tmp_path / "second")
    common: dict[str, object] = {"dimensions": 3, "classes": 3, "patch": (8, 16, 16), "reader": "SimpleITKIO"}
    first = make_model(tmp_path / "first", name="3d_lowres", mirror_axes=(), seed=5, **common)  # type: ignore[arg-type]
    alone = make_model(tmp_path / "alone", mirror_axes=(), seed=6, **common)  # type: ignore[arg-type]
    manager = InferenceManager.from_checkpoint(alone, [*CPU, f"model.ensemble=['{second}']"])
    ours = manager.predict(image, previous=previous)
    surveyed = manager.segmenter(None, ArrayVolume(previous[None]).read).survey(ArrayVolume(image), "image")
    answers = []
    for path, cases, given in zip((alone, second), surveyed, (None, previous), strict=True):
        predictor = oracle.make_predictor(path, ["0"])
        answers.append(oracle.predict_cases(predictor, image, cases, None, inject=True, previous=given))
    labels, mean = oracle.ensembled(predictor.label_manager, answers)
    np.testing.assert_array_equal(ours.labels, labels)
    assert ours.probabilities is not None and np.abs(ours.probabilities - mean).max() <= 1e-5
    found = InferenceManager.from_checkpoint(first, CPU).predict(image).labels
    both = InferenceManager.from_checkpoint(second, [*CPU, f"model.previous_stage='{first}'"]).predict(image)
    one_by_one = InferenceManager.from_checkpoint(second, CPU).predict(image, previous=found)
    np.testing.assert_array_equal(both.labels, one_by_one.labels)


def shown(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.long) if name in FURTHER else name


@pytest.mark.parametrize("name", [shown(name) for name in TRIALS])
def test_labels_equal_the_oracle_in_any_cut(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trial = TRIALS[name]
    model, (image, previous) = model_of(trial, tmp_path), scene_of(trial)
    words = [f"inference.resample={'off' if trial.image is None else 'plan'}", LARGE]
    manager = InferenceManager.from_checkpoint(model, [*CPU, *words])
    ours = manager.predict(image, trial.image, previous)
    assert ours.probabilities is not None
    segmenter, reader = manager.segmenter(trial.image, ArrayVolume(previous[None]).read), ArrayVolume(image)
    surveyed = segmenter.survey(reader, "image")
    predictor = oracle.make_predictor(model, trial.folds)
    labels, probabilities = oracle.predict_cases(
        predictor, image, surveyed[0], trial.image, inject=True, previous=previous
    )
    assert len(np.unique(labels)) == 3
    np.testing.assert_array_equal(ours.labels, labels)
    assert np.abs(ours.probabilities - probabilities).max() <= 1e-5
    other = manager.predict(image, trial.image, previous[::-1]).labels
    assert (other != ours.labels).mean() > 0.01, "the second stage does not look at the first"
    for shape in ((7, 26, 29), (20, 14, 17)):
        for block in BlockGrid(vec3(list(image.shape[1:])), shape):
            part = segmenter.segment(reader.read, surveyed, block.core)
            assert part["labels"][0].tobytes() == ours.labels[block.core.slices].tobytes()
            whole = ours.probabilities[(slice(None), *block.core.slices)]
            assert part["probabilities"].tobytes() == whole.tobytes()
