"""Scores of objects against scikit-image, scipy and the definitions with masks, on many random pairs; and the edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.stats import entropy
from skimage.metrics import adapted_rand_error, variation_of_information
from sklearn.metrics import homogeneity_completeness_v_measure

from connectomics.config import schema
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.evaluate.contingency import Contingency, side_by_side
from connectomics.evaluate.instances import INSTANCE_METRICS, instance_scores
from connectomics.evaluate.pairs import ObjectPairs, match_table

Ids = npt.NDArray[Any]
PAIRS = 120


def random_pair(seed: int) -> tuple[Ids, Ids]:
    """Blobs as truth; the prediction merges, splits, loses, moves and invents some of them."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(6, 14, 3)) if seed % 3 else (1, 24, 24)
    smooth = ndimage.gaussian_filter(rng.random(shape), rng.uniform(0.6, 1.3))
    truth, count = ndimage.label(smooth > np.quantile(smooth, rng.uniform(0.4, 0.8)))
    given = np.roll(truth, int(rng.integers(0, 2)), axis=2) if seed % 2 else truth.copy()
    for n in range(1, count + 1):
        if rng.random() < 0.15:
            given[given == n] = rng.integers(0, count + 1)
    halves = rng.random() < 0.5
    given = np.where((given > 0) & halves & (np.arange(shape[2]) > shape[2] // 2), given + count, given)
    noise = rng.random(shape) < rng.choice([0, 0.02, 0.2])
    return np.where(noise, rng.integers(0, 2 * count + 2, shape), given), truth


def by_masks(given: Ids, true: Ids, threshold: float, ranking: Mapping[int, float]) -> dict[str, float | None]:
    """From the definitions: a mask an object, an optimal assignment, precision and recall one prediction at a time."""
    predicted, objects = (np.unique(side[side > 0]).tolist() for side in (given, true))
    iou = np.zeros((len(predicted), len(objects)))
    for i, p in enumerate(predicted):
        for j, t in enumerate(objects):
            iou[i, j] = ((given == p) & (true == t)).sum() / ((given == p) | (true == t)).sum()
    good = iou >= threshold
    rows, columns = linear_sum_assignment(good + iou / (1 + min(iou.shape, default=0)), maximize=True)
    pairs = [(i, j) for i, j in zip(rows, columns, strict=True) if good[i, j]]
    tp, fp, fn = len(pairs), len(predicted) - len(pairs), len(objects) - len(pairs)
    quality = sum(iou[i, j] for i, j in pairs)
    hits = {predicted[i] for i, _ in pairs}
    curve, found = [], 0
    for rank, p in enumerate(sorted(predicted, key=lambda n: (-ranking[n], n)), start=1):
        found += p in hits
        curve.append((found, found / rank))
    precisions = [max((y for x, y in curve if 100 * x >= r * len(objects)), default=0) for r in range(101)]
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "f1": tp / (tp + (fp + fn) / 2) if tp + fp + fn else None,
        "accuracy": tp / (tp + fp + fn) if tp + fp + fn else None,
        "pq": quality / (tp + (fp + fn) / 2) if tp + fp + fn else None,
        "sq": quality / tp if tp else None,
        "ap": sum(precisions) / 101 if objects else None,
    }


def near(value: float | None) -> Any:
    return pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", range(PAIRS))
def test_scores_equal_independent_ones(seed: int) -> None:
    given, true = random_pair(seed)
    sizes = {int(n): float((given == n).sum()) for n in np.unique(given)}
    found = instance_scores(Contingency.from_arrays(given, true))
    for name in ("50", "75"):
        expected = by_masks(given, true, int(name) / 100, sizes)
        assert found[f"ap{name}"] == near(expected["ap"])
        for key in ("tp", "fp", "fn", "f1", "accuracy"):
            assert found["matched"][name][key] == near(expected[key]), key
        if name == "50":
            assert (found["pq"], found["sq"]) == (near(expected["pq"]), near(expected["sq"]))
            assert found["rq"] == found["matched"]["50"]["f1"]
    if seed % 6 == 0:
        averaged = [by_masks(given, true, k / 20, sizes)["ap"] for k in range(10, 20)]
        assert found["ap"] == near(np.mean([value for value in averaged if value is not None]))
    split, merge = variation_of_information(true, given, ignore_labels=(0,))
    assert found["voi"] == {"split": near(split), "merge": near(merge)}
    split, merge = variation_of_information(true, given)
    assert found["voi_all_voxels"] == {"split": near(split), "merge": near(merge)}
    error, recall, precision = adapted_rand_error(true, given)  # it divides by the pairs of its first array first
    assert found["arand"] == {"error": near(error), "precision": near(precision), "recall": near(recall)}
    homogeneity, completeness, _ = homogeneity_completeness_v_measure(true.ravel(), given.ravel())
    bits = [entropy(np.unique(side, return_counts=True)[1], base=2) for side in (true, given)]
    assert found["voi_all_voxels"]["merge"] == pytest.approx((1 - homogeneity) * bits[0], abs=1e-9)
    assert found["voi_all_voxels"]["split"] == pytest.approx((1 - completeness) * bits[1], abs=1e-9)


def test_the_random_pairs_are_of_every_kind() -> None:
    """Else equality would prove little: perfect and poor ones, exact halves, splits and merges."""
    found = [instance_scores(Contingency.from_arrays(*random_pair(seed))) for seed in range(PAIRS)]
    f1 = [entry["matched"]["50"]["f1"] for entry in found]
    assert min(f1) < 0.3 and max(f1) == 1
    assert sum(0.3 < value < 0.95 for value in f1) > PAIRS // 4
    assert sum(entry["matched"]["75"]["tp"] < entry["matched"]["50"]["tp"] for entry in found) > PAIRS // 4
    assert sum(entry["ap50"] not in (0, 1) for entry in found) > PAIRS // 2


def test_confidences_rank_the_objects() -> None:
    true = np.array([1, 1, 1, 0, 2, 2, 0, 0])
    given = np.array([1, 1, 1, 0, 2, 2, 3, 3])
    table = Contingency.from_arrays(given, true)
    surest_is_wrong = {3: 0.9, 1: 0.8, 2: 0.7}
    assert instance_scores(table, ["ap"], surest_is_wrong)["ap50"] == near(2 / 3)
    assert instance_scores(table, ["ap"], {1: 0.9, 2: 0.8, 3: 0.7})["ap50"] == 1
    assert instance_scores(table, ["ap"], dict.fromkeys((1, 2, 3), 0.5))["ap50"] == 1  # equal ones by id
    assert by_masks(given, true, 0.5, surest_is_wrong)["ap"] == near(2 / 3)
    with pytest.raises(VolumeError, match="1 predicted objects have no confidence, the first of them is 3"):
        instance_scores(table, ["ap"], {1: 1.0, 2: 1.0})


def test_two_halves_of_an_object_match_it_once() -> None:
    one, halves = np.array([7, 7, 7, 7, 0]), np.array([1, 1, 2, 2, 0])
    for given, true, place in ((halves, one, 0), (one, halves, 0)):
        overlaps = ObjectPairs.of(Contingency.from_arrays(given, true))
        assert overlaps.matches().tolist() == [place]
        assert overlaps.matches(11).size == 0
    with pytest.raises(ValueError, match=r"from an IoU of 0\.5 on"):
        overlaps.matches(9)


def test_sizes_are_scored_apart_as_coco_does() -> None:
    true = np.repeat([1, 0, 2, 0, 0], [10, 2, 100, 2, 30])
    given = np.repeat([1, 0, 2, 0, 3, 0], [10, 2, 100, 2, 5, 25])  # 3 is a small false positive
    rows = instance_scores(Contingency.from_arrays(given, true), ["ap"], {1: 0.1, 2: 0.2, 3: 0.3}, [10, 50])[
        "ap_by_size"
    ]
    assert [(row["above_voxels"], row["up_to_voxels"], row["truth_objects"]) for row in rows] == [
        (0, 10, 1),
        (10, 50, 0),
        (50, None, 1),
    ]
    assert [row["ap50"] for row in rows] == [0.5, None, 1.0]


def test_edges() -> None:
    some, none = np.array([0, 1, 1, 2]), np.zeros(4, int)
    same = instance_scores(Contingency.from_arrays(some, some))
    assert (same["ap"], same["pq"], same["arand"]["error"]) == (1, 1, 0)
    assert same["voi"] == same["voi_all_voxels"] == {"split": 0, "merge": 0}
    nothing_found = instance_scores(Contingency.from_arrays(none, some))
    assert (nothing_found["ap50"], nothing_found["pq"], nothing_found["sq"]) == (0, 0, None)
    assert nothing_found["matched"]["50"] == {
        "tp": 0,
        "fp": 0,
        "fn": 2,
        "precision": None,
        "recall": 0,
        "f1": 0,
        "accuracy": 0,
    }
    nothing_there = instance_scores(Contingency.from_arrays(some, none))
    assert (nothing_there["ap50"], nothing_there["pq"]) == (None, 0)
    assert nothing_there["voi"] == {"split": None, "merge": None}
    assert nothing_there["arand"]["error"] is None
    assert nothing_there["matched"]["50"]["recall"] is None
    empty = instance_scores(Contingency.empty())
    assert (empty["ap"], empty["pq"], empty["voi_all_voxels"]["merge"]) == (None, None, None)
    with pytest.raises(ConfigError, match="'auc'"):
        instance_scores(Contingency.empty(), ["auc"])


def test_the_configuration_knows_the_metrics() -> None:
    assert schema.INSTANCE_METRICS == INSTANCE_METRICS
    assert set(instance_scores(Contingency.empty(), ["pq"])) == {
        "prediction_objects",
        "truth_objects",
        "pq",
        "sq",
        "rq",
    }


def test_large_ids_are_scored_as_small_ones() -> None:
    given, true = random_pair(5)
    small = Contingency.from_arrays(given, true)
    large = Contingency.from_arrays(
        np.where(given > 0, given + 2**40, 0), np.where(true > 0, true.astype(np.uint64) + np.uint64(2**63), 0)
    )
    assert instance_scores(large) == instance_scores(small)
    assert int(large.truth.max()) == 2**63 + int(true.max())


def test_volumes_beside_each_other_share_no_objects() -> None:
    pairs = [random_pair(seed) for seed in (4, 8, 10)]
    tables = [Contingency.from_arrays(*pair) for pair in pairs]
    shifted: list[list[Ids]] = [[], []]
    for i, pair in enumerate(pairs):
        for side, array in zip(shifted, pair, strict=True):
            side.append(np.where(array > 0, array + 10_000 * i, 0).ravel())
    whole = Contingency.from_arrays(np.concatenate(shifted[0]), np.concatenate(shifted[1]))
    assert instance_scores(side_by_side(tables)) == instance_scores(whole)


def test_the_table_of_matches_names_every_object_once() -> None:
    given, true = random_pair(18)
    rows = match_table(ObjectPairs.of(Contingency.from_arrays(given, true)))
    counts = instance_scores(Contingency.from_arrays(given, true), ["f1"])["matched"]["50"]
    kinds = rows["kind"].tolist()
    assert [kinds.count(kind) for kind in ("matched", "false positive", "false negative")] == [
        counts["tp"],
        counts["fp"],
        counts["fn"],
    ]
    assert min(counts["tp"], counts["fp"], counts["fn"]) > 0
    for kind, p, t, shared, iou, of_p, of_t in zip(*(column.tolist() for column in rows.values()), strict=True):
        a, b = (given == p) & (p > 0), (true == t) & (t > 0)
        assert (shared, of_p, of_t) == ((a & b).sum(), a.sum(), b.sum())
        assert iou == pytest.approx((a & b).sum() / (a | b).sum())
        assert (iou >= 0.5) == (kind == "matched")
        if kind == "false positive":
            others = [
                ((given == p) & (true == n)).sum() / ((given == p) | (true == n)).sum() for n in np.unique(true) if n
            ]
            assert iou == pytest.approx(max(others))
    predicted = rows["prediction"][np.isin(rows["kind"], ["matched", "false positive"])]
    objects = rows["truth"][np.isin(rows["kind"], ["matched", "false negative"])]
    assert sorted(predicted.tolist()) == np.unique(given[given > 0]).tolist()
    assert sorted(objects.tolist()) == np.unique(true[true > 0]).tolist()
