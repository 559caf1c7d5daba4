"""Semantic metrics: the confusion matrix of a ``Contingency``, and Dice and its kin from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from connectomics.core.errors import ConfigError, VolumeError
from connectomics.evaluate.contingency import Contingency, Counts, Ids, listing

MOST_CLASSES = 1 << 11  # a confusion matrix of this many takes 32 MiB
MOST_SHOWN = 256  # and one of this many a megabyte of JSON


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """How many voxels of each true label were given each label.

    Parameters
    ----------
    counts
        int64 (k, k); row = true label, column = predicted label, labels 0 to k - 1.

    Raises
    ------
    ValueError
        If ``counts`` is not a square int64 matrix of counts.
    """

    counts: Counts

    def __post_init__(self) -> None:
        counts = self.counts
        square = counts.ndim == 2 and counts.shape[0] == counts.shape[1]
        if not square or counts.dtype != np.int64 or (counts < 0).any():
            raise ValueError(f"a confusion matrix is (k, k) int64 counts, got {counts.dtype} of shape {counts.shape}")

    @classmethod
    def zero(cls, classes: int) -> Confusion:
        """No voxels yet; labels 0 to ``classes`` - 1."""
        return cls(np.zeros((classes, classes), np.int64))

    @classmethod
    def of(cls, table: Contingency, classes: int) -> Confusion:
        """The matrix of a table of pairs.

        Parameters
        ----------
        table
            Counts of a block or a volume.
        classes
            Number of labels k; allowed values are 0 to k - 1.

        Raises
        ------
        VolumeError
            If a value is not a known label.
        """
        _require_labels(table.prediction, classes, "prediction")
        _require_labels(table.truth, classes, "truth")
        counts = np.zeros((classes, classes), np.int64)
        counts[table.truth.astype(np.intp), table.prediction.astype(np.intp)] = table.counts
        return cls(counts)

    def __add__(self, other: Confusion) -> Confusion:
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"cannot add confusions of {len(self.counts)} and {len(other.counts)} labels")
        return Confusion(self.counts + other.counts)


def _require_labels(values: Ids, classes: int, role: str) -> None:
    if (values >= classes).any():
        raise VolumeError(
            f"the {role} holds values that are no label: {listing(values[values >= classes])}; expected 0 to "
            f"{classes - 1} (masks are measured with test.evaluation.foreground=true)"
        )


def labels_found(tables: Sequence[Contingency]) -> int:
    """One more than the highest label of prediction and truth, at least 2; a VolumeError if these are no classes."""
    highest = max((int(side.max()) for t in tables for side in (t.prediction, t.truth) if side.size), default=1)
    if highest >= MOST_CLASSES:
        raise VolumeError(
            f"labels go up to {highest}, expected classes below {MOST_CLASSES}; compare ids of objects with "
            "--instances, and masks with test.evaluation.foreground=true"
        )
    return max(highest, 1) + 1


def _quotient(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


_FORMULAS: Mapping[str, Callable[[int, int, int], float | None]] = {
    "dice": lambda tp, fp, fn: _quotient(2 * tp, 2 * tp + fp + fn),
    "iou": lambda tp, fp, fn: _quotient(tp, tp + fp + fn),
    "precision": lambda tp, fp, fn: _quotient(tp, tp + fp),
    "recall": lambda tp, fp, fn: _quotient(tp, tp + fn),
}


def scores(confusion: Confusion, classes: Mapping[str, Sequence[int]], metrics: Sequence[str]) -> dict[str, Any]:
    """Metrics per class and their mean over the foreground, ready for JSON.

    A metric whose denominator is 0 is undefined and None (null in JSON): precision of a label that is never
    predicted, recall of one that is not in the truth, Dice and IoU of one that is in neither. Means leave
    undefined values out, as nnU-Net's do.

    Parameters
    ----------
    confusion
        Counts of the whole volume.
    classes
        Name and labels of each class, the background first. A class of several labels (a region) is where any of
        them is, in truth and prediction alike, as nnU-Net measures regions; classes may overlap.
    metrics
        Any of dice, iou, precision, recall.

    Returns
    -------
    dict
        ``{"labels": {name: {metric: value, "tp": n, "fp": n, "fn": n}}, "mean_foreground": {metric: value},
        "confusion": [[n, …], …], "voxels": n}``; the confusion's rows are true labels, its columns predicted ones.
        Beyond ``MOST_SHOWN`` labels it is None.

    Raises
    ------
    ConfigError
        If a metric is unknown.
    ValueError
        If the confusion lacks a label of a class.
    """
    for metric in metrics:
        if metric not in _FORMULAS:
            raise ConfigError(f"unknown metric {metric!r}; known are {', '.join(_FORMULAS)}")
    if any(not 0 <= label < len(confusion.counts) for labels in classes.values() for label in labels):
        raise ValueError(f"{len(confusion.counts)} labels were counted, fewer than the classes {dict(classes)} have")
    table: dict[str, dict[str, Any]] = {}
    for name, several in classes.items():
        labels = sorted(set(several))
        tp = int(confusion.counts[np.ix_(labels, labels)].sum())
        fp = int(confusion.counts[:, labels].sum()) - tp
        fn = int(confusion.counts[labels].sum()) - tp
        table[name] = {metric: _FORMULAS[metric](tp, fp, fn) for metric in metrics}
        table[name] |= {"tp": tp, "fp": fp, "fn": fn}
    means = {metric: _mean([table[name][metric] for name in list(classes)[1:]]) for metric in metrics}
    return {
        "labels": table,
        "mean_foreground": means,
        "confusion": confusion.counts.tolist() if len(confusion.counts) <= MOST_SHOWN else None,
        "voxels": int(confusion.counts.sum()),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
