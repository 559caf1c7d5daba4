"""From the pieces of all blocks to objects: union over the faces, numbers by the first voxel, one row an object.

Runs once all blocks are cut into pieces; its tables are files that are mapped, so that memory holds a part of them.
The order of the blocks' rows makes numbering an external merge sort: each block's keys are one sorted run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from connectomics.objects.arrays import load
from connectomics.objects.mapped_tables import changeable, flush, mapped, table
from connectomics.objects.pieces import PIECE, merged, nothing, together
from connectomics.volumes.volume import Array

AT_ONCE = 1 << 22  # rows, nodes or pairs that are in memory at a time
FIRST_ID = 1
IDS, OFFSETS, OBJECTS = "ids.npy", "offsets.npy", "objects.npy"


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where the blocks' results lie.

    Parameters
    ----------
    count
        Number of blocks, in raster order.
    layer
        Number of blocks that share their z range.
    pieces
        File of a block's pieces, by its number.
    joins
        File of a block's pairs with later blocks, by its number; None where pieces are joined by value.
    """

    count: int
    layer: int
    pieces: Callable[[int], Path]
    joins: Callable[[int], Path] | None = None


def merge(cuts: Cuts, folder: Path, *, first_id: int = FIRST_ID, at_once: int = AT_ONCE) -> int:
    """Number the objects, from ``first_id`` on in the order of their first voxels, and measure them; how many they are.

    Leaves in ``folder``, which is empty before: ``offsets.npy``, where each block's pieces begin; ``ids.npy`` u8, the
    object of each piece; ``objects.npy``, a ``PIECE`` for each object in the order of ids.
    """
    tables = _gathered(cuts, folder)
    if cuts.joins is not None:
        _join(cuts, tables, folder, at_once)
    count = _numbered(cuts, tables, first_id, at_once)
    if cuts.joins is not None:
        _follow(tables, at_once)
    objects = _measured(cuts, tables, folder, count, first_id=first_id, at_once=at_once)
    flush(tables.ids, objects)
    for path in folder.glob("scratch_*"):
        path.unlink()
    return count


def spans(count: int, at_once: int) -> Iterator[slice]:
    """Parts of a table of ``count`` rows."""
    return (slice(begin, min(count, begin + at_once)) for begin in range(0, count, at_once))


@dataclass(slots=True)
class _Tables:
    """All pieces in the order of the blocks, and the nodes: pieces that touch another block."""

    offsets: Array  # first piece of each block, and the number of pieces
    nodes: Array  # first node of each block, and the number of nodes
    keys: Array  # by piece
    piece_of: Array  # by node
    leads: Array  # by piece: it is numbered by its own key
    ids: np.memmap[Any, Any]  # by piece
    parent: Array  # by node: a node of the same object, in the end the one all share
    leader: Array  # by node that all share: the piece that has the object's key


def _gathered(cuts: Cuts, folder: Path) -> _Tables:
    """Keys and nodes of all blocks, one after the other."""
    offsets, nodes = np.zeros(cuts.count + 1, np.int64), np.zeros(cuts.count + 1, np.int64)
    paths = [folder / f"scratch_{name}" for name in ("keys", "piece_of")]
    with paths[0].open("wb") as keys, paths[1].open("wb") as piece_of:
        for block in range(cuts.count):
            rows, joints = load(cuts.pieces(block), "rows", "joints")
            key = rows["first" if cuts.joins else "value"]
            assert (key[1:] > key[:-1]).all(), "pieces are in the order of their keys"
            keys.write(np.ascontiguousarray(key).tobytes())
            piece_of.write((joints.astype(np.int64) - 1 + offsets[block]).tobytes())
            offsets[block + 1] = offsets[block] + len(rows)
            nodes[block + 1] = nodes[block] + len(joints)
    np.save(folder / OFFSETS, offsets)
    total, linked = int(offsets[-1]), int(nodes[-1])
    leads = table(folder / "scratch_leads", total, np.bool_)
    leads[:] = True
    parent = table(folder / "scratch_parent", linked, np.int64)
    for span in spans(linked, AT_ONCE):
        parent[span] = np.arange(span.start, span.stop)
    return _Tables(
        offsets,
        nodes,
        keys=mapped(paths[0], total, np.uint64),
        piece_of=mapped(paths[1], linked, np.int64),
        leads=leads,
        ids=table(folder / IDS, total, np.uint64),
        parent=parent,
        leader=table(folder / "scratch_leader", linked, np.int64),
    )


def _join(cuts: Cuts, tables: _Tables, folder: Path, at_once: int) -> None:
    """Union of the nodes that touch; then the piece of each object with the smallest key leads it."""
    assert cuts.joins is not None
    waiting: list[Array] = []
    for block in range(cuts.count):
        here, there, other = load(cuts.joins(block), "here", "there", "other")
        waiting.append(np.stack([here + tables.nodes[block], there + tables.nodes[other]]))
        if sum(pairs.shape[1] for pairs in waiting) >= at_once:
            unite(tables.parent, np.concatenate(waiting, axis=1))
            waiting.clear()
    if waiting:
        unite(tables.parent, np.concatenate(waiting, axis=1))
    count = int(tables.nodes[-1])
    smallest = table(folder / "scratch_smallest", count, np.uint64)
    for span in spans(count, at_once):
        smallest[span] = np.iinfo(np.uint64).max
    for span in spans(count, at_once):
        tables.parent[span] = root = roots(tables.parent, np.arange(span.start, span.stop))
        np.minimum.at(smallest, root, tables.keys[tables.piece_of[span]])
    for span in spans(count, at_once):
        piece, root = tables.piece_of[span], tables.parent[span]
        first = tables.keys[piece] == smallest[root]
        tables.leads[piece] = first
        tables.leader[root[first]] = piece[first]


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


def _numbered(cuts: Cuts, tables: _Tables, first_id: int, at_once: int) -> int:
    """Ids of all leading pieces by their keys; all keys of a layer of blocks lie before those of the next."""
    layer = cuts.layer if cuts.joins else cuts.count
    following = first_id
    for begin in range(0, cuts.count, layer):
        edges = tables.offsets[begin : begin + layer + 1]
        for window in windows(tables.keys, list(itertools.pairwise(edges)), at_once):
            pieces = np.concatenate([np.arange(a, b) for a, b in window])
            pieces = pieces[tables.leads[pieces]]
            keys, rank = np.unique(tables.keys[pieces], return_inverse=True)
            tables.ids[pieces] = np.uint64(following) + rank.astype(np.uint64)
            following += len(keys)
    return following - first_id


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


def _follow(tables: _Tables, at_once: int) -> None:
    """Pieces that do not lead take the id of the one that leads them."""
    for span in spans(int(tables.nodes[-1]), at_once):
        tables.ids[tables.piece_of[span]] = tables.ids[tables.leader[tables.parent[span]]]


def _measured(
    cuts: Cuts, tables: _Tables, folder: Path, count: int, first_id: int, at_once: int
) -> np.memmap[Any, Any]:
    """One row an object: what its pieces are together."""
    objects = table(folder / OBJECTS, count, PIECE)
    for span in spans(count, at_once):
        objects[span] = nothing(span.stop - span.start)
    for block in range(cuts.count):
        (rows,) = load(cuts.pieces(block), "rows")
        ids = tables.ids[tables.offsets[block] : tables.offsets[block + 1]]
        rows, at = merged(rows, (ids - np.uint64(first_id)).astype(np.int64))
        objects[at] = together(objects[at], rows)
    return objects


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
