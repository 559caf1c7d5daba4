"""Objects in the order of their first voxels, which is that of their numbers; of tables that are larger than memory.

Used by ``links``, and for objects that were joined by value, which ``merge`` numbers by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from connectomics.objects.merge import AT_ONCE, IDS, OBJECTS, mapped, spans, table, windows
from connectomics.objects.pieces import PIECE
from connectomics.volumes.volume import Array


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
    numbers = table(folder / "scratch_by_value", count, np.uint64)
    ordered = table(folder / "scratch_ordered", count, PIECE)
    following = 0
    every = (np.arange(span.start, span.stop) for span in spans(count, at_once))
    for rows in ascending(objects["first"], every, folder, at_once):
        span = slice(following, following + len(rows))
        numbers[rows] = np.arange(span.start, span.stop, dtype=np.uint64) + np.uint64(1)
        ordered[span] = objects[rows]
        ordered["value"][span] = 1
        following = span.stop
    ids = np.load(folder / IDS, mmap_mode="r+")
    for span in spans(len(ids) if count else 0, at_once):
        ids[span] = numbers[ids[span].astype(np.int64) - 1]
    for span in spans(count, at_once):
        objects[span] = ordered[span]
    for written in (ids, objects):
        written.flush()
    for scratch in folder.glob("scratch_*"):
        scratch.unlink()


def ascending(keys: Array, parts: Iterable[Array], folder: Path, at_once: int) -> Iterator[Array]:
    """Rows of a table by ascending keys, some at a time.

    An external merge sort: each part, sorted, is one run in a file.

    Parameters
    ----------
    keys
        Of all rows of the table, u64; those of the rows that are sorted differ.
    parts
        The rows that are sorted, int64 [n], at most ``at_once`` at a time.
    folder
        For scratch files, which are left there.
    at_once
        Rows in memory at a time.
    """
    edges = [0]
    paths = folder / "scratch_keys", folder / "scratch_rows"
    with paths[0].open("wb") as keys_file, paths[1].open("wb") as rows_file:
        for part in parts:
            rows = part[np.argsort(keys[part])]
            keys_file.write(keys[rows].tobytes())
            rows_file.write(rows.tobytes())
            edges.append(edges[-1] + len(rows))
    run_keys, run_rows = mapped(paths[0], edges[-1], np.uint64), mapped(paths[1], edges[-1], np.int64)
    for window in windows(run_keys, list(itertools.pairwise(edges)), at_once):
        places = np.concatenate([np.arange(a, b) for a, b in window])
        yield run_rows[places[np.argsort(run_keys[places])]]
