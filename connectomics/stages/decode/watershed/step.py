"""The step ``watershed`` of ``decoding``: seeds grow until they meet or have filled their component.

``assembly.decoding`` makes it from the configuration; ``stages.decode.watershed.flooding`` holds its tasks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.errors import ConfigError
from connectomics.core.files import replacing
from connectomics.core.geometry import BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.basins import refining_grid, subvolume_grid
from connectomics.objects.components import Connectivity
from connectomics.objects.merge import AT_ONCE, OBJECTS, spans
from connectomics.objects.selection import Selection
from connectomics.objects.watershed import SEED_COUNTS, count_seeds
from connectomics.stages.decode.context import CUT, SUMMARY, DecodingState, StepContext
from connectomics.stages.decode.steps import EVERYTHING, Values, probability_units
from connectomics.stages.decode.tasks import PiecesTask, Read, smallest_dtype
from connectomics.stages.decode.watershed.flooding import ContestedComponents, Distance, Flooded, FloodTask, Seeds
from connectomics.stages.decode.watershed.subvolumes import (
    BasinTask,
    BridgeTask,
    FloodedSubvolumes,
    PaintedComponents,
    RefineTask,
    grow_trees,
)
from connectomics.volumes.volume import Array, VolumeInfo

log = logging.getLogger(__name__)
FLOOD = "flood"
LARGE = "large.npy"


@dataclass(frozen=True, slots=True)
class Watershed:
    """Objects are what seeds flood within the components of the foreground.

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
    selection
        Which objects stay.
    """

    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    seed_threshold: float | None = None
    seed_distance_nm: float | None = None
    keep_unseeded: bool = True
    max_component_voxels: int = 1 << 24
    selection: Selection = EVERYTHING

    @property
    def name(self) -> str:
        """As in the configuration."""
        return "watershed"

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Find the objects of the scene's volume.

        Raises
        ------
        ConfigError
            If the scene lacks the probabilities or the voxel size that the seeds need.
        """
        info, connectivity = state.volume.info, Connectivity(self.connectivity)
        values = Values(state.volume, self.channel, self.threshold, joined=True)
        likely, units = state.probabilities, state.frame.probability_units
        if self.threshold is not None:
            likely, units = values.raw, probability_units(info)
        heights, floor = self._heights(values, likely, state, context.grid)
        ground = _labelled(values, connectivity, info, context.part("components"))
        seeds = _labelled(Seeds(ground, heights, floor), connectivity, info, context.part("seeds"))
        contests, counts, large = self._contests(ground, seeds, context)
        task = FloodTask(
            context.grid, context.place(FLOOD), contests, seeds, heights=heights, connectivity=connectivity
        )
        task.folder.mkdir(exist_ok=True)
        context.do(task, task.folder)
        subvolumes = None
        if len(large):
            grid = subvolume_grid(context.grid.volume, self.max_component_voxels, connectivity)
            near = (lambda box: heights.near(box, floor)) if isinstance(heights, Distance) else heights
            basins = BasinTask(grid, task.folder, ground, seeds, large=large, heights=near, connectivity=connectivity)
            subvolumes = _in_subvolumes(basins, context.part("windows"))
        flooded = Flooded(contests, seeds.count, task.folder, subvolumes, keep_unseeded=self.keep_unseeded)
        last = context.part("objects")
        pieces = PiecesTask(
            last.grid, last.place(CUT), flooded, None, probabilities=likely, flat=connectivity.by_section
        )
        last.pieces(pieces)
        tables, count, largest = last.objects(pieces.folder, self.selection, joined=False, by_first=True)
        store = last.paint(pieces.folder, tables, info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, probability_units=units, flat=connectivity.by_section, classes=True)
        return DecodingState(store, frame, likely, tables, count=count, facts={**state.facts, context.name: counts})

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
    task = PiecesTask(context.grid, context.place(CUT), read, connectivity)
    context.pieces(task)
    tables, count, largest = context.objects(task.folder, EVERYTHING, joined=True)
    return PaintedComponents(context.paint(task.folder, tables, info, smallest_dtype(largest)), tables, count)


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


def _in_subvolumes(task: BasinTask, context: StepContext) -> FloodedSubvolumes:
    """Flood what is too large to be flooded whole."""
    task = dataclasses.replace(task, folder=context.place("basins"))
    bridges = BridgeTask(task.grid, context.place("bridges"), task.folder, task.connectivity)
    _do(task, context)
    _do(bridges, context)

    def make(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            grow_trees(task.grid, task.folder, bridges.folder, task.seeds.count, folder=temporary)

    coarse = FloodedSubvolumes(task.grid, task.folder, task.seeds.count, context.made("trees", make))
    refine = RefineTask(refining_grid(task.grid), context.place("refined"), task, coarse)
    _do(refine, context)
    return FloodedSubvolumes(refine.grid, refine.folder, task.seeds.count)


def _do(task: BasinTask | BridgeTask | RefineTask, context: StepContext) -> None:
    """Do the subvolumes of a task, which are cut by its own grid."""
    task.folder.mkdir(exist_ok=True)
    shape = task.grid.block_shape
    dataclasses.replace(context, grid=task.grid, plan=BlockPlan(shape, shape)).do(task, task.folder)
