"""``connectomics evaluate``: volumes of different formats, masks, tables of matches, refusals, and what is printed."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet
import pytest
import tifffile
import zarr
from skimage.metrics import adapted_rand_error

from connectomics.cli import main, script_main
from connectomics.core.errors import OutputError
from connectomics.core.geometry import Vec3
from connectomics.evaluate.comparison import Comparison, compare
from connectomics.evaluate.contingency import Contingency
from connectomics.evaluate.pairs import write_matches

SHAPE = (5, 40, 50)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prediction and one truth in several formats, types and chunks."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    truth = np.repeat(np.repeat(rng.integers(0, 5, (5, 8, 10)), 5, axis=1), 5, axis=2)
    prediction = np.where(rng.random(SHAPE) < 0.9, truth, rng.integers(0, 6, SHAPE))
    with h5py.File(folder / "given.h5", "w") as file:
        file.create_dataset("main", data=prediction.astype(np.uint8), chunks=(1, 16, 50), compression="gzip")
    with h5py.File(folder / "ids.h5", "w") as file:
        file.create_dataset("main", data=np.where(prediction > 0, prediction.astype(np.uint64) + 2**40, 0))
        file["mask"] = (np.arange(50) < 7).astype(np.uint8) * np.ones(SHAPE, np.uint8)
        file["short"] = np.zeros((5, 40, 49), np.uint8)
        file["several"] = np.zeros((2, *SHAPE), np.uint8)
    tifffile.imwrite(folder / "truth.tif", truth.astype(np.uint16))
    zarr.create_array(folder / "truth.zarr", data=truth.astype(np.int64), chunks=(2, 7, 11))
    np.save(folder / "arrays.npy", np.stack([prediction, truth]))
    return folder


def arrays(folder: Path) -> tuple[Any, Any]:
    prediction, truth = np.load(folder / "arrays.npy")
    return prediction, truth


def test_formats_types_chunks_and_pieces_do_not_matter(volumes: Path) -> None:
    table = Contingency.from_arrays(*arrays(volumes))
    expected = [side.tolist() for side in (table.prediction, table.truth, table.counts)]
    shapes: tuple[Vec3 | None, ...] = (None, (1, 40, 50), (2, 9, 13))
    for truth in ("truth.tif", "truth.zarr"):
        for shape in shapes:
            found = compare(Comparison("v", str(volumes / "given.h5"), str(volumes / truth)), shape)
            assert [side.tolist() for side in (found.prediction, found.truth, found.counts)] == expected


def test_objects_from_the_command_line(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--instances", f"{volumes}/ids.h5", f"{volumes}/truth.zarr", f"inference.data.output_path={tmp_path}"]
    words += ["--ignore", f"{volumes}/ids.h5::mask"]
    assert main(["evaluate", *words]) == 0
    printed = capsys.readouterr().out
    prediction, truth = (array[..., 7:] for array in arrays(volumes))
    error = adapted_rand_error(truth, prediction)[0]
    content = json.loads((tmp_path / "scores.json").read_text())
    found = content["pooled"]["instances"]
    assert found["arand"]["error"] == pytest.approx(error)
    assert content["pooled"]["voxels"] == truth.size
    assert (found["prediction_objects"], found["truth_objects"]) == (5, 4)
    assert f"{error:.4f}" in printed and "AP75" in printed
    assert printed.split()[-2:] == [f"{tmp_path}/ids_matches.parquet", f"{tmp_path}/scores.json"]
    rows = pyarrow.parquet.read_table(tmp_path / "ids_matches.parquet").to_pydict()
    best = {t: max(np.unique(prediction[truth == t]), key=lambda p: iou(prediction == p, truth == t)) for t in (1, 2)}
    for kind, p, t, value in zip(rows["kind"], rows["prediction"], rows["truth"], rows["iou"], strict=True):
        if t in best and kind == "matched":
            assert p == best[t] + 2**40
            assert value == pytest.approx(iou(prediction == best[t], truth == t))
    assert rows["kind"].count("matched") == 4
    assert min(rows["prediction"]) > 2**40


def iou(a: Any, b: Any) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_labels_as_json(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", f"{volumes}/given.h5", f"{volumes}/truth.tif", f"inference.data.output_path={tmp_path}"]
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    prediction, truth = arrays(volumes)
    assert list(content["pooled"]["labels"]) == ["background", *(f"label_{n}" for n in range(1, 6))]
    assert np.sum(content["pooled"]["confusion"]) == truth.size
    assert content["pooled"]["labels"]["label_2"]["tp"] == ((prediction == 2) & (truth == 2)).sum()
    assert content == json.loads((tmp_path / "scores.json").read_text())
    assert not list(tmp_path.glob("*_matches.*"))
    assert main([*words, "--json", "test.evaluation.foreground=true"]) == 0
    row = json.loads(capsys.readouterr().out)["pooled"]["labels"]["foreground"]
    assert row["iou"] == pytest.approx(iou(prediction > 0, truth > 0))
    assert main([*words, "test.evaluation.metrics=[dice,pq]", "test.evaluation.ignore_label=3"]) == 0
    printed = capsys.readouterr().out
    assert "label_1" in printed and "PQ" in printed
    assert json.loads((tmp_path / "scores.json").read_text())["pooled"]["voxels"] == (truth != 3).sum()


def test_the_script_takes_several_volumes_from_the_configuration(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--mode", "evaluate", f"inference.data.output_path={tmp_path}", "test.evaluation.metrics=[iou,f1]"]
    named = [
        f"test.data.test_prediction=[{volumes}/given.h5,{volumes}/truth.zarr]",
        f"test.data.test_label=[{volumes}/truth.tif,{volumes}/truth.tif]",
    ]
    assert script_main([*words, *named]) == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    one, other = content["volumes"].values()
    assert (one["labels"]["label_1"]["iou"] < 1, other["labels"]["label_1"]["iou"]) == (True, 1)
    both = content["pooled"]["instances"]
    assert both["truth_objects"] == one["instances"]["truth_objects"] + other["instances"]["truth_objects"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.json",
        "given_matches.parquet",
        "truth_matches.parquet",
    }
    capsys.readouterr()
    for more, finding in (
        ([named[0], f"test.data.test_label={volumes}/truth.tif"], "test.data.test_label names 1 volumes"),
        (["--checkpoint", "m", *named], "compared without a model"),
        ([named[0].replace("truth.zarr", "given.h5"), named[1]], "listed twice"),
    ):
        assert script_main([*words, *more]) == 2
        assert finding in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prediction", "truth", "more", "finding"),
    [
        (
            "given.h5",
            "ids.h5::short",
            [],
            "the truth has shape (c, z, y, x) (1, 5, 40, 49), the prediction",
        ),
        ("given.h5", "truth.tif", ["--ignore", "ids.h5::short"], "the mask of what to ignore has shape"),
        ("ids.h5::several", "ids.h5::several", [], "expected one channel of labels"),
        ("given.h5", "absent.h5", [], "no such file"),
    ],
)
def test_what_does_not_fit_is_named(
    volumes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prediction: str,
    truth: str,
    more: list[str],
    finding: str,
) -> None:
    monkeypatch.chdir(volumes)
    assert main(["evaluate", prediction, truth, *more, f"inference.data.output_path={tmp_path}"]) == 3
    assert finding in capsys.readouterr().out
    assert finding in json.loads((tmp_path / "scores.json").read_text())["failed"][prediction]


def test_ids_that_are_taken_for_labels_are_refused(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", f"{volumes}/ids.h5", f"{volumes}/truth.tif", f"inference.data.output_path={tmp_path}"]
    assert main(words) == 3
    assert "--instances" in capsys.readouterr().err


def test_without_pyarrow_matches_are_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: dict[str, Any] = {"kind": np.array(["matched"]), "prediction": np.array([2**40], np.uint64)}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = write_matches(columns, tmp_path, "cell")
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["kind", "prediction"], ["matched", str(2**40)]]
    with pytest.raises(OutputError, match="cannot write"):
        write_matches(columns, tmp_path / "absent", "cell")
