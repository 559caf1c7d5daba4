"""Components that are too large for one flood: basins of subvolumes, bridges between subvolumes, and who floods each
basin.

The step ``watershed`` runs the block functions, each under a ledger of its own; ``FloodedSubvolumes`` reads what came
out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import Block, BlockGrid, Box, vec3
from connectomics.objects.arrays import load
from connectomics.objects.basins import Saddles, basins_of, ends_of, seeds_of_basins, shared_with, subvolume
from connectomics.objects.components import Connectivity
from connectomics.objects.watershed import RunLengths, flood
from connectomics.stages.decode.tasks import Read, block_file
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

SEEDS, FIRSTS = "seeds.npy", "firsts.npy"


@dataclass(frozen=True, slots=True)
class PaintedComponents:
    """Components that were found in all blocks and painted: their numbers, their rows and pieces, how many they are."""

    store: Store
    tables: Path
    count: int

    def read(self, box: Box) -> Array:
        """Numbers (z, y, x) of a box."""
        found: Array = self.store.read(box)[0]
        return found


@dataclass(frozen=True, slots=True)
class BlockBasins:
    """Cut into basins what lies in a subvolume of the components that are too large, those numbered in ``large``."""

    ground: PaintedComponents
    seeds: PaintedComponents
    large: Array
    heights: Read
    connectivity: Connectivity

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return a subvolume's basins, their saddles, and which basins have voxels of the next subvolumes."""
        core = block.core
        read = subvolume(core, grid.volume, self.connectivity)
        inside = np.isin(self.ground.read(read), self.large)
        if not inside.any():
            empty, none = np.zeros(core.shape, np.uint8), np.zeros((2, 0))
            return _basin_arrays(empty, 0, Saddles.together([]), none, beyond_heights=np.zeros(0))
        shared, others = shared_with(core, read)
        heights, seeds = self.heights(read), self.seeds.read(read)
        found = basins_of(heights, seeds, inside, shared, connectivity=self.connectivity, seed_count=self.seeds.count)
        at = np.flatnonzero(others & inside)
        beyond = np.stack([at, found.labels.ravel()[at]])
        own = found.labels[core.relative_to(read).slices]
        return _basin_arrays(own, found.count, found.saddles, beyond, beyond_heights=heights.ravel()[at])


def _basin_arrays(
    own: Array, count: int, saddles: Saddles, beyond: Array, beyond_heights: Array
) -> Mapping[str, Array]:
    arrays = {**_run_arrays(own), "count": np.array([count]), "pairs": saddles.pairs, "heights": saddles.heights}
    return arrays | {"beyond": beyond, "beyond_heights": beyond_heights.astype(np.float64)}


def _run_arrays(labels: Array) -> dict[str, Array]:
    runs = RunLengths.of(labels)
    return {"lengths": runs.lengths, "labels": runs.labels}


@dataclass(frozen=True, slots=True)
class BlockBridges:
    """Find which basins of a subvolume are which basins of the next ones: those of the voxels that both hold."""

    basins: Path
    connectivity: Connectivity

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the ``number`` of the subvolume that holds each voxel beyond, and its basin there, ``other``."""
        read = subvolume(block.core, grid.volume, self.connectivity)
        (beyond,) = load(block_file(self.basins, block), "beyond")
        places = np.stack(np.unravel_index(beyond[0].astype(np.int64), read.shape), axis=1) + read.start
        index = places // grid.block_shape
        number, other = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        for step in itertools.product((0, 1), repeat=3):
            there = vec3([i + s for i, s in zip(block.index, step, strict=True)])
            (among,) = np.nonzero((index == there).all(axis=1))
            if len(among):
                neighbour = grid.block(there)
                labels = _runs(self.basins, neighbour).array(neighbour.core.shape, np.int64)
                other[among] = labels[tuple((places[among] - neighbour.core.start).T)]
                number[among] = grid.number(there)
        return {"number": number, "other": other}


def _runs(folder: Path, block: Block) -> RunLengths:
    return RunLengths(*load(block_file(folder, block), "lengths", "labels"))


def grow_trees(grid: BlockGrid, basins: Path, bridges: Path, seed_count: int, folder: Path) -> None:
    """Find which seed floods each basin; in memory for all basins that touch other subvolumes.

    Leaves in ``folder``: ``firsts.npy``, the number of the first basin of each subvolume; ``seeds.npy`` u8, by basin.
    ``seed_count`` is the number of seeds in the volume.
    """
    counts = [int(load(block_file(basins, block), "count")[0][0]) for block in grid]
    firsts = np.cumsum([0, *counts])
    parts = []
    for number, block in enumerate(grid):
        pairs, heights = load(block_file(basins, block), "pairs", "heights")
        beyond, lasts = load(block_file(basins, block), "beyond", "beyond_heights")
        numbers, others = load(block_file(bridges, block), "number", "other")
        across = np.stack([beyond[1].astype(np.int64), others], axis=1)
        across += np.where(
            across > seed_count, np.stack([np.full(len(numbers), firsts[number]), firsts[numbers]], 1), 0
        )
        pairs += np.where(pairs > seed_count, firsts[number], 0)
        parts += [Saddles(pairs, heights), Saddles.of(across, lasts)]
    np.save(folder / SEEDS, seeds_of_basins(Saddles.together(parts), seed_count, int(firsts[-1])))
    np.save(folder / FIRSTS, firsts)


@dataclass(frozen=True, slots=True)
class FloodedSubvolumes:
    """What was flooded in subvolumes: labels above ``seed_count`` are basins, whose seeds lie in ``trees``."""

    grid: BlockGrid
    folder: Path
    seed_count: int
    trees: Path | None = None

    def read(self, box: Box, dtype: npt.DTypeLike) -> Array:
        """Seeds (z, y, x) of a box; 0 elsewhere."""
        result = np.zeros(box.shape, dtype)
        low = [start // side for start, side in zip(box.start, self.grid.block_shape, strict=True)]
        high = [-(-stop // side) for stop, side in zip(box.stop, self.grid.block_shape, strict=True)]
        for index in itertools.product(*(range(a, b) for a, b in zip(low, high, strict=True))):
            block = self.grid.block(vec3(list(index)))
            runs = self._seeds(block)
            if runs.labels.any():
                common = block.core.intersect(box)
                found = runs.array(block.core.shape, dtype)[common.relative_to(block.core).slices]
                result[common.relative_to(box).slices] = found
        return result

    def _seeds(self, block: Block) -> RunLengths:
        runs = _runs(self.folder, block)
        basin = runs.labels > self.seed_count
        if self.trees is not None and basin.any():
            firsts, seeds = (np.load(self.trees / name, mmap_mode="r") for name in (FIRSTS, SEEDS))
            at = runs.labels[basin].astype(np.int64) - self.seed_count - 1
            runs.labels[basin] = seeds[at + firsts[self.grid.number(block.index)]]
        return runs


@dataclass(frozen=True, slots=True)
class BlockRefinement:
    """Flood a subvolume anew, from seeds and from what the basins say at the ends of a halo; the core is kept."""

    cut: BlockBasins
    coarse: FloodedSubvolumes

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the runs of seeds; ``grid`` has halos."""
        halo = grid.block(block.index)  # a ledger's blocks have none
        return _run_arrays(self._flooded(halo.core, halo.read, grid))

    def _flooded(self, core: Box, read: Box, grid: BlockGrid) -> Array:
        cut, kept = self.cut, core.relative_to(read).slices
        inside = np.isin(cut.ground.read(read), cut.large)
        if not inside[kept].any():
            return np.zeros(core.shape, np.uint8)
        seeds = cut.seeds.read(read)
        coarse = self.coarse.read(read, seeds.dtype)
        markers = np.where(ends_of(read, grid.volume), coarse, seeds)
        found = flood(cut.heights(read), markers, inside, cut.connectivity)
        np.copyto(found, coarse, where=found == 0)  # what no marker of the subvolume reaches
        found[~inside] = 0
        return found[kept]
