"""--mode test: scores of files on disk against independent numbers; the demo's own account."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from skimage import measure
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.volumes import named_sources
from connectomics.cli import main
from connectomics.commands import demo
from connectomics.commands.evaluate import (
    Labelling,
    check_known_answers,
    evaluate_outcomes,
    evaluate_volumes,
    score_table,
)
from connectomics.config.load import load_config
from connectomics.config.schema import Config, EvaluationConfig
from connectomics.core.errors import ConfigError, ConnectomicsError
from connectomics.evaluate.comparison import Comparison
from connectomics.jobs.outcome import NullObserver, VolumeOutcome
from connectomics.lightning.inference import VolumeProcessor

from nnunet_models import make_model
from parity_table import scene


def listed(*paths: str) -> str:
    return "[" + ",".join(f"'{path}'" for path in paths) + "]"


def known_answers(images: Sequence[str], truths: Sequence[str], folder: Path, *words: str) -> Config:
    """A configuration of ``--mode test``."""
    return load_config(
        None,
        [
            "system.device=cpu",
            "system.num_cpus=1",
            f"inference.data.output_path={folder}",
            f"test.data.test_image={listed(*images)}",
            f"test.data.test_label={listed(*truths)}",
            *words,
        ],
    )


def h5(path: Path, array: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        file["main"] = array
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dimensions=2, patch=(16, 24), classes=3, seed=2)


def test_scores_are_scikit_learns(model: Path, tmp_path: Path) -> None:
    uris, truths = [], []
    for i in range(2):
        image, classes = scene(1, (2, 40, 51), i)
        uris.append(h5(tmp_path / f"image{i}.h5", (image[0] * 255).astype(np.uint8)))
        truths.append(h5(tmp_path / f"truth{i}.h5", classes.astype(np.uint8)))
    config = known_answers(uris, truths, tmp_path / "out")
    engine = build_engine(config, model)
    outcomes = VolumeProcessor(config, engine).run(named_sources(uris, 1))
    result = evaluate_outcomes(config.test, engine, outcomes)
    given, true = [], []
    for outcome, truth in zip(outcomes, truths, strict=True):
        with h5py.File(outcome.paths[0]) as a, h5py.File(truth) as b:
            given.append(a["main"][:].ravel())
            true.append(b["main"][:].ravel())
    y, p = np.concatenate(true), np.concatenate(given)
    pooled = result.pooled["labels"]
    known = {"dice": f1_score, "iou": jaccard_score, "precision": precision_score, "recall": recall_score}
    for metric, function in known.items():
        expected = function(y, p, labels=[1, 2], average=None, zero_division=0)
        for label, value in zip(("label_1", "label_2"), expected, strict=True):
            assert (pooled[label][metric] or 0) == pytest.approx(value)
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert saved["pooled"] == json.loads(json.dumps(result.pooled))
    assert list(saved["volumes"]) == uris
    table = score_table(result)
    assert "label_2" in table
    assert f"{pooled['label_1']['dice']:.4f}" in table


def test_what_cannot_be_measured_is_named_and_the_rest_is(model: Path, tmp_path: Path) -> None:
    labels = h5(tmp_path / "labels.h5", np.ones((2, 8, 9), np.uint8))
    other = h5(tmp_path / "other.h5", np.ones((2, 8, 8), np.uint8))
    config = known_answers(["a", "b", "c"], [labels, labels, other], tmp_path)
    engine = build_engine(config, model)
    outcomes = [
        VolumeOutcome("a", "done", paths=(Path(labels),)),
        VolumeOutcome("b", "failed", "broken"),
        VolumeOutcome("c", "skipped", paths=(Path(labels),)),
    ]
    result = evaluate_outcomes(config.test, engine, outcomes)
    assert list(result.volumes) == ["a"]
    assert "has shape" in result.failures["c"]
    assert "not measured: c" in score_table(result)
    assert result.volumes["a"]["labels"]["label_1"]["dice"] == 1.0
    with pytest.raises(ConfigError, match=r"names 3 volumes, test.data.test_image 1; state one volume for each image"):
        check_known_answers(config.test, named_sources([labels], 1), decodes=False)
    objects = known_answers([labels], [labels], tmp_path, "test.evaluation.metrics=[dice,pq]")
    with pytest.raises(ConfigError, match=r"test\.data\.test_instances"):
        check_known_answers(objects.test, named_sources([labels], 1), decodes=False)


def test_decoded_objects_are_compared_with_true_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two runs with other blocks and formats; the numbers are those of ``evaluate`` on the files."""
    model = make_model(tmp_path / "model", dimensions=2, patch=(16, 24), classes=2, seed=2)
    image, classes = scene(1, (2, 40, 51), 0)
    volume = h5(tmp_path / "v.h5", (image[0] * 255).astype(np.uint8))
    truth = h5(tmp_path / "truth.h5", measure.label(classes > 0).astype(np.uint32))
    for form, block in (("h5", "[2,40,51]"), ("zarr", "[1,20,26]")):
        out = tmp_path / form
        words = [
            *("system.device=cpu", "system.num_cpus=1", f"inference.data.output_path={out}"),
            *(f"test.data.test_image={volume}", f"test.data.test_label={truth}", f"test.data.test_instances={truth}"),
            *("test.evaluation.metrics=[dice,ap,pq]", "decoding=[{name: connected_components, connectivity: 26}]"),
            *(f"inference.output.formats=[{form}]", f"inference.block_shape={block}"),
        ]
        assert main(["test", "--checkpoint", str(model), *words]) == 0
        scores = json.loads((out / "scores.json").read_text())["pooled"]
        alone = f"inference.data.output_path={tmp_path / (form + '_alone')}"
        assert main(["evaluate", str(out / f"v_labels_instances.{form}"), truth, "--instances", alone]) == 0
        expected = json.loads((tmp_path / f"{form}_alone" / "scores.json").read_text())["pooled"]
        assert {"ap", "pq"} <= set(scores["instances"])
        assert {key: expected["instances"][key] for key in scores["instances"]} == scores["instances"]
        assert 0 < scores["labels"]["label_1"]["dice"] < 1
    assert "v_labels_instances" in capsys.readouterr().out


def confusion(folder: Path, prediction: str, truth: str, count: int, ignored: int | None = None) -> object:
    """The confusion matrix that is found, or why there is none."""
    names = {str(n): (n,) for n in range(count)}
    labelling = Labelling(names, count, ignored)
    result = evaluate_volumes(folder, EvaluationConfig(), [Comparison("v", prediction, truth)], labelling)
    return result.failures["v"] if result.failures else result.volumes["v"]["confusion"]


def test_a_mask_of_two_classes_may_be_0_255_but_more_classes_must_be_labels(tmp_path: Path) -> None:
    mask = np.zeros((3, 20, 30), np.uint8)
    mask[:, 5:9] = 255
    prediction = h5(tmp_path / "p.h5", (mask > 0).astype(np.uint8))
    truth = h5(tmp_path / "t.h5", mask)
    assert confusion(tmp_path, prediction, truth, 2) == [[mask.size - 3 * 4 * 30, 0], [0, 3 * 4 * 30]]
    assert "255" in confusion(tmp_path, prediction, truth, 3)


def test_regions_are_scored_and_ignored_voxels_are_left_out(tmp_path: Path) -> None:
    labels: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    folder = make_model(tmp_path, dimensions=2, patch=(16, 24), labels=labels, regions_class_order=[1, 2])
    truth = np.array([[[0, 1, 2, 2, 3, 3, 0, 1]]], np.uint8)
    given = np.array([[[0, 2, 1, 2, 1, 0, 1, 1]]], np.uint8)
    outcome = VolumeOutcome("a", "done", paths=(Path(h5(tmp_path / "given.h5", given)),))
    config = known_answers(["a"], [h5(tmp_path / "truth.h5", truth)], tmp_path)
    result = evaluate_outcomes(config.test, build_engine(config, folder), [outcome])
    assert result.pooled["voxels"] == 6
    rows = result.pooled["labels"]
    assert list(rows) == ["background", "whole", "core"]
    assert [rows["whole"][n] for n in ("tp", "fp", "fn")] == [4, 1, 0]
    assert [rows["core"][n] for n in ("tp", "fp", "fn")] == [1, 1, 1]


def test_ignored_voxels_of_a_binary_truth_are_no_foreground(tmp_path: Path) -> None:
    given = h5(tmp_path / "given.h5", np.array([[[0, 1, 1, 0]]], np.uint8))
    truth = h5(tmp_path / "truth.h5", np.array([[[0, 1, 2, 2]]], np.uint8))
    assert confusion(tmp_path, given, truth, 2, 2) == [[1, 0], [0, 1]]


def test_the_demo_tells_what_it_made_or_that_it_is_not_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a piece of a section; ``make demo``, which .ci/run calls, ends with an exit code of its own likewise."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(demo, "VOLUME", "phantom:1x96x128?seed=7")
    monkeypatch.setattr(demo, "TRUTH", "phantom:1x96x128?seed=7&what=label")
    monkeypatch.setattr(demo, "SHOWN_SECTION", 0)
    monkeypatch.setattr(demo, "PROMISED_DICE", 0.5)
    assert demo.run_demo(tmp_path, NullObserver())[0].startswith("done")
    assert (tmp_path / "montage.png").exists()
    dice = json.loads((tmp_path / "scores.json").read_text())["pooled"]["labels"]["mitochondrion"]["dice"]
    monkeypatch.setattr(demo, "PROMISED_DICE", dice)
    assert demo.run_demo(tmp_path, NullObserver())[0].startswith("skipped")
    monkeypatch.setattr(demo, "PROMISED_DICE", np.nextafter(dice, 2))
    assert main(["demo", "--output", str(tmp_path)]) == 3
    assert f"the Dice of mitochondrion is {dice}" in capsys.readouterr().err
    monkeypatch.setattr(demo, "VOLUME", "phantom:0x1x1")
    with pytest.raises(ConnectomicsError, match="phantom"):
        demo.run_demo(tmp_path, NullObserver())


@pytest.mark.long
def test_the_demo_labels_its_phantom_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "VOLUME", "phantom:5x256x320?seed=7")
    monkeypatch.setattr(demo, "TRUTH", "phantom:5x256x320?seed=7&what=label")
    lines = demo.run_demo(tmp_path, NullObserver())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["pooled"]["labels"]["mitochondrion"]["dice"] > 0.9
    assert (tmp_path / "montage.png").exists()
    assert any("montage.png" in line for line in lines)
    assert demo.run_demo(tmp_path, NullObserver())[0].startswith("skipped")
    labels = tmp_path / "phantom_5x256x320_seed_7_labels.h5"
    made = labels.read_bytes()
    labels.write_text("of another version of this program")
    assert demo.run_demo(tmp_path, NullObserver())[0].startswith("done")
    assert labels.read_bytes() == made
    monkeypatch.setattr(demo, "VOLUME", "phantom:0x1x1")
    with pytest.raises(ConnectomicsError, match="phantom"):
        demo.run_demo(tmp_path, NullObserver())
