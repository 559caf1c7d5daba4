"""The predict task: one block from raw voxels to labels (and probabilities) on disk."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from connectomics.geometry import AxisOrder, Block, BlockGrid, Box
from connectomics.inference.case import Case, CaseInput, ReadBox
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.inference.predictor import Predictor
from connectomics.inference.resample import ResampledPredictor, Resampling
from connectomics.io.store import Store
from connectomics.io.volume import Array
from connectomics.models.spec import ChannelNormalisation
from connectomics.pipeline.contracts import BlockRecord

LABELS = "labels"
PROBABILITIES = "probabilities"


@dataclass(frozen=True, slots=True)
class Segmenter:
    """A model ready to label boxes of a volume: predictor, normalisation and rules for what is kept.

    ``order`` is the model's order of axes. Volumes, cases and boxes come in the volume's; only the predictor and what
    it reads work in the model's.
    """

    predictor: Predictor
    schemes: tuple[ChannelNormalisation, ...]
    labels: LabelRule
    probabilities: ProbabilityRule | None
    resampling: Resampling | None = None
    order: AxisOrder = field(default_factory=AxisOrder)

    @property
    def plane_axis(self) -> int:
        """The volume's axis (0 = z, 1 = y, 2 = x) along which cases must know the range of each section."""
        axis = None if self.resampling is None else self.resampling.data_axis
        return 0 if axis is None else self.order.axes[axis]

    def outputs(self) -> tuple[str, ...]:
        """Names of what ``segment`` returns."""
        return (LABELS,) if self.probabilities is None else (LABELS, PROBABILITIES)

    def segment(self, read: ReadBox, cases: Sequence[Case], core: Box) -> dict[str, Array]:
        """Label a box of a volume.

        Parameters
        ----------
        read
            Raw voxels (c, z, y, x) of any box of the volume.
        cases
            Cases that cover ``core``.
        core
            The box.

        Returns
        -------
        arrays
            Each (c, z, y, x) of the box's extent; ``labels`` has one channel.
        """
        core = self.order.turn_box(core)
        result: dict[str, Array] = {LABELS: np.zeros((1, *core.shape), self.labels.dtype)}
        if self.probabilities is not None:
            outside = self.probabilities.background().reshape(-1, 1, 1, 1)
            result[PROBABILITIES] = np.broadcast_to(outside, (len(outside), *core.shape)).copy()
        for source, part in self._parts(read, cases, core):
            for box, logits in self._engine().predict(source, part):
                index = (slice(None), *box.relative_to(core).slices)
                result[LABELS][index] = self.labels.apply(logits)
                if self.probabilities is not None:
                    result[PROBABILITIES][index] = self.probabilities.apply(logits)
        back = self.order.inverse.of_array
        return {name: np.ascontiguousarray(array.transpose(back)) for name, array in result.items()}

    def windows(self, read: ReadBox, cases: Sequence[Case], core: Box) -> int:
        """Number of windows that ``segment`` computes."""
        parts = self._parts(read, cases, self.order.turn_box(core))
        return sum(self._engine().windows(source, part) for source, part in parts)

    def _engine(self) -> Predictor | ResampledPredictor:
        return self.predictor if self.resampling is None else ResampledPredictor(self.predictor, self.resampling)

    def _parts(self, read: ReadBox, cases: Sequence[Case], core: Box) -> Iterator[tuple[CaseInput, Box]]:
        """Each case that touches ``core``, and the part that it shares; in the model's axes, as ``core`` is."""
        turned = read if self.order.identity else self._turned(read)
        for case in cases:
            region, box = self.order.turn_box(case.region), self.order.turn_box(case.box)
            part = core.intersect(box)
            if part.voxels:
                yield CaseInput(Case(region, box, case.channels, case.plane_ranges), self.schemes, turned), part

    def _turned(self, read: ReadBox) -> ReadBox:
        back = self.order.inverse
        return lambda box: np.ascontiguousarray(read(back.turn_box(box)).transpose(self.order.of_array))


def cases_in(cases: Sequence[Case], box: Box) -> Sequence[Case]:
    """The cases (in order of z) that share sections with ``box``."""
    first = bisect_right(cases, box.start[0], key=lambda case: case.region.stop[0])
    last = first
    while last < len(cases) and cases[last].region.start[0] < box.stop[0]:
        last += 1
    return cases[first:last]


@dataclass(frozen=True, slots=True)
class PredictTask:
    """Segments blocks into their shards of the working stores."""

    grid: BlockGrid
    segmenter: Segmenter
    cases: Sequence[Case]
    read: ReadBox
    stores: Mapping[str, Store]

    @property
    def name(self) -> str:
        """Name of the task in logs."""
        return "predict"

    def process(self, block: Block) -> BlockRecord:
        """Compute a block, write its shards, return their checksums."""
        began = time.perf_counter()
        cases = cases_in(self.cases, block.core)
        arrays = self.segmenter.segment(self.read, cases, block.core)
        checksums = {}
        for name, store in self.stores.items():
            store.write(block.core, arrays[name])
            checksums[name] = store.checksum(block.core)
        windows = self.segmenter.windows(self.read, cases, block.core)
        return BlockRecord(block.key, checksums, windows, round(time.perf_counter() - began, 3))
