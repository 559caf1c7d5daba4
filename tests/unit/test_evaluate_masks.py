"""``evaluate`` and masks: 0/255, ids against a mask, many classes, and the memory that pairs of ids may take."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from connectomics.cli import main
from connectomics.core.errors import ResourceError
from connectomics.evaluate.comparison import Comparison, compare
from connectomics.evaluate.contingency import Contingency
from connectomics.evaluate.masks import foregrounds

from decoding import whole_components
from small_jobs import em_like, write_h5

SEEN = em_like((4, 24, 32)) > 140
GIVEN = em_like((4, 24, 32), seed=1) + 30 * SEEN > 140
SPOTS = np.zeros(SEEN.shape, np.uint8)
SPOTS[::2, 1::4, 2::5] = SPOTS[::2, 1::4, 3::5] = 255
IDS = whole_components(SPOTS, 26).astype(np.uint32)


def evaluated(folder: Path, prediction: Any, truth: Any, *more: str) -> int:
    write_h5(folder / "p.h5", prediction)
    write_h5(folder / "t.h5", truth)
    return main(["evaluate", f"{folder}/p.h5", f"{folder}/t.h5", f"inference.data.output_path={folder}/out", *more])


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 7), (1, 2), (3, 200), (0, 65535)])
@pytest.mark.parametrize("given", [1, 255, 9])
def test_a_truth_of_two_values_is_foreground_whatever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], low: int, high: int, given: int
) -> None:
    truth = np.where(SEEN, high, low).astype(np.uint16)
    assert evaluated(tmp_path, GIVEN.astype(np.uint16) * given, truth) == 0
    printed = capsys.readouterr().out
    assert printed.count("is a mask of the values") == 1 and f"t.h5: is a mask of the values {low}, {high};" in printed
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(content["pooled"]["labels"]) == ["background", "label_1"]
    expected = f1_score(SEEN.ravel(), GIVEN.ravel())
    assert content["pooled"]["labels"]["label_1"]["dice"] == pytest.approx(expected)
    assert len(content["notes"]) == 1


def test_labels_stay_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a volume lacks some of them, as a truth of 0 and 1 does beside a prediction of three."""
    for prediction, truth in (
        ((0, 1), (0, 1)),
        ((0, 1, 2), (0, 1)),
        ((0, 1, 2), (0, 2)),
        ((0,), (0, 1)),
        ((0, 1), (0,)),
    ):
        tables = {
            "v": Contingency.from_arrays(np.resize(np.array(prediction), 60), np.repeat(np.array(truth), 60)[:60])
        }
        assert foregrounds(tables) == {}
    both = {"a": Contingency.from_arrays(np.array([0, 1]), np.array([0, 255]))}
    both["b"] = Contingency.from_arrays(np.array([0, 1]), np.array([0, 1]))
    assert list(foregrounds(both)) == ["a"]
    assert evaluated(tmp_path, GIVEN.astype(np.uint8), SEEN.astype(np.uint8)) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--instances"]])
@pytest.mark.parametrize("turned", [False, True])
def test_ids_against_a_mask_are_refused_and_the_command_makes_them_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], turned: bool
) -> None:
    assert IDS.max() > 32
    assert evaluated(tmp_path, *((SPOTS, IDS) if turned else (IDS, SPOTS)), *more) == 3
    (finding,) = json.loads((tmp_path / "out" / "scores.json").read_text())["failed"].values()
    command = re.search(r"connectomics (decode .*), and compare (\S+) with --instances", finding)
    assert command is not None
    capsys.readouterr()
    assert main(shlex.split(command[1])) == 0
    ids = tmp_path / ("t.h5" if turned else "p.h5")
    output = f"inference.data.output_path={tmp_path}/out"
    assert main(["evaluate", str(ids), command[2], "--instances", "--json", output]) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["pooled"]["instances"]
    assert (found["pq"], found["truth_objects"]) == (1.0, IDS.max())
    assert evaluated(tmp_path, IDS, SPOTS, "test.evaluation.foreground=true") == 0


def test_one_true_object_is_no_mask(tmp_path: Path) -> None:
    one = np.zeros((4, 24, 32), np.uint8)
    one[1:3, 4:20, 4:28] = 1
    halves = one.astype(np.uint32)
    halves[:, :, 16:] *= 2
    assert evaluated(tmp_path, halves, one, "--instances") == 0


def test_tables_of_many_classes_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = (np.arange(4 * 24 * 32).reshape(4, 24, 32) % 400).astype(np.uint16)
    labels[labels == 7] = 0
    assert evaluated(tmp_path, labels, labels) == 0
    printed = capsys.readouterr().out
    assert printed.count(" label_") == 2 * 32 and "and 366 more classes, see scores.json" in printed
    pooled = json.loads((tmp_path / "out" / "scores.json").read_text())["pooled"]
    assert len(pooled["labels"]) == 399 and "label_7" not in pooled["labels"]
    assert (pooled["confusion"], pooled["mean_foreground"]["dice"]) == (None, 1.0)


def test_the_memory_budget_bounds_pairs_of_ids(tmp_path: Path) -> None:
    ids = np.arange(4 * 24 * 32, dtype=np.uint32).reshape(4, 24, 32)
    job = Comparison("v", str(write_h5(tmp_path / "p.h5", ids)), str(write_h5(tmp_path / "t.h5", ids // 2)))
    with pytest.raises(ResourceError, match=r"more than 3071 pairs .* raise system\.memory_budget_gb"):
        compare(job, most_pairs=3071)
    assert compare(job, most_pairs=3072).counts.size == 3072
    assert evaluated(tmp_path, ids, ids // 2, "--instances", "system.memory_budget_gb=0.01") == 3
    (finding,) = json.loads((tmp_path / "out" / "scores.json").read_text())["failed"].values()
    assert "which the memory budget does not hold" in finding
