"""The step ``connected_components`` of decoding: objects are connected voxels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.components import Connectivity
from connectomics.stages.decode.context import DecodingState, StepContext
from connectomics.stages.decode.step_contract import DecodingMemory, Rules, StepInput, check_values, foreground_rules
from connectomics.stages.decode.tasks import BlockPieces, smallest_dtype
from connectomics.stages.decode.values import Values
from connectomics.volumes.volume import VolumeInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectedComponents:
    """Objects are connected voxels of one label, numbered 1, 2, … by their first voxel in raster order.

    Parameters
    ----------
    connectivity
        6, 18 or 26; 4 or 8 within sections.
    threshold
        Foreground of probabilities is what exceeds it; None for labels.
    channel
        Of a volume of probabilities.
    per_class
        Whether voxels of different labels are different objects.
    probabilities
        A volume of probabilities for the table.
    """

    name: str = "connected_components"
    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    per_class: bool = True
    probabilities: str | None = None
    selects: ClassVar[bool] = True

    def rules(self) -> Rules:
        """Say of each key that may be impossible whether it is possible."""
        twice = self.probabilities is not None and self.threshold is not None
        return foreground_rules(self.connectivity, self.channel, named_twice=twice)

    def check(self, key: str, given: StepInput) -> StepInput:
        """Refuse probabilities without a threshold, and labels of a run with one."""
        check_values(key, given, self.threshold, self.channel)
        known = given.probabilities or self.threshold is not None
        return dataclasses.replace(given, ids=True, probabilities=known)

    def plan(self, key: str, info: VolumeInfo, memory: DecodingMemory, plan: BlockPlan) -> BlockPlan:
        """Return ``plan``: these blocks are meant for it."""
        return plan

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Label a volume."""
        context, connectivity = context.finer(state.volume.info.chunk_shape), Connectivity(self.connectivity)
        values = Values(state.volume, self.channel, self.threshold, not self.per_class)
        likely, units, of_labels = state.probabilities, state.frame.probability_units, state.of_labels
        if self.threshold is not None:
            (likely, units), of_labels = values.of_threshold(state.frame.own_units), None
        pieces = context.pieces(BlockPieces(values, connectivity, probabilities=likely))
        tables, count, largest = context.objects(pieces, context.selection, joined=True)
        store = context.paint(pieces, tables, state.volume.info, smallest_dtype(largest))
        frame = dataclasses.replace(state.frame, probability_units=units, flat=connectivity.by_section)
        return DecodingState(store, frame, likely, tables, count=count, of_labels=of_labels)
