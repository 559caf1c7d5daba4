"""The step ``watershed`` of decoding: seeds grow until they meet or have filled their component.

``stages.decode.watershed.flooding`` and ``subvolumes`` hold what is done with a block.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.files import replacing
from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.basins import refining_grid, subvolume_grid
from connectomics.objects.components import Connectivity
from connectomics.objects.distance import reach
from connectomics.objects.merge import AT_ONCE, OBJECTS, spans
from connectomics.objects.watershed import SEED_COUNTS, count_seeds
from connectomics.stages.decode.context import (
    CHUNK,
    EVERYTHING,
    SUMMARY,
    VOXEL_BYTES,
    DecodingState,
    StepContext,
    decode_plan,
)
from connectomics.stages.decode.step_contract import DecodingMemory, Rules, StepInput, check_values, foreground_rules
from connectomics.stages.decode.tasks import BlockPieces, Read, smallest_dtype
from connectomics.stages.decode.values import Values
from connectomics.stages.decode.watershed.flooding import BlockFloods, ContestedComponents, Distance, Flooded, Seeds
from connectomics.stages.decode.watershed.subvolumes import (
    BlockBasins,
    BlockBridges,
    BlockRefinement,
    FloodedSubvolumes,
    PaintedComponents,
    grow_trees,
)
from connectomics.volumes.volume import Array, VolumeInfo

log = logging.getLogger(__name__)
FLOOD = "flood"
LARGE = "large.npy"
COMPONENT_VOXELS = (4096, 1 << 27)  # least and most of ``max_component_voxels``
FLOOD_BYTES = 104  # a voxel of a component's box while it is flooded, beside what is read of probabilities
DISTANCE_BYTES = 40  # a voxel whose distance is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Watershed:
    """Objects are what seeds flood within the components of the foreground, numbered by their first voxel.

    Parameters
    ----------
    connectivity
        6, 18 or 26; 4 or 8 within sections. Of the foreground, of seeds and of the flood.
    threshold
        Foreground of probabilities is what exceeds it; None where the volume holds labels, all of which are foreground.
    channel
        Of a volume of probabilities.
    seed_threshold
        Seeds are where the probability exceeds it, and the most probable voxels are flooded first; None for distance.
    seed_distance_nm
        Seeds are farther than this from what is not foreground, and the farthest voxels are flooded first.
    keep_unseeded
        Whether components without a seed are objects.
    max_component_voxels
        Of the bounding box of a component that is flooded whole; larger ones are flooded in subvolumes of this size.
    probabilities
        A volume of probabilities for seeds and table.
    """

    name: str = "watershed"
    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    seed_threshold: float | None = None
    seed_distance_nm: float | None = None
    keep_unseeded: bool = True
    max_component_voxels: int = 1 << 24
    probabilities: str | None = None
    selects: ClassVar[bool] = True

    def rules(self) -> Rules:
        """Say of each key that may be impossible whether it is possible."""
        high, deep = self.seed_threshold, self.seed_distance_nm
        floor = high if self.threshold is None else self.threshold
        least, most = COMPONENT_VOXELS
        twice = self.probabilities is not None and self.threshold is not None
        return {
            **foreground_rules(self.connectivity, self.channel, named_twice=twice),
            "seed_distance_nm": (deep is None or deep > 0, "must be positive"),
            "seed_threshold": (
                (high is None) != (deep is None) and (high is None or floor is None or high >= floor),
                "must be threshold or more, and exactly one of seed_threshold and seed_distance_nm is stated",
            ),
            "max_component_voxels": (least <= self.max_component_voxels <= most, f"must be {least} to {most}"),
        }

    def check(self, key: str, given: StepInput) -> StepInput:
        """Refuse thresholds of ids, seeds without probabilities, and distances where voxels have no size."""
        check_values(key, given, self.threshold, self.channel)
        if self.threshold is not None and given.ids:
            raise ConfigError(
                f"{key}.threshold is {self.threshold}, but the step before leaves ids, all of which are foreground; "
                "leave it out"
            )
        known = given.probabilities or self.threshold is not None or self.probabilities is not None
        if self.seed_threshold is not None and not known:
            if given.info is None:
                raise ConfigError(
                    f"{key}.seed_threshold needs the probabilities of all labels, which this run does not keep; "
                    "set inference.output.save_probabilities=true, with inference.test_time_augmentation."
                    "select_channel and act null, or state seed_distance_nm"
                )
            raise ConfigError(
                f"{key}.seed_threshold needs probabilities, which {given.uri} does not hold or bring; state threshold "
                "if it holds them, or probabilities=VOLUME, or take seed_distance_nm"
            )
        if self.seed_distance_nm is not None and given.info is not None and given.info.voxel_size_nm is None:
            raise VolumeError(
                f"{given.uri}: does not state its voxel size, which {key}.seed_distance_nm needs; set "
                "inference.voxel_size_nm=[z,y,x]"
            )
        return dataclasses.replace(given, ids=True, probabilities=known)

    def plan(self, key: str, info: VolumeInfo, memory: DecodingMemory, plan: BlockPlan) -> BlockPlan:
        """Return blocks whose distances fit, too.

        Raises ResourceError if none do, or the largest component that is flooded whole does not fit.
        """
        flat = Connectivity(self.connectivity).by_section
        voxels = min(self.max_component_voxels, math.prod(info.extent[1:] if flat else info.extent))
        channels = 0 if self.seed_threshold is None else info.channels * info.dtype.itemsize
        most = f"{key}.max_component_voxels"
        memory.require(
            voxels * (FLOOD_BYTES + channels),
            f"a component of {most}={self.max_component_voxels}",
            f"lower {most}, which changes the objects of larger components",
        )
        distance, size = self.seed_distance_nm, info.voxel_size_nm
        if distance is None or size is None:
            return plan
        margin = reach(distance, size, by_section=flat)

        def need(shape: Vec3) -> int:
            return Box.of_shape(shape).voxels * VOXEL_BYTES + around(shape)

        def around(shape: Vec3) -> int:
            sides = zip(Box.of_shape(shape).grow(margin).shape, info.extent, strict=True)
            return math.prod(min(side, n) for side, n in sides) * DISTANCE_BYTES

        part = memory.free_bytes
        while need(plan.block_shape) > memory.free_bytes and part >= VOXEL_BYTES * CHUNK**3:
            part //= 2
            plan = decode_plan(info, part)
        subvolumes = subvolume_grid(info.extent, self.max_component_voxels, Connectivity(self.connectivity))
        largest = max(need(plan.block_shape), around(subvolumes.block_shape))
        key = f"{key}.seed_distance_nm"
        memory.require(largest, f"{key}={distance}, {margin} voxels (z, y, x) around a block,", f"lower {key}")
        return plan

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Find the objects of a volume; a ConfigError if what its seeds need is unknown."""
        info, connectivity = state.volume.info, Connectivity(self.connectivity)
        values = Values(state.volume, self.channel, self.threshold, joined=True)
        likely, units = state.probabilities, state.frame.probability_units
        if self.threshold is not None:
            likely, units = values.of_threshold(state.frame.own_units)
        of_labels = state.of_labels if self.threshold is None else None
        heights, floor = self._heights(values, likely, state, context.grid)
        ground = _labelled(values, connectivity, info, context.part("components"))
        seeds = _labelled(Seeds(ground, heights, floor), connectivity, info, context.part("seeds"))
        contests, counts, large = self._contests(ground, seeds, context)
        floods = context.fill(FLOOD, BlockFloods(contests, seeds, heights, connectivity))
        subvolumes = None
        if len(large):
            grid = subvolume_grid(context.grid.volume, self.max_component_voxels, connectivity)
            near = (lambda box: heights.near(box, floor)) if isinstance(heights, Distance) else heights
            basins = BlockBasins(ground, seeds, large, near, connectivity=connectivity)
            subvolumes = _in_subvolumes(basins, grid, context.part("windows"))
        flooded = Flooded(contests, seeds.count, floods, subvolumes, keep_unseeded=self.keep_unseeded)
        last = context.part("objects")
        pieces = last.pieces(BlockPieces(flooded, None, probabilities=likely, flat=connectivity.by_section))
        tables, count, largest = last.objects(pieces, context.selection, joined=False, by_first=True)
        store = last.paint(pieces, tables, info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, probability_units=units, flat=connectivity.by_section, classes=True)
        facts = {**state.facts, context.name: counts}
        return DecodingState(store, frame, likely, tables, count=count, facts=facts, of_labels=of_labels)

    def _heights(
        self, values: Values, likely: Read | None, state: DecodingState, grid: BlockGrid
    ) -> tuple[Read, float]:
        """What is flooded, the highest first, and above which height seeds lie."""
        if self.seed_threshold is not None and likely is not None:
            return likely, self.seed_threshold
        size = state.frame.voxel_size_nm
        if self.seed_distance_nm is None or size is None:
            raise ConfigError(
                "watershed needs the probabilities of the volume for seed_threshold, or its voxel size for "
                "seed_distance_nm; state the former as probabilities, the latter as inference.voxel_size_nm"
            )
        return Distance(values, grid, size, Connectivity(self.connectivity).by_section), self.seed_distance_nm

    def _contests(
        self, ground: PaintedComponents, seeds: PaintedComponents, context: StepContext
    ) -> tuple[ContestedComponents, dict[str, int], Array]:
        """Which components are flooded, how many there are of each kind, and which are too large for one flood."""

        def make(path: Path) -> None:
            with replacing(path) as temporary:
                temporary.mkdir()
                count_seeds(seeds.tables, seeds.count, ground.count, temporary)
                counts, large = _counted(
                    ContestedComponents(context.grid, ground, temporary, self.max_component_voxels)
                )
                np.save(temporary / LARGE, large)
                (temporary / SUMMARY).write_text(json.dumps(counts | {"seeds": seeds.count}))
                if len(large):
                    log.warning(
                        "%s: %d of %d components are larger than max_component_voxels=%d and are flooded in subvolumes",
                        *(context.name, len(large), ground.count, self.max_component_voxels),
                    )

        folder = context.made("contests", make)
        counts: dict[str, int] = json.loads((folder / SUMMARY).read_text())
        return (
            ContestedComponents(context.grid, ground, folder, self.max_component_voxels),
            counts,
            np.load(folder / LARGE),
        )


def _labelled(read: Read, connectivity: Connectivity, info: VolumeInfo, context: StepContext) -> PaintedComponents:
    """The components of what is read, in a store."""
    pieces = context.pieces(BlockPieces(read, connectivity))
    tables, count, largest = context.objects(pieces, EVERYTHING, joined=True)
    return PaintedComponents(context.paint(pieces, tables, info, smallest_dtype(largest)), tables, count)


def _counted(contests: ContestedComponents) -> tuple[dict[str, int], Array]:
    """How many components there are of each kind, and the numbers of those that are flooded in subvolumes."""
    rows = np.load(contests.ground.tables / OBJECTS, mmap_mode="r")
    seeds = np.load(contests.folder / SEED_COUNTS, mmap_mode="r")
    count, large = contests.ground.count, [np.zeros(0, np.int64)]
    unseeded = contested = 0
    for span in spans(count, AT_ONCE):
        several = seeds[span] > 1
        unseeded += int(np.count_nonzero(seeds[span] == 0))
        contested += int(np.count_nonzero(several))
        large.append(np.flatnonzero(several & ~contests.fits(rows[span])) + span.start + 1)
    numbers = np.concatenate(large)
    return {"components": count, "unseeded": unseeded, "flooded": contested, "cut": len(numbers)}, numbers


def _in_subvolumes(cut: BlockBasins, grid: BlockGrid, context: StepContext) -> FloodedSubvolumes:
    """Flood what is too large to be flooded whole."""
    coarse_context, count = context.cut_by(grid), cut.seeds.count
    basins = coarse_context.fill("basins", cut)
    bridges = coarse_context.fill("bridges", BlockBridges(basins, cut.connectivity))

    def make(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            grow_trees(grid, basins, bridges, count, folder=temporary)

    coarse = FloodedSubvolumes(grid, basins, count, context.made("trees", make))
    fine = refining_grid(grid)
    return FloodedSubvolumes(fine, context.cut_by(fine).fill("refined", BlockRefinement(cut, coarse)), count)
