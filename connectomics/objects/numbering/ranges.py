"""How numbering is cut: which pieces are one object, and ranges of keys whose objects can be numbered each for itself.

A key is an object's first voxel, or its value where pieces are joined by value; objects are numbered in the order of
their keys. ``prepare`` is what one process makes alone; it looks at pieces that touch other blocks and at samples.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.objects.mapped_tables import flush, mapped, table
from connectomics.objects.merge import AT_ONCE, OFFSETS, roots, spans, unite
from connectomics.objects.numbering.cuts import Cuts
from connectomics.volumes.volume import Array

RANGE_PIECES = (1 << 17, 1 << 20)  # least and most of a range, beside what sampling errs
PARTS = 16  # into which few pieces are cut
SAMPLES = 1 << 13  # keys of all blocks that are looked at, and at least ``BLOCK_SAMPLES`` of each
BLOCK_SAMPLES = 64
GOLDEN = 0.6180339887498949  # blocks are sampled at different places, else equal blocks would err alike
END = np.iinfo(np.uint64).max
SPLITS, BOUNDS, NODES, PIECE_OF, LEADER, FOLLOWERS, FOLLOWER_KEYS, FOLLOWER_EDGES = (
    f"plan_{name}.npy"
    for name in ("splits", "bounds", "nodes", "piece_of", "leader", "followers", "follower_keys", "follower_edges")
)
PLAN_FILES = "plan_*"


@dataclass(frozen=True, slots=True)
class Nodes:
    """The pieces that touch other blocks, block after block.

    Parameters
    ----------
    offsets
        i8 [blocks + 1], the first node of each block.
    piece_of
        i8, the piece of each node, counted over all blocks.
    leader
        i8, the node of the same object whose piece has the object's key; itself where it has it.
    """

    offsets: Array
    piece_of: Array
    leader: Array

    def follow(self, block: int) -> Array:
        """The pieces of a block that have not their object's key, counted over all blocks; i8 [n]."""
        here = slice(self.offsets[block], self.offsets[block + 1])
        following = self.leader[here] != np.arange(here.start, here.stop)
        found: Array = self.piece_of[here][following]
        return found


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """What ``prepare`` leaves in a folder, mapped.

    Parameters
    ----------
    offsets
        i8 [blocks + 1], where each block's pieces begin.
    bounds
        u8 [blocks, 2], the first and last key of each block; of one without pieces the last is smaller.
    splits
        u8 [ranges - 1], the first key of each range but the first.
    nodes
        Where pieces are joined over faces.
    folder
        Of these files.
    """

    offsets: Array
    bounds: Array
    splits: Array
    nodes: Nodes | None
    folder: Path

    @classmethod
    def of(cls, folder: Path) -> KeyRanges:
        """Map what lies in a folder."""
        nodes = None
        if (folder / NODES).exists():
            nodes = Nodes(np.load(folder / NODES), _mapped(folder / PIECE_OF), _mapped(folder / LEADER))
        offsets, bounds, splits = (np.load(folder / name) for name in (OFFSETS, BOUNDS, SPLITS))
        return cls(offsets, bounds, splits, nodes=nodes, folder=folder)

    def __len__(self) -> int:
        return len(self.splits) + 1

    def keys(self, number: int) -> tuple[int, int]:
        """The first and the last possible key of a range."""
        low = int(self.splits[number - 1]) if number else 0
        return low, int(self.splits[number]) - 1 if number < len(self.splits) else int(END)

    def blocks(self, number: int) -> list[int]:
        """Blocks that may have pieces in a range."""
        low, high = self.keys(number)
        found: list[int] = np.flatnonzero((self.bounds[:, 1] >= low) & (self.bounds[:, 0] <= high)).tolist()
        return found

    def followers(self, number: int, at_once: int) -> Iterator[tuple[Array, Array]]:
        """Nodes, ascending, of pieces that belong to objects of a range without having their key, and that key."""
        if self.nodes is not None:
            begin, end = np.load(self.folder / FOLLOWER_EDGES)[number : number + 2].tolist()
            nodes, keys = (_mapped(self.folder / name) for name in (FOLLOWERS, FOLLOWER_KEYS))
            for span in spans(end - begin, at_once):
                part = slice(begin + span.start, begin + span.stop)
                yield np.array(nodes[part]), np.array(keys[part])


def _mapped(path: Path) -> Array:
    found: Array = np.load(path, mmap_mode="r")
    return found


def prepare(cuts: Cuts, folder: Path, *, pieces: tuple[int, int] | None = None, at_once: int = AT_ONCE) -> KeyRanges:
    """Cut numbering into ranges and find which pieces are one object; leaves its files in a folder.

    Parameters
    ----------
    cuts
        The blocks.
    folder
        Where the files go.
    pieces
        Of a range, at least and at most; None for ``RANGE_PIECES``.
    at_once
        Rows in memory at a time.
    """
    offsets, bounds = np.zeros(cuts.count + 1, np.int64), np.zeros((cuts.count, 2), np.uint64)
    bounds[:, 0] = END
    samples, weights = [np.zeros(0, np.uint64)], [np.zeros(0)]
    for block in range(cuts.count):
        keys = cuts.rows(block).keys
        offsets[block + 1] = offsets[block] + len(keys)
        if len(keys):
            bounds[block] = keys[0], keys[-1]
            taken = min(len(keys), max(BLOCK_SAMPLES, SAMPLES // cuts.count))
            places = ((np.arange(taken) + block * GOLDEN % 1) * len(keys) / taken).astype(np.int64)
            samples.append(keys[places])
            weights.append(np.full(taken, len(keys) / taken))
    total = int(offsets[-1])
    least, most = pieces or RANGE_PIECES
    size = min(max(least, -(-total // PARTS)), most)
    splits = _splits(np.concatenate(samples), np.concatenate(weights), -(-total // size))
    for name, array in ((OFFSETS, offsets), (BOUNDS, bounds), (SPLITS, splits)):
        np.save(folder / name, array)
    if cuts.nodes is not None:
        _join(cuts, offsets, splits, folder, at_once=at_once)
    return KeyRanges.of(folder)


def _splits(samples: Array, weights: Array, ranges: int) -> Array:
    """First keys of all ranges but the first, so that the ranges weigh about the same."""
    order = np.argsort(samples, kind="stable")
    weight = np.cumsum(weights[order])
    places = np.searchsorted(weight, np.arange(1, ranges) * (weight[-1] / ranges)) if ranges > 1 else []
    return np.unique(samples[order][places])


def _join(cuts: Cuts, offsets: Array, splits: Array, folder: Path, *, at_once: int) -> None:
    """Union of the nodes that touch; then the piece of each object with the smallest key leads it."""
    assert cuts.nodes is not None and cuts.pairs is not None
    nodes = np.zeros(cuts.count + 1, np.int64)
    with (folder / "scratch_pieces").open("wb") as pieces_file, (folder / "scratch_keys").open("wb") as keys_file:
        for block in range(cuts.count):
            pieces, own = cuts.nodes(block)
            nodes[block + 1] = nodes[block] + len(pieces)
            pieces_file.write((pieces + offsets[block]).tobytes())
            keys_file.write(np.ascontiguousarray(own).tobytes())
    total = int(nodes[-1])
    keys = mapped(folder / "scratch_keys", total, np.uint64)
    piece_of, leader, parent, of_root = (
        table(folder / name, total, np.int64) for name in (PIECE_OF, LEADER, "scratch_parent", "scratch_of_root")
    )
    smallest = table(folder / "scratch_smallest", total, np.uint64)
    pieces_of_nodes = mapped(folder / "scratch_pieces", total, np.int64)
    for span in spans(total, at_once):
        piece_of[span] = pieces_of_nodes[span]
        parent[span] = np.arange(span.start, span.stop)
        smallest[span] = END
    for pairs in cuts.pairs(nodes, folder, at_once):
        unite(parent, pairs)
    for span in spans(total, at_once):
        parent[span] = root = roots(parent, np.arange(span.start, span.stop))
        np.minimum.at(smallest, root, keys[span])
    for span in spans(total, at_once):
        root = parent[span]
        (first,) = np.nonzero(keys[span] == smallest[root])
        of_root[root[first]] = span.start + first
    for span in spans(total, at_once):
        leader[span] = of_root[parent[span]]
    np.save(folder / NODES, nodes)
    flush(piece_of, leader)
    _sorted_by_range(leader, keys, splits, folder, total=total, at_once=at_once)
    for path in folder.glob("scratch_*"):
        path.unlink()


def _sorted_by_range(leader: Array, keys: Array, splits: Array, folder: Path, *, total: int, at_once: int) -> None:
    """Write the nodes that follow others, range by range in the order of their leaders' keys; ascending in each."""
    counted = np.zeros(len(splits) + 1, np.int64)

    def following(span: slice) -> tuple[Array, Array, Array]:
        (at,) = np.nonzero(leader[span] != np.arange(span.start, span.stop))
        key = keys[leader[span][at]]
        return at + span.start, key, np.searchsorted(splits, key, "right")

    for span in spans(total, at_once):
        counted += np.bincount(following(span)[2], minlength=len(counted))
    edges = np.concatenate([[0], np.cumsum(counted)])
    nodes = table(folder / FOLLOWERS, int(edges[-1]), np.int64)
    node_keys = table(folder / FOLLOWER_KEYS, int(edges[-1]), np.uint64)
    filled = edges[:-1].copy()
    for span in spans(total, at_once):
        at, key, number = following(span)
        order = np.argsort(number, kind="stable")
        counted = np.bincount(number, minlength=len(filled))
        begins = np.repeat(filled - (np.cumsum(counted) - counted), counted)
        places = begins + np.arange(len(order))
        nodes[places], node_keys[places] = at[order], key[order]
        filled += counted
    flush(nodes, node_keys)
    np.save(folder / FOLLOWER_EDGES, edges)


def between(keys: Array, low: int, high: int) -> slice:
    """Where ascending keys lie that are at least ``low`` and at most ``high``; a few of them are looked at."""
    return slice(bisect.bisect_left(keys, low), bisect.bisect_right(keys, high))
