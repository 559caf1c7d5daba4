"""Components that are too large for one flood: basins of subvolumes, bridges between subvolumes, and who floods each
basin.

``stages.decode.watershed.step`` runs the two tasks, each under a ledger of its own; ``FloodedSubvolumes`` reads what
came out.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import Block, BlockGrid, Box, vec3
from connectomics.execution.task import BlockRecord
from connectomics.objects.arrays import load, save
from connectomics.objects.basins import Saddles, basins_of, ends_of, seeds_of_basins, shared_with, subvolume
from connectomics.objects.components import Connectivity
from connectomics.objects.watershed import RunLengths, flood
from connectomics.stages.decode.tasks import Read, block_file, saved
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

SEEDS, FIRSTS = "seeds.npy", "firsts.npy"


@dataclass(frozen=True, slots=True)
class PaintedComponents:
    """Components that were found in all blocks and painted.

    Parameters
    ----------
    store
        Their numbers.
    tables
        Their rows and pieces.
    count
        How many there are.
    """

    store: Store
    tables: Path
    count: int

    def read(self, box: Box) -> Array:
        """Numbers (z, y, x) of a box."""
        found: Array = self.store.read(box)[0]
        return found


@dataclass(frozen=True, slots=True)
class SavedArrays:
    """Arrays that a subvolume leaves behind."""

    arrays: dict[str, Array]

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        save(path, **self.arrays)


@dataclass(frozen=True, slots=True)
class BasinTask:
    """Cut into basins what lies in a subvolume of the components that are too large.

    Parameters
    ----------
    grid
        The subvolumes.
    folder
        Where the results go.
    ground, seeds
        Components of the foreground and of the seeds.
    large
        Numbers of the components that are flooded so.
    heights
        What is flooded, the highest first.
    connectivity
        Which voxels are neighbours.
    """

    grid: BlockGrid
    folder: Path
    ground: PaintedComponents
    seeds: PaintedComponents
    large: Array
    heights: Read
    connectivity: Connectivity

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.folder.name

    def process(self, block: Block) -> BlockRecord:
        """Cut a subvolume; its file is on disk on return."""
        began = time.perf_counter()
        return saved(self._cut(block.core), block_file(self.folder, block), block, began)

    def _cut(self, core: Box) -> SavedArrays:
        read = subvolume(core, self.grid.volume, self.connectivity)
        inside = np.isin(self.ground.read(read), self.large)
        if not inside.any():
            return _saved_arrays(
                np.zeros(core.shape, np.uint8), 0, Saddles.together([]), np.zeros((2, 0)), beyond_heights=np.zeros(0)
            )
        shared, others = shared_with(core, read)
        heights, seeds = self.heights(read), self.seeds.read(read)
        found = basins_of(heights, seeds, inside, shared, connectivity=self.connectivity, seed_count=self.seeds.count)
        at = np.flatnonzero(others & inside)
        beyond = np.stack([at, found.labels.ravel()[at]])
        own = found.labels[core.relative_to(read).slices]
        return _saved_arrays(own, found.count, found.saddles, beyond, beyond_heights=heights.ravel()[at])


def _saved_arrays(own: Array, count: int, saddles: Saddles, beyond: Array, beyond_heights: Array) -> SavedArrays:
    runs = RunLengths.of(own)
    arrays = {"lengths": runs.lengths, "labels": runs.labels, "count": np.array([count])}
    arrays |= {"pairs": saddles.pairs, "heights": saddles.heights}
    return SavedArrays(arrays | {"beyond": beyond, "beyond_heights": beyond_heights.astype(np.float64)})


@dataclass(frozen=True, slots=True)
class BridgeTask:
    """Find which basins of a subvolume are which basins of the next ones: those of the voxels that both hold.

    Parameters
    ----------
    grid
        The subvolumes.
    folder
        Where the results go.
    basins
        Where their basins lie.
    connectivity
        Which voxels are neighbours.
    """

    grid: BlockGrid
    folder: Path
    basins: Path
    connectivity: Connectivity

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.folder.name

    def process(self, block: Block) -> BlockRecord:
        """Look at a subvolume's last planes; its file is on disk on return."""
        began = time.perf_counter()
        read = subvolume(block.core, self.grid.volume, self.connectivity)
        (beyond,) = load(block_file(self.basins, block), "beyond")
        places = np.stack(np.unravel_index(beyond[0].astype(np.int64), read.shape), axis=1) + read.start
        index = places // self.grid.block_shape
        number, other = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        for step in itertools.product((0, 1), repeat=3):
            there = vec3([i + s for i, s in zip(block.index, step, strict=True)])
            (among,) = np.nonzero((index == there).all(axis=1))
            if len(among):
                neighbour = self.grid.block(there)
                labels = _runs(self.basins, neighbour).array(neighbour.core.shape, np.int64)
                other[among] = labels[tuple((places[among] - neighbour.core.start).T)]
                number[among] = self.grid.number(there)
        return saved(SavedArrays({"number": number, "other": other}), block_file(self.folder, block), block, began)


def _runs(folder: Path, block: Block) -> RunLengths:
    return RunLengths(*load(block_file(folder, block), "lengths", "labels"))


def grow_trees(grid: BlockGrid, basins: Path, bridges: Path, seed_count: int, folder: Path) -> None:
    """Find which seed floods each basin; in memory for all basins that touch other subvolumes.

    Leaves in ``folder``: ``firsts.npy``, the number of the first basin of each subvolume; ``seeds.npy`` u8, by basin.

    Parameters
    ----------
    grid
        The subvolumes.
    basins, bridges
        Where the tasks' results lie.
    seed_count
        Seeds in the volume.
    folder
        Empty folder for the tables.
    """
    counts = [int(load(block_file(basins, block), "count")[0][0]) for block in grid]
    firsts = np.cumsum([0, *counts])
    parts = []
    for number, block in enumerate(grid):
        pairs, heights, beyond, lasts = load(block_file(basins, block), "pairs", "heights", "beyond", "beyond_heights")
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
    """What was flooded in subvolumes.

    Parameters
    ----------
    grid
        The subvolumes.
    folder
        Where their labels lie.
    seed_count
        Seeds in the volume.
    trees
        Where the seeds of basins lie, where the labels are basins, too.
    """

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
class RefineTask:
    """Flood subvolumes anew, from seeds and from what the basins say at the ends of a halo; of each the core is kept.

    Parameters
    ----------
    grid
        FloodedSubvolumes with halos.
    folder
        Where the results go.
    cut
        The task that has cut the basins.
    coarse
        The basins' seeds.
    """

    grid: BlockGrid
    folder: Path
    cut: BasinTask
    coarse: FloodedSubvolumes

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.folder.name

    def process(self, block: Block) -> BlockRecord:
        """Flood a subvolume; its file is on disk on return."""
        began = time.perf_counter()
        subvolume = self.grid.block(block.index)  # a ledger's blocks have no halo
        runs = RunLengths.of(self._flooded(subvolume.core, subvolume.read))
        return saved(SavedArrays(asdict(runs)), block_file(self.folder, block), block, began)

    def _flooded(self, core: Box, read: Box) -> Array:
        cut, kept = self.cut, core.relative_to(read).slices
        inside = np.isin(cut.ground.read(read), cut.large)
        if not inside[kept].any():
            return np.zeros(core.shape, np.uint8)
        seeds = cut.seeds.read(read)
        coarse = self.coarse.read(read, seeds.dtype)
        markers = np.where(ends_of(read, self.grid.volume), coarse, seeds)
        found = flood(cut.heights(read), markers, inside, cut.connectivity)
        np.copyto(found, coarse, where=found == 0)  # what no marker of the subvolume reaches
        found[~inside] = 0
        return found[kept]
