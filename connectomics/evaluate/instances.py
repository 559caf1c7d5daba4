"""Scores of objects: average precision, F1, panoptic quality, variation of information, adapted Rand error.

All from one ``Contingency``; id 0 is background. Definitions are in docs/nnunet_integration.md, "Scores".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import ConfigError, VolumeError
from connectomics.evaluate.contingency import Contingency
from connectomics.evaluate.pairs import LEAST, TWENTIETHS, ObjectPairs, Places, Reals

INSTANCE_METRICS = ("ap", "f1", "pq", "voi", "arand")
_THRESHOLDS = range(LEAST, TWENTIETHS)  # 0.5, 0.55, … 0.95
_NAMED = {"50": 10, "75": 15}
_RECALLS = 100  # precision is read off at recalls 0, 0.01, … 1


def instance_scores(
    table: Contingency,
    metrics: Sequence[str] = INSTANCE_METRICS,
    confidences: Mapping[int, float] | None = None,
    size_bounds: Sequence[int] = (),
) -> dict[str, Any]:
    """Scores of predicted objects, ready for JSON; what is undefined is None.

    Parameters
    ----------
    table
        Counts of the whole volume.
    metrics
        Any of ap, f1, pq, voi, arand.
    confidences
        For average precision: id of each predicted object and how sure it is. None: objects are ranked by their size,
        the largest first. Equal ones are ranked by id.
    size_bounds
        Voxels, ascending; average precision is also given for true objects up to the first bound, from there to the
        second, and so on.

    Raises
    ------
    ConfigError
        If a metric is unknown.
    VolumeError
        If an object has no confidence.
    """
    for metric in metrics:
        if metric not in INSTANCE_METRICS:
            raise ConfigError(f"unknown metric {metric!r}; known are {', '.join(INSTANCE_METRICS)}")
    overlaps = ObjectPairs.of(table)
    result: dict[str, Any] = {
        "prediction_objects": int(overlaps.prediction.size),
        "truth_objects": int(overlaps.truth.size),
    }
    if "ap" in metrics:
        rank = _rank(overlaps, confidences)
        result |= _precisions(overlaps, rank, 0, None)
        result |= {"ap_by_size": _by_size(overlaps, rank, size_bounds)} if size_bounds else {}
    if "f1" in metrics:
        result["matched"] = {name: _counts(overlaps, n) for name, n in _NAMED.items()}
    if "pq" in metrics:
        result |= _panoptic(overlaps)
    if "voi" in metrics:
        result["voi"] = _voi(table.without_truth(0))
        result["voi_all_voxels"] = _voi(table)
    if "arand" in metrics:
        result["arand"] = _adapted_rand(table.without_truth(0))
    return result


def _rank(overlaps: ObjectPairs, confidences: Mapping[int, float] | None) -> Places:
    """Places of the predicted objects, the surest first."""
    if confidences is None:
        return np.argsort(-overlaps.prediction_voxels, kind="stable")
    lacking = [n for n in overlaps.prediction.tolist() if n not in confidences]
    if lacking:
        raise VolumeError(
            f"{len(lacking)} predicted objects have no confidence, the first of them is {lacking[0]}; give one for "
            "each id of the prediction"
        )
    values = np.array([confidences[n] for n in overlaps.prediction.tolist()], np.float64)
    return np.argsort(-values, kind="stable")


def _by_size(overlaps: ObjectPairs, rank: Places, bounds: Sequence[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for low, high in zip([0, *bounds], [*bounds, None], strict=True):
        inside = _inside(overlaps.truth_voxels, low, high)
        rows.append({"above_voxels": low, "up_to_voxels": high, "truth_objects": int(inside.sum())})
        rows[-1] |= _precisions(overlaps, rank, low, high)
    return rows


def _inside(voxels: npt.NDArray[np.int64], low: int, high: int | None) -> npt.NDArray[np.bool_]:
    return (voxels > low) & (voxels <= (np.iinfo(np.int64).max if high is None else high))


def _precisions(overlaps: ObjectPairs, rank: Places, low: int, high: int | None) -> dict[str, float | None]:
    """AP at 0.5 and 0.75, and the mean over 0.5, 0.55, … 0.95, of true objects of a range of sizes.

    As COCO does, matches with true objects outside the range do not count, nor do unmatched predictions outside it.
    """
    inside = _inside(overlaps.truth_voxels, low, high)
    truths = int(inside.sum())
    if not truths:
        return dict.fromkeys(("ap50", "ap75", "ap"))
    values = {}
    for threshold in _THRESHOLDS:
        pairs = overlaps.matches(threshold)
        hit = np.zeros(overlaps.prediction.size, np.bool_)
        hit[overlaps.of_prediction[pairs]] = inside[overlaps.of_truth[pairs]]
        counts = _inside(overlaps.prediction_voxels, low, high)
        counts[overlaps.of_prediction[pairs]] = inside[overlaps.of_truth[pairs]]
        values[threshold] = _average_precision(hit[rank][counts[rank]], truths)
    return {"ap50": values[10], "ap75": values[15], "ap": sum(values.values()) / len(values)}


def _average_precision(hits: npt.NDArray[np.bool_], truths: int) -> float:
    """Mean of the highest precision at recall r or more, over r = 0, 0.01, … 1; 0 where r is not reached.

    ``hits``: whether each prediction, the surest first, is a true positive.
    """
    found = np.cumsum(hits)
    envelope = np.maximum.accumulate((found / np.arange(1, hits.size + 1))[::-1])[::-1]
    reached = np.searchsorted(found * _RECALLS, np.arange(_RECALLS + 1) * truths)
    precisions = np.concatenate([envelope, [0.0]])[reached]
    return float(precisions.sum() / precisions.size)


def _quotient(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _counts(overlaps: ObjectPairs, threshold: int) -> dict[str, float | int | None]:
    tp = int(overlaps.matches(threshold).size)
    fp, fn = int(overlaps.prediction.size) - tp, int(overlaps.truth.size) - tp
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "precision": _quotient(tp, tp + fp),
        "recall": _quotient(tp, tp + fn),
        "f1": _quotient(2 * tp, 2 * tp + fp + fn),
        "accuracy": _quotient(tp, tp + fp + fn),
    }


def _panoptic(overlaps: ObjectPairs) -> dict[str, float | None]:
    """Kirillov et al. (2019) with one class, pairs of IoU of at least 0.5."""
    pairs = overlaps.matches()
    sum_of_ious = float(overlaps.iou[pairs].sum())
    objects = (overlaps.prediction.size + overlaps.truth.size) / 2  # = tp + fp / 2 + fn / 2
    return {
        "pq": _quotient(sum_of_ious, objects),
        "sq": _quotient(sum_of_ious, pairs.size),
        "rq": _quotient(pairs.size, objects),
    }


def _marginals(table: Contingency) -> tuple[Reals, Reals, Reals]:
    """Voxels of each pair, each prediction and each truth."""
    sides = []
    for ids in (table.prediction, table.truth):
        _, places = np.unique(ids, return_inverse=True)
        sides.append(np.bincount(places, weights=table.counts).astype(np.float64))
    return table.counts.astype(np.float64), sides[0], sides[1]


def _entropy(voxels: Reals) -> float:
    shares = voxels / voxels.sum()
    return float(-(shares * np.log2(shares)).sum())


def _voi(table: Contingency) -> dict[str, float | None]:
    """Conditional entropies in bits (Meilă 2007): split = H(prediction | truth), merge = H(truth | prediction)."""
    if not table.counts.size:
        return {"split": None, "merge": None}
    pairs, prediction, truth = map(_entropy, _marginals(table))
    return {"split": max(0.0, pairs - truth), "merge": max(0.0, pairs - prediction)}


def _adapted_rand(table: Contingency) -> dict[str, float | None]:
    """Pairs of distinct voxels that are together in both, against those together in one (Arganda-Carreras 2015)."""
    together = [sum(n * (n - 1) for n in map(int, side.tolist())) for side in _marginals(table)]
    both, prediction, truth = together
    fscore = _quotient(2 * both, prediction + truth)
    return {
        "error": None if fscore is None else 1 - fscore,
        "precision": _quotient(both, prediction),
        "recall": _quotient(both, truth),
    }
