"""The one sparse table behind all scores: how many voxels carry each pair of prediction and truth.

Blocks give tables, tables add up in any order; memory follows the pairs that occur, not the voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import VolumeError
from connectomics.volumes.volume import Array

Ids = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_MOST_LISTED = 10
_PIECE = 1 << 22  # voxels counted at once: bounds the temporary arrays
_HALF = np.uint64(32)  # bits of an id that leave room for another one in 64
_FEWEST_WAITING = 1 << 16  # pairs that are collected before they are merged


@dataclass(frozen=True, slots=True, eq=False)
class Contingency:
    """How many voxels carry each pair of ids, sorted by truth, then prediction; each pair once.

    Parameters
    ----------
    prediction, truth
        uint64 (n,), the ids of each pair.
    counts
        int64 (n,), voxels of each pair, at least 1.

    Raises
    ------
    ValueError
        If types or lengths are others.
    """

    prediction: Ids
    truth: Ids
    counts: Counts

    def __post_init__(self) -> None:
        types = [str(side.dtype) for side in (self.prediction, self.truth, self.counts)]
        shapes = {self.prediction.shape, self.truth.shape, self.counts.shape}
        if types != ["uint64", "uint64", "int64"] or len(shapes) != 1 or self.counts.ndim != 1:
            raise ValueError(f"a table of pairs is uint64, uint64, int64 of one length, got {types} of {shapes}")

    @classmethod
    def empty(cls) -> Contingency:
        """No voxels."""
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))

    @classmethod
    def from_arrays(cls, prediction: Array, truth: Array, counted: Mask | None = None) -> Contingency:
        """Count one block.

        Parameters
        ----------
        prediction, truth
            Labels or ids, of one shape and each of any integer, boolean or whole-numbered float dtype; not negative.
        counted
            Where voxels are counted, of that shape; None: everywhere.

        Raises
        ------
        VolumeError
            If the shapes differ, or a value is negative or not whole.

        Examples
        --------
        >>> table = Contingency.from_arrays(np.array([7, 7, 0, 8]), np.array([1, 1, 1, 2]))
        >>> table.prediction.tolist(), table.truth.tolist(), table.counts.tolist()
        ([0, 7, 8], [1, 1, 2], [1, 2, 1])
        """
        if prediction.shape != truth.shape:
            raise VolumeError(
                f"prediction is {prediction.shape} and truth {truth.shape}; give a truth of the same shape"
            )
        given, true = prediction.reshape(-1), truth.reshape(-1)
        if counted is not None:
            kept = counted.reshape(-1)
            given, true = given[kept], true[kept]
        pieces = [slice(start, start + _PIECE) for start in range(0, true.size, _PIECE)]
        return combined([_runs(given[piece], true[piece]) for piece in pieces])

    @property
    def voxels(self) -> int:
        """All voxels that were counted."""
        return int(self.counts.sum())

    def only(self, kept: Mask) -> Contingency:
        """The pairs where ``kept``, bool (n,), is true."""
        return Contingency(self.prediction[kept], self.truth[kept], self.counts[kept])

    def without_truth(self, label: int) -> Contingency:
        """The pairs whose truth is another than ``label``."""
        return self.only(self.truth != np.uint64(label))

    def as_foreground(self) -> Contingency:
        """The table of two masks: everything above 0 is 1, in prediction and truth."""
        one = np.uint64(1)
        return _merged(np.minimum(self.prediction, one), np.minimum(self.truth, one), self.counts)

    def as_mask(self, foreground: int) -> Contingency:
        """The table of two masks: of the truth one value is 1, of the prediction everything above 0."""
        one = np.uint64(1)
        truth = (self.truth == np.uint64(foreground)).astype(np.uint64)
        return _merged(np.minimum(self.prediction, one), truth, self.counts)


def combined(tables: Sequence[Contingency]) -> Contingency:
    """The sum of ``tables``; the same whatever their order."""
    if len(tables) == 1:
        return tables[0]
    if not tables:
        return Contingency.empty()
    return _merged(
        np.concatenate([table.prediction for table in tables]),
        np.concatenate([table.truth for table in tables]),
        np.concatenate([table.counts for table in tables]),
    )


def side_by_side(tables: Sequence[Contingency]) -> Contingency:
    """The table of volumes put beside each other: ids of one are others than those of the next, 0 stays 0.

    Ids are renumbered in the order of ``tables``, then of the ids.
    """
    moved, last_prediction, last_truth = [], 0, 0
    for table in tables:
        prediction, last_prediction = _renumbered(table.prediction, last_prediction)
        truth, last_truth = _renumbered(table.truth, last_truth)
        moved.append(Contingency(prediction, truth, table.counts))
    return combined(moved)


class Tally:
    """Adds up tables as they come; merges only when what waits outgrows what is merged, so n tables cost n log n."""

    def __init__(self) -> None:
        self._merged = Contingency.empty()
        self._waiting: list[Contingency] = []
        self._pairs = 0

    def add(self, table: Contingency) -> None:
        """Add the table of a block; the order does not matter."""
        self._waiting.append(table)
        self._pairs += table.counts.size
        if self._pairs > max(_FEWEST_WAITING, self._merged.counts.size):
            self._merge()

    @property
    def pairs(self) -> int:
        """Pairs that are held, equal ones of different blocks several times."""
        return self._pairs + int(self._merged.counts.size)

    def total(self) -> Contingency:
        """The sum so far."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        if self._waiting:
            self._merged = combined([self._merged, *self._waiting])
        self._waiting, self._pairs = [], 0


def _runs(prediction: Array, truth: Array) -> Contingency:
    """The table of two flat arrays. Neighbours mostly carry the same pair, so runs are counted, not voxels."""
    changes = prediction[1:] != prediction[:-1]
    changes |= truth[1:] != truth[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=truth.size)
    return _merged(_as_ids(prediction[starts], "prediction"), _as_ids(truth[starts], "truth"), lengths)


def _as_ids(values: Array, role: str) -> Ids:
    if values.dtype.kind == "f":
        possible = (values >= 0) & (values.astype(np.float64) < 2.0**64) & (np.floor(values) == values)
    elif values.dtype.kind == "i":
        possible = values >= 0
    else:
        return values.astype(np.uint64, copy=False)
    if not possible.all():
        listed = listing(values[~possible])
        raise VolumeError(f"the {role} holds values that are no label: {listed}; expected whole numbers from 0 on")
    return values.astype(np.uint64)


def listing(values: Array) -> str:
    """Distinct ``values`` in a message, at most ten."""
    distinct = np.unique(values)
    more = f" and {len(distinct) - _MOST_LISTED} more" if len(distinct) > _MOST_LISTED else ""
    return ", ".join(str(value) for value in distinct[:_MOST_LISTED]) + more


def _merged(prediction: Ids, truth: Ids, counts: Counts) -> Contingency:
    """Sort pairs and add up equal ones."""
    if not counts.size:
        return Contingency.empty()
    if int(prediction.max()) >> 32 or int(truth.max()) >> 32:
        order = np.lexsort((prediction, truth))
    else:
        order = np.argsort((truth << _HALF) | prediction)
    prediction, truth, counts = prediction[order], truth[order], counts[order]
    new = (prediction[1:] != prediction[:-1]) | (truth[1:] != truth[:-1])
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return Contingency(prediction[starts], truth[starts], np.add.reduceat(counts, starts).astype(np.int64, copy=False))


def _renumbered(ids: Ids, last: int) -> tuple[Ids, int]:
    """Ids above 0 as last + 1, last + 2, … in their order, and the last number given."""
    distinct, places = np.unique(ids, return_inverse=True)
    objects = int((distinct > 0).sum())
    numbers = np.zeros(distinct.size, np.uint64)
    numbers[distinct > 0] = np.arange(last + 1, last + 1 + objects, dtype=np.uint64)
    return numbers[places], last + objects
