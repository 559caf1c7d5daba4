"""``inference.case=auto`` for 2D models whose training saw single sections, beside nnU-Net section by section."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from connectomics.cli import main
from connectomics.models.checkpoint import read_spec

from nnunet_models import make_model
from oracle import make_predictor, predict
from parity_table import scene

CPU = ["system.device=cpu", "system.num_cpus=1"]
SHARE = 1e-4


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Three sections of different brightness, so that it matters whose statistics normalise them."""
    values = scene(1, (3, 60, 70), 4)[0][0] * np.array([60, 150, 250])[:, None, None]
    return values.astype(np.uint8)


def model_of(folder: Path, depth: float, reader: str = "Tiff3DIO") -> Path:
    model = make_model(folder, dimensions=2, patch=(32, 32), classes=3, reader=reader, seed=2)
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps(plans | {"original_median_shape_after_transp": [depth, 64, 64]}))
    return model


def infer(model: Path, image: np.ndarray, folder: Path, *words: str) -> np.ndarray:
    with h5py.File(folder / "v.h5", "w") as file:
        file["main"] = image
    stated = [f"inference.volume_mode.file_list=['{folder}/v.h5']", f"inference.data.output_path={folder}"]
    assert main(["infer-volume", "--checkpoint", str(model), *CPU, *stated, *words]) == 0
    with h5py.File(folder / "v_labels.h5") as file:
        labels: np.ndarray = file["main"][:]
    return labels


@pytest.mark.parametrize(
    ("depth", "word", "by_section", "why"),
    [
        (1, "inference.case=auto", True, "its training saw single sections: original_median_shape_after_transp"),
        (1.0, "inference.case=volume", False, "inference.case=volume"),
        (16, "inference.case=auto", False, "a 2D model that was trained on volumes"),
    ],
)
def test_a_stack_by_a_model_of_single_sections(
    image: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    depth: float,
    word: str,
    by_section: bool,
    why: str,
) -> None:
    model = model_of(tmp_path, depth)
    ours = infer(model, image, tmp_path, word)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("case: each section" if by_section else "case: the whole volume")
    assert why in first
    predictor = make_predictor(model, ["0"])
    parts = [image[z : z + 1] for z in range(len(image))] if by_section else [image]
    theirs = np.concatenate([predict(predictor, part[None].astype(np.float32)) for part in parts])
    other = np.concatenate(
        [predict(predictor, p[None].astype(np.float32)) for p in ([image] if by_section else image[:, None])]
    )
    assert (ours != theirs).mean() <= SHARE
    assert (other != theirs).mean() > 100 * SHARE  # it matters
    provenance = json.loads((tmp_path / "v_labels.run" / "provenance.json").read_text())
    assert provenance["nnunet"] == "as nnU-Net"


def test_from_nnunet_and_verify_keep_the_file_as_the_case(
    image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tmp_path, 1)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a_0000.tif", image, photometric="minisblack")
    words = ["-i", str(tmp_path / "images"), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *words, "--disable_progress_bar", "system.num_cpus=1"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("case: each file (as nnU-Net takes it)\n")
    assert "not nnU-Net" not in said
    theirs = predict(make_predictor(model, ["0"]), image[None].astype(np.float32))
    assert (tifffile.imread(tmp_path / "out" / "a.tif") != theirs).mean() <= SHARE
    certificate = tmp_path / "c.json"
    words = [str(model), str(tmp_path / "images" / "a_0000.tif"), "--certificate", str(certificate), *CPU]
    assert main(["verify", *words, "--threshold", "1e-2"]) == 0
    assert capsys.readouterr().out.startswith("case: the whole volume (as nnU-Net takes a file)\n")
    (sample,) = json.loads(certificate.read_text())["samples"]
    assert sample["voxels"] == image.size


@pytest.mark.parametrize(
    ("shape", "reader", "expected"),
    [
        ([1, 64, 64], "SimpleITKIO", True),
        ([2, 64, 64], "SimpleITKIO", False),
        ([1.5, 64, 64], "NibabelIO", False),
        ("many", "Tiff3DIO", False),
        (None, "Tiff3DIO", False),
        (None, "NaturalImage2DIO", True),
    ],
)
def test_what_the_plans_say(tmp_path: Path, shape: object, reader: str, expected: bool) -> None:
    model = make_model(tmp_path, dimensions=2, patch=(32, 32))
    plans = json.loads((model / "plans.json").read_text()) | {"image_reader_writer": reader}
    plans["original_median_shape_after_transp"] = shape
    (model / "plans.json").write_text(json.dumps({key: value for key, value in plans.items() if value is not None}))
    assert read_spec(model).slice_case is expected


def test_a_3d_model_takes_the_volume(tmp_path: Path) -> None:
    model = make_model(tmp_path, dimensions=3, patch=(8, 16, 16), reader="SimpleITKIO")
    plans = json.loads((model / "plans.json").read_text()) | {"original_median_shape_after_transp": [1, 64, 64]}
    (model / "plans.json").write_text(json.dumps(plans))
    assert not read_spec(model).slice_case
