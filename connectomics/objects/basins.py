"""Watershed of a component that is too large for one flood: basins of subvolumes, and which seed reaches each first.

A basin is what flows to one local maximum or seed. A flood that starts at the seeds enters every other basin over its
highest saddle, so that the basins of a seed are a tree of a spanning forest over the saddles; only heights are
equal may it enter over another. What lies around the faces of basins is then flooded anew, voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components as trees_of
from scipy.sparse.csgraph import minimum_spanning_tree
from skimage import morphology

from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.objects.components import Connectivity, connected_components
from connectomics.objects.faces import directions
from connectomics.objects.watershed import flood, flooding_order, footprint_of
from connectomics.volumes.volume import Array

_minima: Callable[..., Any] = morphology.local_minima


@dataclass(frozen=True, slots=True)
class Saddles:
    """Where neighbouring basins meet: pairs int64 [n, 2], each once, the lower number first, and the heights [n]."""

    pairs: Array
    heights: Array

    @classmethod
    def of(cls, pairs: Array, heights: Array) -> Saddles:
        """The highest saddle of each pair of different basins."""
        pairs = np.sort(pairs, axis=1)
        other = pairs[:, 0] != pairs[:, 1]
        pairs, heights = pairs[other], heights[other].astype(np.float64)
        order = np.lexsort((-heights, pairs[:, 1], pairs[:, 0]))
        pairs, heights = pairs[order], heights[order]
        first = np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)])[: len(pairs)]
        return cls(pairs[first], heights[first])

    @classmethod
    def together(cls, parts: list[Saddles]) -> Saddles:
        """Saddles of several places, the highest of each pair."""
        none = cls(np.zeros((0, 2), np.int64), np.zeros(0))
        parts = [none, *parts]
        return cls.of(np.concatenate([p.pairs for p in parts]), np.concatenate([p.heights for p in parts]))

    def renamed(self, names: Array) -> Saddles:
        """Between what the basins are part of."""
        return Saddles.of(names[self.pairs], self.heights)

    def forest(self, count: int, roots: Array) -> tuple[Saddles, Array]:
        """The saddles over which basins are reached from roots, the highest first, and the root of each basin.

        Parameters
        ----------
        count
            Basins, numbered from 0 on, each connected to a root.
        roots
            bool [count].
        """
        order = np.lexsort((self.pairs[:, 1], self.pairs[:, 0], -self.heights))
        cost = np.empty(len(order))
        cost[order] = np.arange(2, len(order) + 2)
        (at,) = np.nonzero(roots)
        ends = np.concatenate([self.pairs, np.stack([at, np.full(len(at), count)], axis=1)])
        graph = coo_array((np.concatenate([cost, np.ones(len(at))]), (ends[:, 0], ends[:, 1])), (count + 1, count + 1))
        kept = minimum_spanning_tree(graph.tocsr()).tocoo().data
        kept = np.sort(kept[kept > 1]).astype(np.int64) - 2
        chosen = np.sort(order[kept])
        saddles = Saddles(self.pairs[chosen], self.heights[chosen])
        a, b = saddles.pairs.T
        groups, group = trees_of(coo_array((np.ones(len(a), bool), (a, b)), (count, count)), directed=False)
        root_of = np.full(groups, -1, np.int64)
        root_of[group[at]] = at
        return saddles, root_of[group]


@dataclass(frozen=True, slots=True)
class Basins:
    """The basins of a subvolume.

    Parameters
    ----------
    labels
        int64 (z, y, x): 0, a seed's number, or behind all seeds 1 + the position of a basin that other subvolumes meet.
    count
        Basins of the latter kind.
    saddles
        Between seeds and basins, by these labels; only those that a flood may pass.
    """

    labels: Array
    count: int
    saddles: Saddles


def basins_of(
    heights: Array, seeds: Array, inside: Array, shared: Array, connectivity: Connectivity, seed_count: int
) -> Basins:
    """Cut a subvolume into basins; those that no other subvolume meets are united with the one they are flooded from.

    Parameters
    ----------
    heights
        Numbers (z, y, x).
    seeds
        Numbers of seeds (z, y, x), which are higher than all else; 0 elsewhere.
    inside
        bool (z, y, x): what is flooded.
    shared
        bool (z, y, x): what other subvolumes hold, too.
    connectivity
        Which voxels are neighbours.
    seed_count
        The largest number of a seed in the volume.
    """
    marked = (seeds > 0) & inside
    numbers = np.unique(seeds[marked]).astype(np.int64)
    order = np.pad(np.where(inside, flooding_order(heights, marked, inside), np.inf), 1, constant_values=np.inf)
    lowest = _minima(order, footprint=footprint_of(connectivity), allow_borders=False)[1:-1, 1:-1, 1:-1]
    markers = connected_components(lowest & inside & ~marked, connectivity).astype(np.int64)
    markers[markers > 0] += len(numbers)
    markers[marked] = np.searchsorted(numbers, seeds[marked]) + 1
    labels = flood(heights, markers, inside, connectivity)
    count = int(labels.max(initial=0)) + 1
    met = np.zeros(count, bool)
    met[labels[shared]] = True
    met[: len(numbers) + 1] = True
    saddles = saddles_of(labels, heights, connectivity)
    part = (np.cumsum(met) - 1)[saddles.forest(count, met)[1]]  # dense: background, seeds, basins that are met
    united = int(np.count_nonzero(met)) - len(numbers) - 1
    names = np.concatenate([[0], numbers, seed_count + 1 + np.arange(united)])
    rooted = np.arange(len(names)) <= len(numbers)
    passed, _ = saddles.renamed(part).forest(len(names), rooted)
    return Basins(names[part][labels], united, passed.renamed(names))


def saddles_of(labels: Array, heights: Array, connectivity: Connectivity) -> Saddles:
    """Where the basins of an array meet: the higher of the lower voxels of all pairs of neighbours, for each pair."""
    found = []
    for step in directions(connectivity):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, labels.shape, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, labels.shape, strict=True))
        meet = (labels[here] > 0) & (labels[there] > 0) & (labels[here] != labels[there])
        pairs = np.stack([labels[here][meet], labels[there][meet]], axis=1)
        found.append(Saddles.of(pairs, np.minimum(heights[here][meet], heights[there][meet])))
    return Saddles.together(found)


def subvolume_grid(volume: Vec3, most_voxels: int, connectivity: Connectivity) -> BlockGrid:
    """The subvolumes, which with the first plane of the next ones have at most so many voxels.

    The volume is halved along its longest axis until they do.

    Examples
    --------
    >>> subvolume_grid((100, 400, 400), 10**6, Connectivity(26)).block_shape
    (50, 100, 100)
    """
    side = [1 if connectivity.by_section else volume[0], *volume[1:]]
    while subvolume(Box.of_shape(vec3(side)), volume, connectivity).voxels > most_voxels:
        axis = max(range(3), key=lambda a: side[a])
        side[axis] = -(-side[axis] // 2)
    return BlockGrid(volume, vec3(side))


def subvolume(core: Box, volume: Vec3, connectivity: Connectivity) -> Box:
    """A subvolume and the first plane of the next ones."""
    z, y, x = core.stop
    return Box(core.start, (z + (not connectivity.by_section), y + 1, x + 1)).clip(volume)


def refining_grid(subvolumes: BlockGrid) -> BlockGrid:
    """Subvolumes of about the same size whose outer quarters are halos: they see what is behind the others' faces.

    Examples
    --------
    >>> refining_grid(BlockGrid((100, 400, 400), (100, 100, 50)))
    BlockGrid(volume=(100, 400, 400), block_shape=(100, 50, 26), halo=(0, 25, 12))
    """
    halo = [s // 4 if s < n else 0 for s, n in zip(subvolumes.block_shape, subvolumes.volume, strict=True)]
    core = [s - 2 * h for s, h in zip(subvolumes.block_shape, halo, strict=True)]
    return BlockGrid(subvolumes.volume, vec3(core), vec3(halo))


def ends_of(read: Box, volume: Vec3) -> Array:
    """bool (z, y, x): the outermost planes of a subvolume that do not lie at the border of the volume."""
    ends = np.zeros(read.shape, bool)
    for axis in range(3):
        for plane, inner in ((0, read.start[axis] > 0), (-1, read.stop[axis] < volume[axis])):
            if inner:
                np.moveaxis(ends, axis, 0)[plane] = True
    return ends


def shared_with(core: Box, read: Box) -> tuple[Array, Array]:
    """Which voxels of a subvolume others hold, too, and which of them are those others' own; bool (z, y, x) each."""
    own = np.zeros(read.shape, bool)
    own[core.relative_to(read).slices] = True
    shared = ~own
    for axis in range(3):
        if core.start[axis] > 0:
            np.moveaxis(shared, axis, 0)[0] = True
    return shared, ~own


def seeds_of_basins(saddles: Saddles, seed_count: int, count: int) -> Array:
    """The seed that floods each basin, u8 [count], from all saddles between seeds, 1 to ``seed_count``, and basins."""
    nodes, place = np.unique(saddles.pairs, return_inverse=True)
    _, root = Saddles(place.reshape(-1, 2), saddles.heights).forest(len(nodes), nodes <= seed_count)
    result = np.zeros(count, np.uint64)
    basins = nodes > seed_count
    result[nodes[basins] - seed_count - 1] = nodes[root[basins]]
    return result
