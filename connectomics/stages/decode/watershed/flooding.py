"""Seeds, the floods of components that fit, and what came out, block by block.

The step ``watershed`` runs ``BlockFloods`` under a ledger of its own. A component is flooded by the block
that holds its first voxel. A label is a component's number, or behind those the number of a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.geometry import Block, BlockGrid, Box, vec3
from connectomics.objects.arrays import load
from connectomics.objects.components import Connectivity
from connectomics.objects.distance import around, beyond, reach, squared_distance
from connectomics.objects.merge import IDS, OBJECTS, OFFSETS
from connectomics.objects.watershed import SEED_COUNTS, RunLengths, flood
from connectomics.stages.decode.tasks import Read, block_file, smallest_dtype
from connectomics.stages.decode.watershed.subvolumes import FloodedSubvolumes, PaintedComponents
from connectomics.volumes.volume import Array, Nanometres


@dataclass(frozen=True, slots=True)
class Distance:
    """The squared distance (pm²) of each voxel to the nearest one that is not foreground.

    Parameters
    ----------
    inside
        Whether a voxel is foreground, bool (z, y, x) of a box.
    grid
        Of the volume.
    voxel_size_nm
        (z, y, x).
    by_section
        Whether distances lie within sections.
    """

    inside: Read
    grid: BlockGrid
    voxel_size_nm: Nanometres
    by_section: bool

    def __call__(self, box: Box) -> Array:
        """Distances of a box, float64 (z, y, x): exact for the components that lie in it with all their voxels.

        All voxels between a voxel and the nearest one outside are of its own component, so that the latter is at
        most one voxel away from the component's box.
        """
        grown, inner = around(box, (0 if self.by_section else 1, 1, 1), self.grid.volume)
        return self._squared(grown)[inner.slices]

    def near(self, box: Box, distance_nm: float) -> Array:
        """Distances of a box, float64 (z, y, x): exact up to this one, larger ones are larger than it."""
        margin = reach(distance_nm, self.voxel_size_nm, by_section=self.by_section)
        grown, inner = around(box, margin, self.grid.volume)
        return self._squared(grown)[inner.slices]

    def _squared(self, box: Box) -> Array:
        inside = self.inside(box)
        if not self.by_section:
            return squared_distance(inside, self.voxel_size_nm)
        return np.concatenate([squared_distance(section[None], self.voxel_size_nm) for section in inside])


@dataclass(frozen=True, slots=True)
class Seeds:
    """Which voxels are seeds, as the number of their component.

    Parameters
    ----------
    ground
        Components of the foreground.
    heights
        What is flooded, the highest first.
    floor
        Seeds are higher: a height, or a distance in nm.
    """

    ground: PaintedComponents
    heights: Read | Distance
    floor: float

    def __call__(self, box: Box) -> Array:
        """Numbers (z, y, x) of a box; 0 where no seed is."""
        components = self.ground.read(box)
        if components.any():
            high = (
                beyond(self.heights.near(box, self.floor), self.floor)
                if isinstance(self.heights, Distance)
                else np.greater(self.heights(box), self.floor)
            )
            components[~high] = 0
        return components


@dataclass(frozen=True, slots=True)
class ContestedComponents:
    """Which components have several seeds, and which of them are too large to be flooded whole.

    ``folder`` has their numbers of seeds; ``most_voxels`` may have the box of a component that is flooded whole.
    """

    grid: BlockGrid
    ground: PaintedComponents
    folder: Path
    most_voxels: int

    def of(self, block: Block) -> tuple[Array, Array, Array]:
        """Components in a block, int64 ascending, their numbers of seeds, and their rows."""
        number = self.grid.number(block.index)
        offsets = np.load(self.ground.tables / OFFSETS, mmap_mode="r")
        ids = np.load(self.ground.tables / IDS, mmap_mode="r")[offsets[number] : offsets[number + 1]]
        here = np.unique(ids).astype(np.int64)
        counts = np.load(self.folder / SEED_COUNTS, mmap_mode="r")
        rows = np.load(self.ground.tables / OBJECTS, mmap_mode="r")
        return here, counts[here - 1], rows[here - 1]

    def fits(self, rows: Array) -> Array:
        """Which components are flooded whole; bool [n]."""
        sides = (rows["stop"] - rows["start"]).astype(np.int64)
        fits: Array = sides.prod(axis=1) <= self.most_voxels
        return fits

    def whole(self, block: Block) -> Iterator[tuple[int, Box, Block]]:
        """Components in a block that have several seeds and are flooded whole, their boxes, and who floods them."""
        here, counts, rows = self.of(block)
        flooded = (counts > 1) & self.fits(rows)
        for component, row in zip(here[flooded].tolist(), rows[flooded], strict=True):
            place = np.unravel_index(int(row["first"]), self.grid.volume)
            owner = vec3([int(p) // b for p, b in zip(place, self.grid.block_shape, strict=True)])
            yield component, Box(vec3(row["start"].tolist()), vec3(row["stop"].tolist())), self.grid.block(owner)


@dataclass(frozen=True, slots=True)
class Floods:
    """Seeds by voxel of the components that a block has flooded: runs over their boxes, one after the other."""

    components: Array
    edges: Array
    lengths: Array
    labels: Array

    @classmethod
    def of(cls, runs: dict[int, RunLengths]) -> Floods:
        """What was flooded, by component in ascending order."""
        edges = np.cumsum([0, *(len(each.lengths) for each in runs.values())])
        lengths = [each.lengths.astype(np.uint32) for each in runs.values()]
        labels = [each.labels for each in runs.values()]
        return cls(
            np.array(list(runs), np.int64),
            edges.astype(np.int64),
            np.concatenate([np.zeros(0, np.uint32), *lengths]),
            np.concatenate([np.zeros(0, np.uint64), *labels]),
        )

    @classmethod
    def loaded(cls, path: Path) -> Floods:
        """What a file holds."""
        names = ("components", "edges", "lengths", "labels")
        return cls(*load(path, *names))

    def runs(self, component: int) -> RunLengths:
        """Return those of one component, over its box."""
        i = int(np.searchsorted(self.components, component))
        span = slice(self.edges[i], self.edges[i + 1])
        return RunLengths(self.lengths[span], self.labels[span])

    def arrays(self) -> dict[str, Array]:
        """What is kept, by name."""
        return {"components": self.components, "edges": self.edges, "lengths": self.lengths, "labels": self.labels}


@dataclass(frozen=True, slots=True)
class BlockFloods:
    """Flood the components that have their first voxel in a block and several seeds, each in its own box."""

    contests: ContestedComponents
    seeds: PaintedComponents
    heights: Read
    connectivity: Connectivity

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """Return the arrays of ``Floods``."""
        whole = self.contests.whole(block)
        return Floods.of({n: self._flooded(n, box) for n, box, owner in whole if owner.index == block.index}).arrays()

    def _flooded(self, component: int, box: Box) -> RunLengths:
        inside = self.contests.ground.read(box) == component
        return RunLengths.of(flood(self.heights(box), self.seeds.read(box), inside, self.connectivity))


@dataclass(frozen=True, slots=True)
class Flooded:
    """The labels of a block: its components, and where they have several seeds the seeds that flooded them.

    ``seeds`` is how many there are. In ``folder`` lies what was flooded whole, in ``subvolumes`` what was too large for
    that.
    """

    contests: ContestedComponents
    seeds: int
    folder: Path
    subvolumes: FloodedSubvolumes | None
    keep_unseeded: bool

    def __call__(self, box: Box) -> Array:
        """Labels (z, y, x) of the core of a block."""
        grid, ground = self.contests.grid, self.contests.ground
        block = grid.block(vec3([start // side for start, side in zip(box.start, grid.block_shape, strict=True)]))
        components = ground.read(box)
        labels = components.astype(smallest_dtype(ground.count + self.seeds))
        if not self.keep_unseeded:
            here, counts, _ = self.contests.of(block)
            labels[np.isin(components, here[counts == 0])] = 0
        files: dict[str, Floods] = {}
        for component, whole, owner in self.contests.whole(block):
            if owner.key not in files:
                files[owner.key] = Floods.loaded(block_file(self.folder, owner))
            common = whole.intersect(box)
            flooded = files[owner.key].runs(component).array(whole.shape, labels.dtype)
            within = common.relative_to(box).slices
            parts = flooded[common.relative_to(whole).slices] + labels.dtype.type(ground.count)
            np.copyto(labels[within], parts, where=components[within] == component)
        if self.subvolumes is not None:
            parts = self.subvolumes.read(box, labels.dtype)
            np.copyto(labels, parts + labels.dtype.type(ground.count), where=parts > 0)
        return labels
