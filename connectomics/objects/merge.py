"""What objects are made with: sets of pieces that touch, tables in parts, sorting of more than memory holds.

``numbering`` makes objects of the pieces of all blocks with it, ``links`` those of objects of sections.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from connectomics.objects.mapped_tables import changeable, flush, mapped, table
from connectomics.objects.pieces import PIECE
from connectomics.volumes.volume import Array

AT_ONCE = 1 << 22  # rows, nodes or pairs that are in memory at a time
FIRST_ID = 1
IDS, OFFSETS, OBJECTS = "ids.npy", "offsets.npy", "objects.npy"


def spans(count: int, at_once: int) -> Iterator[slice]:
    """Parts of a table of ``count`` rows."""
    return (slice(begin, min(count, begin + at_once)) for begin in range(0, count, at_once))


def unite(parent: Array, pairs: Array) -> None:
    """Make one set of the two nodes of every pair.

    Parameters
    ----------
    parent
        int64 [nodes], in place: a node of the same set that is not larger; equal to itself at the root.
    pairs
        int64 [2, n].
    """
    above = roots(parent, pairs.ravel())
    parent[pairs.ravel()] = above
    nodes, position = np.unique(above, return_inverse=True)
    here, there = position.reshape(pairs.shape)
    graph = coo_array((np.ones(len(here), np.bool_), (here, there)), shape=(len(nodes), len(nodes)))
    groups, group = connected_components(graph, directed=False)
    root = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(root, group, nodes)
    parent[nodes] = root[group]


def roots(parent: Array, nodes: Array) -> Array:
    """The root of each node's set, see ``unite``: its smallest node."""
    found = parent[nodes]
    while True:
        above = parent[found]
        if np.array_equal(above, found):
            return np.asarray(found)
        found = above


Span = tuple[int, int]


def windows(keys: Array, runs: Sequence[Span], at_once: int) -> Iterator[list[Span]]:
    """Cut sorted runs of keys at common keys, until what lies between two cuts fits."""
    waiting = [[run for run in runs if run[1] > run[0]]]
    while waiting:
        window = waiting.pop()
        lengths = [b - a for a, b in window]
        if not window:
            continue
        if sum(lengths) <= at_once or max(lengths) < 2:
            yield window
            continue
        a, b = window[int(np.argmax(lengths))]
        pivot = keys[(a + b) // 2]
        cuts = [int(a + np.searchsorted(keys[a:b], pivot)) for a, b in window]
        waiting.append([(c, b) for c, (_, b) in zip(cuts, window, strict=True) if b > c])
        waiting.append([(a, c) for c, (a, _) in zip(cuts, window, strict=True) if c > a])


def number_by_first(folder: Path, count: int, *, at_once: int = AT_ONCE) -> None:
    """Number objects that were joined by value by their first voxels, in their tables; their value becomes 1."""
    objects = changeable(folder / OBJECTS)
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
    ids = changeable(folder / IDS)
    for span in spans(len(ids) if count else 0, at_once):
        ids[span] = numbers[ids[span].astype(np.int64) - 1]
    for span in spans(count, at_once):
        objects[span] = ordered[span]
    flush(ids, objects)
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
