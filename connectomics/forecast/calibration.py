"""How fast an engine goes on this machine, measured in seconds: a few windows, and a miniature run without the network.

The miniature is a real run of a small part of the user's own volume, from survey to export, in a temporary folder; a
stand-in gives logits at no cost, so that what is left is everything outside the network.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from connectomics.assembly.engine.backends import known_profile, measured_as
from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.rules import make_predictor
from connectomics.assembly.settings import InferenceSettings
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.overlapping import OverlappingExecutor
from connectomics.inference.predictor import Predictor, SlidingWindow
from connectomics.models.backends.contract import torch_threads
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.planning.forecast import CostModel, Timing
from connectomics.runs.job import JobRecord, Labeller, VolumeJob
from connectomics.runs.volume import run_volume
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.volumes.levels import grown
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

WINDOWS_S = 3.0  # of measuring windows of one model, after the first
FEWEST, MOST = 3, 15  # measurements
MINIATURE_VOXELS = 1 << 22
BLOB = 16  # voxels along an edge of what the stand-in finds
TUNED = "connectomics tune"


@dataclass(frozen=True, slots=True)
class WindowTimes:
    """What each member takes: seconds of a window, seconds with the stand-in, and where the first come from."""

    full: tuple[Timing, ...]
    stand_in: tuple[float, ...]
    basis: str


def measure_windows(engine: Engine, seconds: float = WINDOWS_S) -> WindowTimes:
    """Time a window of each model: the network as ``connectomics tune`` measured it, else as it goes now.

    Each is measured for about so many seconds, where a few windows do not take longer.
    """
    profile = None
    if len(engine.models) == 1:
        profile = known_profile(
            engine.inference.networks, engine.specs, [model.window.patch for model in engine.models]
        )
    tuned = None if profile is None else profile.window_s(*measured_as(engine.settings.numeric_class))
    full, without = [], []
    for model, member in zip(engine.of_members, engine.segmenter.members, strict=True):
        without.append(_window_seconds(_standing_in(engine.inference, model), model, seconds / 10).median)
        if tuned is None:
            full.append(_window_seconds(member.predictor, model, seconds))
        else:
            network = tuned * model.window.passes * len(model.spec.folds)
            full.append(Timing(network + without[-1], network, network + 2 * without[-1]))
    return WindowTimes(tuple(full), tuple(without), TUNED if tuned is not None else "a calibration of some windows")


def measure_pace(engine: Engine, job: VolumeJob, times: WindowTimes) -> CostModel:
    """Measure how fast an engine labels a volume.

    Nothing of the job is changed or kept; ConnectomicsError where the volume cannot be read or a miniature not be run.
    """
    sample_s = [0.0] * len(times.full)
    if engine.reference is not None:
        triples = zip(engine.of_members, engine.reference.segmenter.members, times.full, strict=True)
        sample_s = [t.median + _window_seconds(m.predictor, model, 0.0).median for model, m, t in triples]
    predictors = [_standing_in(engine.inference, model) for model in engine.of_members]
    voxel_s, fixed_s = _outside(job, engine, predictors, times.stand_in)
    survey_s = 0.0 if job.labeller.roi is None else min(voxel_s, _survey_seconds(job, engine))
    return CostModel(times.full, tuple(sample_s), voxel_s, fixed_s, basis=times.basis, survey_s=survey_s)


def _survey_seconds(job: VolumeJob, engine: Engine) -> float:
    """Seconds of a voxel in the survey of the middle of the volume."""
    part = _Part(job.reader, _shapes(job, engine)[1])
    began = time.perf_counter()
    job.labeller.segmenter.survey(part, job.name)
    return (time.perf_counter() - began) / Box.of_shape(part.info.extent).voxels


def _standing_in(stated: InferenceSettings, model: EngineModel) -> Predictor:
    network = _StandIn(model.window, model.spec.classes)
    backend = TorchBackend(network, device=stated.networks.device, batch=model.window.batch, threads=1)
    return make_predictor(stated.windows, (backend,) * len(model.spec.folds), model.window, model.spec)


class _StandIn(nn.Module):
    """A network that finds the same blobs in every window at once."""

    logits: torch.Tensor

    def __init__(self, window: SlidingWindow, classes: int) -> None:
        super().__init__()
        blobs = sum(np.ogrid[tuple(slice(n) for n in window.patch)][a] // BLOB for a in range(3)) % 2
        logits = torch.zeros((1, classes, *window.patch))
        logits[0, -1] = torch.from_numpy(np.where(blobs == 1, np.float32(1), np.float32(-1)))
        self.register_buffer("logits", logits)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, k, z, y, x] for windows float32 [n, c, z, y, x]."""
        return self.logits.repeat(len(batch), 1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class _Noise:
    """Windows of noise, a ``WindowSource``."""

    box: Box
    values: Array

    @property
    def channels(self) -> int:
        return len(self.values)

    def get(self, box: Box) -> Array:
        return np.ascontiguousarray(self.values[(slice(None), *box.slices)])


def _window_seconds(predictor: Predictor, model: EngineModel, seconds: float) -> Timing:
    """Measure full batches of windows from normalised voxels in memory to finished logits; seconds of one window."""
    window, width = model.window, model.window.patch[2]
    step = max(1, math.floor(width * window.step))
    shape = (*window.patch[:2], width + step * (window.batch - 1))
    noise = np.random.default_rng(0).standard_normal((model.spec.input_channels, *shape), np.float32)
    source = _Noise(Box.of_shape(shape), noise)
    count = predictor.windows(source, source.box)

    def once() -> float:
        began = time.perf_counter()
        for _, logits in predictor.predict([(source, source.box)]):
            logits.sum().item()  # so that a device has finished
        return (time.perf_counter() - began) / count

    with torch_threads(1):  # as ``Segmenter`` does
        once()
        values: list[float] = []
        ends = time.perf_counter() + seconds
        while len(values) < FEWEST or (len(values) < MOST and time.perf_counter() < ends):
            values.append(once())
    return Timing.of(values)


def _outside(
    job: VolumeJob, engine: Engine, predictors: Sequence[Predictor], window_s: Sequence[float]
) -> tuple[float, float]:
    """Seconds of a voxel outside the network, and those that every volume takes."""
    own = job.labeller.segmenter
    members = [replace(m, predictor=p) for m, p in zip(own.members, predictors, strict=True)]
    # a second stage finds background in the first one's labels
    members = [replace(m, previous=_background) if m.previous_values else m for m in members]
    segmenter = replace(own, members=tuple(members))
    measured = []
    for shape in dict.fromkeys(_shapes(job, engine)):
        voxels, windows, seconds = _miniature(job, engine, segmenter, shape)
        measured.append((voxels, seconds - windows * sum(window_s) / len(window_s)))
    (few, least), (many, most) = measured[0], measured[-1]
    if few == many:
        return 0.0, max(0.0, most)
    voxel_s = max(0.0, (most - least) / (many - few))
    return voxel_s, max(0.0, least - few * voxel_s)


def _background(box: Box) -> Array:
    return np.zeros((1, *box.shape), np.uint8)


def _shapes(job: VolumeJob, engine: Engine) -> tuple[Vec3, Vec3]:
    """A small and a large part of the volume that are measured."""
    members, extent = job.labeller.segmenter.members, job.reader.info.extent
    patches = [m.order.inverse.turn(e.window.patch) for m, e in zip(members, engine.of_members, strict=True)]
    patch = _within(extent, vec3([max(axis) for axis in zip(*patches, strict=True)]))
    return patch, _within(extent, grown(patch, extent, 1, max(MINIATURE_VOXELS, 2 * math.prod(patch))))


def _within(extent: Vec3, shape: Vec3) -> Vec3:
    return vec3([min(p, n) for p, n in zip(shape, extent, strict=True)])


def _miniature(job: VolumeJob, engine: Engine, segmenter: Segmenter, shape: Vec3) -> tuple[int, int, float]:
    """Run the middle of the volume; its voxels, windows of all members, and seconds."""
    chunk = _within(shape, job.plan.chunk_shape)
    block = vec3([-(-min(b, n) // c) * c for b, n, c in zip(job.plan.block_shape, shape, chunk, strict=True)])
    part = _Part(job.reader, shape)
    with _scratch(engine.settings.folder) as folder, _quiet_log():
        small = replace(
            job,
            run_folder=folder / "miniature.run",
            reader=part,
            labeller=Labeller(segmenter, job.labeller.filters),
            outputs=tuple(replace(output, result_key="miniature") for output in job.outputs),
            plan=BlockPlan(block, chunk),
            record=JobRecord({}, ()),
        )
        settings = replace(engine.settings, folder=folder)
        report = run_volume(small, settings, OverlappingExecutor(), lambda finished, planned: None)
    return report.voxels, report.windows, report.seconds


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder that vanishes, on the disk of the results where that may be written to."""
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    place = existing if os.access(existing, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix=".connectomics_plan_", dir=place) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """The log is the run's, not the miniature's."""
    logger = logging.getLogger("connectomics")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Part:
    """The middle of a volume as a volume of its own."""

    def __init__(self, reader: VolumeReader, shape: Vec3) -> None:
        found = reader.info
        self._reader = reader
        self._start = vec3([(n - s) // 2 for n, s in zip(found.extent, shape, strict=True)])
        chunk = _within(shape, found.chunk_shape)
        self.info: VolumeInfo = replace(found, shape=(found.channels, *shape), chunk_shape=chunk)
        self.identity: dict[str, object] = {}

    def read(self, box: Box) -> Array:
        return self._reader.read(box.shift(self._start))

    def close(self) -> None:
        """The volume stays open."""
