"""Semantic metrics against scikit-learn, against nnU-Net's own scores, and at the edges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from connectomics.config.schema import SEMANTIC_METRICS as METRICS
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.evaluate import contingency
from connectomics.evaluate.contingency import Contingency
from connectomics.evaluate.semantic import Confusion, labels_found, scores

NAMES = ["background", "membrane", "mito"]


def plain(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Classes of one label each."""
    return {name: (label,) for label, name in enumerate(names)}


def confusion_of(prediction: np.ndarray, truth: np.ndarray, classes: int) -> Confusion:
    return Confusion.of(Contingency.from_arrays(prediction, truth), classes)


def random_labels(seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (4, 9, 11), dtype=np.uint8)
    flips = rng.random(truth.shape) < 0.3
    return np.where(flips, rng.integers(0, classes, truth.shape, dtype=np.uint8), truth), truth


def test_counts_and_metrics_equal_scikit_learns() -> None:
    prediction, truth = random_labels(1)
    confusion = confusion_of(prediction, truth, 3)
    flat = (truth.ravel(), prediction.ravel())
    np.testing.assert_array_equal(confusion.counts, confusion_matrix(*flat))
    assert confusion.counts.dtype == np.int64
    result = scores(confusion, plain(NAMES), METRICS)
    theirs = {
        "dice": f1_score(*flat, average=None),
        "iou": jaccard_score(*flat, average=None),
        "precision": precision_score(*flat, average=None),
        "recall": recall_score(*flat, average=None),
    }
    for metric in METRICS:
        ours = [result["labels"][name][metric] for name in NAMES]
        np.testing.assert_allclose(ours, theirs[metric], rtol=1e-12)
        assert result["mean_foreground"][metric] == pytest.approx(theirs[metric][1:].mean())
    assert result["voxels"] == truth.size


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_blocks_add_up_to_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, truth = random_labels(2)
    whole = confusion_of(prediction, truth, 3)
    monkeypatch.setattr(contingency, "_PIECE", piece)
    total = Confusion.zero(3)
    for rows in (slice(5, 9), slice(0, 2), slice(2, 5)):
        total = total + confusion_of(prediction[:, rows], truth[:, rows], 3)
    np.testing.assert_array_equal(total.counts, whole.counts)


def test_scores_of_nnunets_predictions_are_nnunets_own(shared_data: Path) -> None:
    stated = json.loads((shared_data / "reference/vnc_multi_2d/scores.json").read_text())["foldall_mirror"]
    total = Confusion.zero(5)
    for section in range(12, 16):
        prediction = iio.imread(shared_data / f"reference/vnc_multi_2d/foldall_mirror/vnc_{section}.png")
        truth = iio.imread(shared_data / f"em/vnc/multi/{section}.png")
        total = total + confusion_of(prediction, truth, 5)
    result = scores(total, plain(stated), ["dice", "iou"])
    for name, row in stated.items():
        assert result["labels"][name] == pytest.approx(row, abs=1e-6), name


def test_regions_are_measured_as_nnunet_measures_them() -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

    prediction, truth = random_labels(3, 4)
    regions = {"whole": (1, 2, 3), "core": (3, 2), "twice": (1, 1)}
    result = scores(confusion_of(prediction, truth, 4), {"background": (0,)} | regions, ["dice"])
    for name, region in regions.items():
        masks = (region_or_label_to_mask(labels, region) for labels in (truth, prediction))
        tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks)
        row = result["labels"][name]
        assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
    means = [result["labels"][name]["dice"] for name in regions]
    assert result["mean_foreground"]["dice"] == pytest.approx(np.mean(means))


def test_undefined_values_are_null_and_left_out_of_means() -> None:
    truth = np.array([0, 0, 1, 1], np.uint8)
    prediction = np.array([0, 3, 1, 0], np.uint8)
    result = scores(confusion_of(prediction, truth, 4), plain(["bg", "a", "absent", "invented"]), METRICS)
    absent, invented = result["labels"]["absent"], result["labels"]["invented"]
    assert [absent[metric] for metric in METRICS] == [None] * 4
    assert [invented[metric] for metric in METRICS] == [0.0, 0.0, 0.0, None]
    assert result["mean_foreground"]["recall"] == 0.5
    assert result["mean_foreground"]["dice"] == pytest.approx((2 / 3 + 0) / 2)
    assert "NaN" not in json.dumps(result) and json.loads(json.dumps(result)) == result


def test_no_voxels_have_no_scores() -> None:
    result = scores(Confusion.zero(2), plain(["bg", "a"]), ["dice"])
    assert result["mean_foreground"] == {"dice": None}
    assert result["voxels"] == 0


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.uint64, np.float32])
def test_any_dtype_of_whole_numbers_is_read(dtype: type) -> None:
    truth = np.array([[0, 1], [1, 0]]).astype(dtype)
    confusion = confusion_of(np.array([[0, 1], [0, 0]], np.uint8), truth, 2)
    np.testing.assert_array_equal(confusion.counts, [[2, 0], [1, 1]])


@pytest.mark.parametrize(
    ("truth", "listed"),
    [
        (np.array([0, 255, 7], np.uint8), "7, 255; expected 0 to 1"),
        (np.array([0, np.inf, 1], np.float32), "inf"),
        (np.array([0, -1, 1], np.int32), "-1"),
        (np.array([0, 0.5, 1], np.float32), "0.5"),
        (np.array([0, np.nan, 1], np.float32), "nan"),
        (np.array([2**63 + 1, 0, 1], np.uint64), str(2**63 + 1)),
    ],
)
def test_values_that_are_no_label_are_listed(truth: np.ndarray, listed: str) -> None:
    with pytest.raises(VolumeError, match="truth") as caught:
        confusion_of(np.zeros(3, np.uint8), truth, 2)
    assert listed in str(caught.value) and "\n" not in str(caught.value)


def test_many_strange_values_are_cut_short_and_the_prediction_is_checked_too() -> None:
    with pytest.raises(VolumeError, match=r"prediction holds .* 11 and 38 more"):
        confusion_of(np.arange(50), np.zeros(50, np.uint8), 2)


def test_shapes_must_agree() -> None:
    with pytest.raises(VolumeError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion_of(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


@pytest.mark.parametrize(
    "counts",
    [np.zeros((2, 3), np.int64), np.zeros((2, 2)), np.zeros(4, np.int64), -np.ones((2, 2), np.int64)],
)
def test_a_confusion_is_a_square_of_counts(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="int64 counts"):
        Confusion(counts)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="'auc'"):
        scores(Confusion.zero(2), plain(["bg", "a"]), ["dice", "auc"])
    with pytest.raises(ValueError, match="2 labels were counted"):
        scores(Confusion.zero(2), {"bg": (0,), "a": (1, 2)}, ["dice"])
    with pytest.raises(ValueError, match="2 and 3 labels"):
        Confusion.zero(2) + Confusion.zero(3)


def test_ids_of_objects_are_no_classes() -> None:
    few = Contingency.from_arrays(np.array([0, 3]), np.array([0, 7]))
    assert labels_found([few, Contingency.empty()]) == 8
    assert labels_found([Contingency.empty()]) == 2
    with pytest.raises(VolumeError, match=r"up to 1099511627776.*--instances"):
        labels_found([few, Contingency.from_arrays(np.array([0, 2**40]), np.array([0, 1]))])


def test_the_confusion_is_among_the_scores() -> None:
    prediction, truth = random_labels(4)
    found = scores(confusion_of(prediction, truth, 3), plain(NAMES), ["dice"])["confusion"]
    assert found == confusion_matrix(truth.ravel(), prediction.ravel()).tolist()
