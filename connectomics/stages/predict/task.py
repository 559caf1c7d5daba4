"""The predict task: one block from raw voxels to labels (and probabilities) on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.retry import PAUSES_S
from connectomics.execution.runner import write_block
from connectomics.execution.task import BlockRecord, Computed
from connectomics.inference.case import ReadBox
from connectomics.stages.predict.segmenter import Segmenter, Surveyed
from connectomics.stages.survey.region import RegionOfInterest
from connectomics.volumes.store import Store


@dataclass(frozen=True, slots=True)
class PredictTask:
    """Segments blocks into their shards of the working stores."""

    grid: BlockGrid
    segmenter: Segmenter
    surveyed: Surveyed
    read: ReadBox
    stores: Mapping[str, Store]
    pauses_s: tuple[float, ...] = PAUSES_S
    roi: RegionOfInterest | None = None

    @property
    def name(self) -> str:
        """Name of the task in logs."""
        return "predict"

    def process(self, block: Block) -> BlockRecord:
        """Compute a block, write its shards, return their checksums."""
        return self.keep(self.compute(block))

    def compute(self, block: Block) -> Computed:
        """Label a block."""
        began = time.perf_counter()
        arrays, windows = self.segmenter.segment_roi(self.read, self.surveyed, block.core, self.roi)
        return Computed(block, arrays, windows, time.perf_counter() - began)

    def keep(self, computed: Computed) -> BlockRecord:
        """Write a block's shards; their checksums."""
        began, block = time.perf_counter(), computed.block
        written = (write_block(s, block, computed.arrays[name], self.pauses_s) for name, s in self.stores.items())
        checksums = dict(written)
        seconds = computed.seconds + time.perf_counter() - began
        return BlockRecord(block.key, checksums, computed.windows, round(seconds, 3))
