"""Predicted objects and true objects, which of them match, and the table of it for looking up errors.

Made from a ``Contingency``; id 0 is background on both sides.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import OutputError
from connectomics.core.files import replacing
from connectomics.evaluate.contingency import Contingency, Counts, Ids

Places = npt.NDArray[np.intp]
Reals = npt.NDArray[np.float64]

TWENTIETHS = 20
LEAST = 10  # twentieths: the lowest IoU that counts as a match is 0.5
_NONE = -1
MATCHED, FALSE_POSITIVE, FALSE_NEGATIVE = "matched", "false positive", "false negative"


@dataclass(frozen=True, slots=True, eq=False)
class ObjectPairs:
    """Objects of both sides and the pairs of them that share voxels.

    Parameters
    ----------
    prediction, truth
        uint64 (p,) and (t,), the ids of the objects, ascending, without 0.
    prediction_voxels, truth_voxels
        int64 (p,) and (t,), their sizes; voxels that are not counted do not belong to any object.
    of_prediction, of_truth
        intp (n,), for each overlapping pair the place of its objects in the arrays above; ordered by truth, then
        prediction.
    shared
        int64 (n,), voxels that both have.
    """

    prediction: Ids
    truth: Ids
    prediction_voxels: Counts
    truth_voxels: Counts
    of_prediction: Places
    of_truth: Places
    shared: Counts

    @classmethod
    def of(cls, table: Contingency) -> ObjectPairs:
        """The objects of a table."""
        prediction, prediction_voxels = _sizes(table.prediction, table.counts)
        truth, truth_voxels = _sizes(table.truth, table.counts)
        both = table.only((table.prediction > 0) & (table.truth > 0))
        return cls(
            prediction,
            truth,
            prediction_voxels,
            truth_voxels,
            of_prediction=np.searchsorted(prediction, both.prediction),
            of_truth=np.searchsorted(truth, both.truth),
            shared=both.counts,
        )

    @property
    def union(self) -> Counts:
        """int64 (n,), voxels that at least one of each pair has."""
        together = self.prediction_voxels[self.of_prediction] + self.truth_voxels[self.of_truth]
        return together - self.shared

    @property
    def iou(self) -> Reals:
        """float64 (n,), intersection over union of each pair."""
        quotients: Reals = self.shared / self.union
        return quotients

    def matches(self, twentieths: int = LEAST) -> Places:
        """Places of the pairs whose IoU is at least ``twentieths`` / 20, each object in one of them at most.

        Compared in whole numbers. Above 0.5 no object can have two such partners. At exactly 0.5 an object may be
        made of two halves that are partners of equal right; the one with the lower id is taken, which is a largest
        possible matching.

        Raises
        ------
        ValueError
            If the threshold is below 0.5, where matches would depend on a choice.
        """
        if twentieths < LEAST:
            raise ValueError(f"matches are unique from an IoU of 0.5 on, got {twentieths / TWENTIETHS}")
        found = np.flatnonzero(self.shared * TWENTIETHS >= self.union * twentieths)
        for objects in (self.of_truth, self.of_prediction):
            found = found[np.unique(objects[found], return_index=True)[1]]
        return np.sort(found)


def _sizes(ids: Ids, counts: Counts) -> tuple[Ids, Counts]:
    distinct, places = np.unique(ids, return_inverse=True)
    sizes = np.zeros(distinct.size, np.int64)
    np.add.at(sizes, places, counts)
    return distinct[distinct > 0], sizes[distinct > 0]


def match_table(overlaps: ObjectPairs) -> dict[str, npt.NDArray[np.generic]]:
    """One row an object or matched pair of objects, matched where the IoU is at least 0.5.

    Returns
    -------
    columns
        ``kind`` ("matched", "false positive", "false negative"), ``prediction`` and ``truth`` (uint64 ids),
        ``intersection`` (int64 voxels), ``iou``, ``prediction_voxels``, ``truth_voxels``. An object without a match
        stands beside the one it overlaps best (highest IoU, then lowest id), or 0 where it overlaps none. Matched
        pairs come first, by truth; then false positives, then false negatives, by id.
    """
    matched = overlaps.matches()
    pairs = [(MATCHED, overlaps.of_prediction[matched], overlaps.of_truth[matched], matched)]
    for kind, objects, count in (
        (FALSE_POSITIVE, overlaps.of_prediction, overlaps.prediction.size),
        (FALSE_NEGATIVE, overlaps.of_truth, overlaps.truth.size),
    ):
        alone = np.setdiff1d(np.arange(count), objects[matched])
        best = _best(overlaps, objects, count)[alone]
        other = overlaps.of_truth if kind == FALSE_POSITIVE else overlaps.of_prediction
        partner = np.full(alone.size, _NONE)
        partner[best != _NONE] = other[best[best != _NONE]]
        pairs.append((kind, *((alone, partner) if kind == FALSE_POSITIVE else (partner, alone)), best))
    kinds = np.repeat([kind for kind, *_ in pairs], [pair[3].size for pair in pairs])
    prediction, truth, pair = (np.concatenate([part[i] for part in pairs]) for i in (1, 2, 3))
    return {
        "kind": kinds,
        "prediction": _at(overlaps.prediction, prediction),
        "truth": _at(overlaps.truth, truth),
        "intersection": _at(overlaps.shared, pair),
        "iou": _at(overlaps.iou, pair),
        "prediction_voxels": _at(overlaps.prediction_voxels, prediction),
        "truth_voxels": _at(overlaps.truth_voxels, truth),
    }


def _best(overlaps: ObjectPairs, objects: Places, count: int) -> Places:
    """Return, for each of ``count`` objects, the place of its pair of highest IoU, or -1."""
    best = np.full(count, _NONE)
    order = np.lexsort((overlaps.of_truth, overlaps.of_prediction, -overlaps.iou))
    places, first = np.unique(objects[order], return_index=True)
    best[places] = order[first]
    return best


def _at(values: npt.NDArray[np.generic], places: Places) -> npt.NDArray[np.generic]:
    """``values`` at ``places``, 0 where there is none."""
    return np.concatenate([values, np.zeros(1, values.dtype)])[places]


def write_matches(columns: dict[str, npt.NDArray[np.generic]], folder: Path, stem: str) -> Path:
    """Write a match table as Parquet, or as CSV where pyarrow is not installed.

    Returns
    -------
    path
        ``folder/stem_matches.parquet`` or ``.csv``; it appears whole or not at all.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    parquet = importlib.util.find_spec("pyarrow") is not None
    path = folder / f"{stem}_matches.{'parquet' if parquet else 'csv'}"
    try:
        with replacing(path) as temporary:
            if parquet:
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
            else:
                with temporary.open("w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(columns)
                    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; check folder and space") from error
    return path
