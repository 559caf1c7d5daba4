"""Objects that were joined by value, numbered by their first voxels as those that were joined over faces are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from connectomics.decode.merge import AT_ONCE, IDS, OBJECTS, spans, table
from connectomics.decode.pieces import PIECE

Array = npt.NDArray[Any]


def number_by_first(folder: Path, count: int, *, at_once: int = AT_ONCE) -> None:
    """Number objects that were joined by value by their first voxels, in place; their value becomes 1.

    Parameters
    ----------
    folder
        Tables of ``merge``.
    count
        Objects in them.
    at_once
        Rows in memory at a time.
    """
    objects = np.load(folder / OBJECTS, mmap_mode="r+")
    firsts = table(folder / "scratch_firsts", count, np.uint64)
    for span in spans(count, at_once):
        firsts[span] = objects["first"][span]
    numbers = table(folder / "scratch_by_value", count, np.uint64)
    ordered = table(folder / "scratch_ordered", count, PIECE)
    floor = 0
    for span in spans(count, at_once):
        at = _smallest(firsts, count, floor, at_once)
        numbers[at] = np.arange(span.start, span.stop, dtype=np.uint64) + np.uint64(1)
        ordered[span] = objects[at]
        ordered["value"][span] = 1
        floor = int(firsts[at[-1]]) + 1
    ids = np.load(folder / IDS, mmap_mode="r+")
    for span in spans(len(ids) if count else 0, at_once):
        ids[span] = numbers[ids[span].astype(np.int64) - 1]
    for span in spans(count, at_once):
        objects[span] = ordered[span]
    for written in (ids, objects):
        written.flush()
    del firsts, numbers, ordered
    for scratch in folder.glob("scratch_*"):
        scratch.unlink()


def _smallest(keys: Array, count: int, floor: int, wanted: int) -> Array:
    """Positions of the smallest keys from ``floor`` on, in their order."""
    at = np.zeros(0, np.int64)
    for span in spans(count, wanted):
        at = np.concatenate([at, span.start + np.flatnonzero(keys[span] >= floor)])
        if len(at) > wanted:
            at = at[np.argpartition(keys[at], wanted - 1)[:wanted]]
    found: Array = at[np.argsort(keys[at])]
    return found
