"""Really trained models on real EM: equal to the oracle, to nnU-Net's own files, and as good against the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from connectomics.lightning.inference import InferenceManager
from connectomics.stages.survey.survey import survey

import oracle
from parity_table import ArrayVolume

STOCK_SHARE = 1e-4
SECTIONS = (12, 13, 14, 15)


def section(shared_data: Path, kind: str, number: int) -> np.ndarray:
    return np.asarray(Image.open(shared_data / "em" / "vnc" / kind / f"{number:02d}.png"))


def manager_of(shared_data: Path, model: str, folds: str, *more: str, mirror: bool) -> InferenceManager:
    torch.set_num_threads(1)
    words = [
        "system.device=cpu",
        "system.num_cpus=1",
        f"model.folds=[{folds}]",
        f"inference.test_time_augmentation.enabled={str(mirror).lower()}",
        *more,
    ]
    return InferenceManager.from_checkpoint(shared_data / "models" / model, words)


def against_nnunet(manager: InferenceManager, folder: Path, image: np.ndarray, *, mirror: bool) -> tuple[int, int, int]:
    """Voxels that differ from the oracle and from stock nnU-Net, and all voxels, of one case (c, z, y, x).

    Mirrored along rows alone; nnU-Net's own files are of both axes.
    """
    ours = manager.predict(image).labels
    cases = survey(ArrayVolume(image), "image", manager.engine.segmenter.members[0].schemes, by_slice=False)
    predictor = oracle.make_predictor(folder, manager.engine.spec.folds, mirror=mirror)
    predictor.allowed_mirroring_axes = predictor.allowed_mirroring_axes[:1]
    exact = oracle.predict(predictor, image, summaries=cases[0].channels)
    stock = oracle.predict(predictor, image, exact=False)
    return int((exact != ours).sum()), int((stock != ours).sum()), ours.size


@pytest.mark.parametrize(
    ("model", "folds", "mirror"),
    [
        pytest.param("vnc_mito_2d", "0", False, marks=pytest.mark.long),
        ("vnc_mito_2d", "0,1", True),
        ("vnc_multi_2d", "all", False),
    ],
)
def test_2d_models_equal_the_oracle(shared_data: Path, model: str, folds: str, mirror: bool) -> None:
    image = section(shared_data, "raw", 12)[None, None]
    rows, columns = (slice(100, 613), slice(200, 701)) if mirror else (slice(100, 868), slice(200, 968))
    image = np.ascontiguousarray(image[..., rows, columns])  # some windows; whole sections are compared below
    rows_alone = ["inference.test_time_augmentation.flip_axes=[1]"] if mirror else []
    manager = manager_of(shared_data, model, folds, *rows_alone, mirror=mirror)
    differ, stock, voxels = against_nnunet(manager, shared_data / "models" / model, image, mirror=mirror)
    assert differ == 0
    assert stock <= STOCK_SHARE * voxels


@pytest.mark.long
def test_the_3d_model_equals_the_oracle_at_its_plans_spacing(shared_data: Path) -> None:
    stack = np.stack([section(shared_data, "raw", z) for z in range(16)])[:, 512:1024, 768:1024]
    image = stack.reshape(16, 256, 2, 128, 2).mean((2, 4)).round().astype(np.uint8)[None]
    image = np.ascontiguousarray(image[:, :, :160])
    manager = manager_of(shared_data, "vnc_mito_3d", "0", mirror=False)
    differ, stock, voxels = against_nnunet(manager, shared_data / "models" / "vnc_mito_3d", image, mirror=False)
    assert differ == 0
    assert stock <= STOCK_SHARE * voxels


@pytest.mark.parametrize(
    ("model", "folds", "mirror", "reference", "sections"),
    [
        ("vnc_mito_2d", "0", False, "fold0_nomirror", SECTIONS[:1]),
        ("vnc_multi_2d", "all", False, "foldall_nomirror", SECTIONS[:1]),
        pytest.param("vnc_mito_2d", "0", False, "fold0_nomirror", SECTIONS, marks=pytest.mark.long),
        pytest.param("vnc_mito_2d", "0", True, "fold0_mirror", SECTIONS, marks=pytest.mark.long),
        pytest.param("vnc_mito_2d", "0,1", True, "fold01_mirror", SECTIONS, marks=pytest.mark.long),
        pytest.param("vnc_mito_2d", "1", False, "fold1_nomirror", SECTIONS, marks=pytest.mark.long),
        pytest.param("vnc_multi_2d", "all", True, "foldall_mirror", SECTIONS, marks=pytest.mark.long),
    ],
)
def test_files_that_nnunet_wrote_are_reproduced(
    shared_data: Path, model: str, folds: str, mirror: bool, reference: str, sections: tuple[int, ...]
) -> None:
    manager = manager_of(shared_data, model, folds, mirror=mirror)
    folder = shared_data / "reference" / model
    pairs = []
    for number in sections:
        ours = manager.predict(section(shared_data, "raw", number)).labels
        theirs = np.asarray(Image.open(folder / reference / f"vnc_{number}.png"))
        assert (ours != theirs).sum() <= STOCK_SHARE * ours.size
        pairs.append((ours, number))
    if model == "vnc_mito_2d":
        stated = json.loads((folder / "scores.json").read_text())[reference]
        for ours, number in pairs:
            dice, iou = overlap(ours == 1, section(shared_data, "mito", number) > 0)
            assert dice == pytest.approx(stated[str(number)]["dice"], abs=5e-4)
            assert iou == pytest.approx(stated[str(number)]["iou"], abs=5e-4)


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU by their definition."""
    both = int((prediction & truth).sum())
    return 2 * both / int(prediction.sum() + truth.sum()), both / int((prediction | truth).sum())
