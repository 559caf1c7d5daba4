"""Volumes of two values among those that are compared: masks, which have no labels but a foreground."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from connectomics.evaluate.contingency import Contingency

MANY = 32  # more values than these are ids of objects, not labels, where the other side is a mask
Occurring = frozenset[int]


def values_of(table: Contingency) -> tuple[Occurring, Occurring]:
    """The values of prediction and truth that occur."""
    return frozenset(np.unique(table.prediction).tolist()), frozenset(np.unique(table.truth).tolist())


def ids_against_mask(table: Contingency) -> str:
    """Which side holds ids while the other is a mask: ``prediction``, ``truth``, or nothing."""
    prediction, truth = (side - {0} for side in values_of(table))
    if len(truth) == 1 and len(prediction) > MANY:
        return "prediction"
    return "truth" if len(prediction) == 1 and len(truth) > MANY else ""


def foregrounds(tables: Mapping[str, Contingency]) -> dict[str, Contingency]:
    """Tables whose truth is a mask, with foreground as 1 and all else as 0 on both sides.

    A truth of at most two values is a mask where the higher one is no label of any prediction, such as 255; where it is
    1 and the predictions are masks of another value; and where all volumes hold that value and 0 only. The higher value
    is foreground; of predictions it is everything above 0.
    """
    sides = {name: values_of(table) for name, table in tables.items()}
    labels = frozenset[int]().union(*(prediction for prediction, _ in sides.values())) - {0}
    truths = frozenset[int]().union(*(truth for _, truth in sides.values())) - {0}
    found = {}
    for name, (_, truth) in sides.items():
        high = max(truth, default=0)
        if len(truth) > 2 or high == 0 or (high == 1 and (len(labels) != 1 or labels == {1})):
            continue
        if high not in labels or labels == truths == {high}:
            found[name] = tables[name].as_mask(high)
    return found
