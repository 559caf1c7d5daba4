"""Small runs of one volume in this process, with a predictor of two lines, for the tests of the pipeline."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Block, Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.execution.task import BlockFailure, BlockRecord, RunReport, Task
from connectomics.inference.case import CaseInput
from connectomics.inference.head import LabelRule, ProbabilityRule
from connectomics.models.spec import ChannelNormalisation
from connectomics.runs.job import JobRecord, Labeller, RunSettings, VolumeJob
from connectomics.runs.volume import run_volume
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter
from connectomics.volumes.volume import Array, VolumeInfo

from small_jobs import read_h5

EXTENT = (4, 12, 20)
PLAN = BlockPlan((1, 6, 10), (1, 6, 10))
BLOCKS = 16
IMAGE = np.random.default_rng(0).integers(1, 255, (1, *EXTENT), np.uint8)
EXPECTED = (IMAGE[0] > 128).astype(np.uint8)


class Reader:
    """A volume in memory."""

    info = VolumeInfo(IMAGE.shape, IMAGE.dtype, (1, 12, 20))
    identity: ClassVar[dict[str, object]] = {"name": "memory"}

    def __init__(self, image: Array = IMAGE) -> None:
        self.image = image

    def read(self, box: Box) -> Array:
        return self.image[(slice(None), *box.slices)]

    def close(self) -> None:
        """Nothing to close."""


class Bright:
    """Class 1 where the raw value exceeds 128; one "window" a section."""

    def __init__(self) -> None:
        self.cores: list[Box] = []

    def predict(self, parts: Iterable[tuple[CaseInput, Box]]) -> Iterator[tuple[Box, torch.Tensor]]:
        for source, core in parts:
            self.cores.append(core)
            value = torch.from_numpy(source.get(core)[0])
            yield core, torch.stack([torch.full_like(value, 128.5), value])

    def windows(self, source: CaseInput, core: Box) -> int:
        return core.shape[0]

    def try_memory(self, shape: Vec3, channels: int) -> None:
        """Nothing is taken."""


class NotNegative(Bright):
    """Class 1 where the normalised value is 0 or more."""

    def predict(self, parts: Iterable[tuple[CaseInput, Box]]) -> Iterator[tuple[Box, torch.Tensor]]:
        for source, core in parts:
            value = torch.from_numpy(source.get(core)[0])
            yield core, torch.stack([value < 0, value >= 0]).float()


class Shuffled:
    """An executor with an order of its own."""

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        order = list(blocks)
        random.Random(3).shuffle(order)
        return SerialExecutor().run(task, order)


class Failing:
    """An executor whose disk breaks after so many blocks."""

    def __init__(self, after: int) -> None:
        self._after = after

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        for i, record in enumerate(SerialExecutor().run(task, blocks)):
            if i == self._after:
                raise VolumeError("the disk is gone")
            yield record


def job_in(folder: Path, *, key: str = "k", probabilities: bool = False, **changes: Any) -> VolumeJob:
    rule = ProbabilityRule((1,)) if probabilities else None
    schemes = (ChannelNormalisation("NoNormalization"),)
    segmenter = Segmenter((EnsembleMember(Bright(), schemes),), 2, LabelRule(np.dtype(np.uint8)), rule)
    outputs = [FinalOutput(LABELS, "v_labels", key, ("h5",))]
    if probabilities:
        outputs.append(FinalOutput(PROBABILITIES, "v_labels_probabilities", f"{key}p", ("h5", "zarr")))
    job = VolumeJob(
        "v",
        folder / "v_labels.run",
        Reader(),
        Labeller(segmenter, BinaryFilters()),
        tuple(outputs),
        PLAN,
        JobRecord({"seed": 0}, ("again",)),
    )
    return changed(job, **changes)


def changed(job: VolumeJob, **changes: Any) -> VolumeJob:
    """The job with other values, whichever of its parts they belong to."""
    for part in ("labeller", "record", "limits"):
        own = {name: changes.pop(name) for name in list(changes) if hasattr(getattr(job, part), name)}
        job = replace(job, **{part: replace(getattr(job, part), **own)})
    return replace(job, **changes)


def settings_in(folder: Path, **changes: Any) -> RunSettings:
    return replace(RunSettings(folder, "program 1", 1 << 30, {"threads": 1}), **changes)


def silent(finished: int, planned: int) -> None:
    """Hear nothing."""


def run(folder: Path, job: VolumeJob, executor: Any = None, **changes: Any) -> RunReport:
    return run_volume(job, settings_in(folder, **changes), executor or SerialExecutor(), silent)


def labels(folder: Path) -> Array:
    return read_h5(folder / "v_labels.h5")


def cores(job: VolumeJob) -> list[Box]:
    predictor = job.labeller.segmenter.members[0].predictor
    assert isinstance(predictor, Bright)
    return predictor.cores
