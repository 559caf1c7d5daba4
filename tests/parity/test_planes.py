"""Planes: a 2D model along xy, xz and yz is the mean of three runs of nnU-Net over volumes that numpy has transposed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from connectomics.cli import main
from connectomics.config.load import load_config
from connectomics.errors import ConfigError, ModelError, VolumeError
from connectomics.geometry import AxisOrder, BlockGrid, Box
from connectomics.inference.resample import Resampling
from connectomics.lightning.inference import InferenceManager, Prediction
from connectomics.lightning.verify import verify
from connectomics.pipeline.survey import survey

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, scene
from small_jobs import infer_words, ledger_lines, write_h5

WORDS = ("system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true")
ALL = "inference.planes=[xy,xz,yz]"
TRANSPOSED = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}  # sections, rows, columns, written down here again
EXTENT = (19, 27, 33)
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
KINDS = {
    "slices": {"reader": "NaturalImage2DIO"},
    "volume": {"reader": "SimpleITKIO", "folds": ("0", "1")},
    "regions": {"reader": "NaturalImage2DIO", "labels": REGIONS, "regions_class_order": [1, 2], "seed": 5},
    "turned": {"reader": "SimpleITKIO", "axis_order": (0, 2, 1)},
    "masked": {"reader": "SimpleITKIO", "masked": [True]},
}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Zeros at some faces, so that every section of every plane has a nonzero box of its own."""
    pixels: np.ndarray = (scene(1, EXTENT, 6)[0] * 255).astype(np.uint8)
    pixels[:, :1] = 0
    pixels[:, :, :3] = 0
    pixels[:, :, :, -4:] = 0
    pixels[:, :9, :9, :9] = 0
    return pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder, options = tmp_path_factory.mktemp("planes"), {"dimensions": 2, "classes": 3, "patch": (16, 24), "seed": 4}
    return {name: make_model(folder / name, **(options | kind)) for name, kind in KINDS.items()}  # type: ignore[arg-type]


def manager_of(model: Path, *more: str) -> InferenceManager:
    return InferenceManager.from_checkpoint(model, [*WORDS, *more])


def of_nnunet(
    model: Path, image: np.ndarray, planes: Sequence[str], spacing: Sequence[float] | None = None
) -> oracle.Answer:
    """nnU-Net's own mean of its own runs, one for each plane: transposed before, transposed back afterwards."""
    manager = InferenceManager.from_checkpoint(model, WORDS)
    member, predictor = manager.engine.segmenter.members[0], oracle.make_predictor(model, manager.engine.spec.folds)
    answers = []
    for plane in planes:
        axes = TRANSPOSED[plane]
        turned = np.ascontiguousarray(image.transpose(0, *(a + 1 for a in axes)))
        cases = survey(
            ArrayVolume(turned), "turned", member.schemes, by_slice=member.by_slice, with_mask=member.keeps_mask
        )
        own = None if spacing is None else [spacing[a] for a in axes]
        labels, probabilities = oracle.predict_cases(predictor, turned, cases, own, inject=True)
        back = np.argsort(axes)
        answers.append((labels.transpose(back), probabilities.transpose(0, *(back + 1))))
    return oracle.ensembled(predictor.label_manager, answers)


def equal(ours: Prediction, theirs: oracle.Answer) -> None:
    assert ours.probabilities is not None and len(np.unique(theirs[0])) == 3
    np.testing.assert_array_equal(ours.labels, theirs[0])
    assert np.abs(ours.probabilities - theirs[1]).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_the_mean_of_three_runs_of_nnunet(
    models: dict[str, Path], image: np.ndarray, kind: str
) -> None:
    ours = manager_of(models[kind], ALL).predict(image)
    equal(ours, of_nnunet(models[kind], image, tuple(TRANSPOSED)))
    assert (ours.labels != manager_of(models[kind]).predict(image).labels).any()


@pytest.mark.parametrize("planes", [("xz",), ("yz",), ("xy", "yz")], ids=" + ".join)
def test_any_planes_can_be_chosen_in_any_order(
    models: dict[str, Path], image: np.ndarray, planes: tuple[str, ...]
) -> None:
    managers = [manager_of(models["slices"], f"inference.planes={json.dumps(p)}") for p in (planes, planes[::-1])]
    one, other = (manager.predict(image) for manager in managers)
    equal(one, of_nnunet(models["slices"], image, planes))
    assert one.labels.tobytes() == other.labels.tobytes()
    assert managers[0].engine.facts == managers[1].engine.facts


def test_each_plane_is_resampled_to_the_models_pixels(models: dict[str, Path], image: np.ndarray) -> None:
    """A volume of thick sections, which planes could not be used in as it is."""
    spacing = (1.7, 1.2, 0.9)
    manager = manager_of(models["volume"], ALL, "inference.resample=plan")
    equal(manager.predict(image, spacing), of_nnunet(models["volume"], image, tuple(TRANSPOSED), spacing))


@pytest.mark.parametrize("kind", ["slices", "volume"])
@pytest.mark.parametrize("shape", [(1, 27, 33), (19, 5, 33), (19, 27, 4), (8, 8, 8), (7, 27, 16)])
def test_any_blocks_give_the_same_bytes(
    models: dict[str, Path], image: np.ndarray, kind: str, shape: tuple[int, int, int]
) -> None:
    segmenter, reader = manager_of(models[kind], ALL).engine.segmenter, ArrayVolume(image)
    surveyed = segmenter.survey(reader, "image")
    whole = segmenter.segment(reader.read, surveyed, Box.of_shape(EXTENT))
    for block in BlockGrid(EXTENT, shape):
        part = segmenter.segment(reader.read, surveyed, block.core)
        for name, array in whole.items():
            assert part[name].tobytes() == array[(slice(None), *block.core.slices)].tobytes()


def test_the_whole_suite_runs() -> None:
    """placeholder"""
