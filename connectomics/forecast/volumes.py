"""``connectomics plan``: what volumes will take before they are run; ``VolumeProcessor`` asks at the start of each."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engines import Engines
from connectomics.assembly.memory import peak_of
from connectomics.assembly.shared_sample import SharedSample
from connectomics.assembly.volumes import job_of, opened_source
from connectomics.core.errors import ConnectomicsError
from connectomics.core.geometry import BlockGrid, Box, vec3
from connectomics.execution.block_plan import plan_of
from connectomics.execution.run_folder import LEDGER
from connectomics.execution.stage import PROBABILITIES
from connectomics.forecast.calibration import WindowTimes, measure_pace, measure_windows
from connectomics.planning.forecast import (
    CostModel,
    Forecast,
    PlannedMemory,
    PlannedOutput,
    PlannedTime,
    PlannedWork,
    duration,
)
from connectomics.planning.workload import Partition, batch_fill, count_read, count_sample_windows, count_windows
from connectomics.runs.job import VolumeJob
from connectomics.runs.volume import info_of
from connectomics.stages.output.export import largest_size
from connectomics.stages.output.finish import work_folder
from connectomics.stages.output.size import OutputSize, store_size
from connectomics.volumes.listing import VolumeSource

log = logging.getLogger(__name__)
WORTH_WINDOWS = 256  # runs of fewer windows, or of less time in the network, are not measured for
WORTH_S = 30.0
BRIEFLY_S = 1.0  # of measuring windows at the start of a run


@dataclass(frozen=True, slots=True)
class Plan:
    """Forecasts of the volumes that can be labelled, and the reasons of those that cannot."""

    forecasts: tuple[Forecast, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def predicted_s(self) -> float:
        """All volumes one after the other."""
        return sum(f.time.seconds.median for f in self.forecasts if f.time is not None)

    @property
    def output(self) -> OutputSize:
        """All final outputs together."""
        return sum((f.output for f in self.forecasts), OutputSize(0, 0))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        total = {
            "volumes": len(self.forecasts),
            "blocks": sum(f.work.blocks for f in self.forecasts),
            "windows": sum(f.work.windows for f in self.forecasts),
            "predicted_s": round(self.predicted_s, 3),
            "output_bytes": self.output.nbytes,
            "output_files": self.output.files,
        }
        refused = [{"name": name, "reason": reason} for name, reason in self.refused]
        return {"volumes": [f.as_dict() for f in self.forecasts], "total": total, "refused": refused}

    def lines(self) -> list[str]:
        """Return the text for the screen."""
        lines = [line for f in self.forecasts for line in f.lines()]
        if len(self.forecasts) > 1:
            lines.append(
                f"{len(self.forecasts)} volumes: {sum(f.work.windows for f in self.forecasts)} windows, about "
                f"{duration(self.predicted_s)}, output at most {self.output.nbytes / 1e9:.3g} GB in "
                f"{self.output.files} files"
            )
        return lines + [f"refused: {name}: {reason}" for name, reason in self.refused]


def plan_volumes(engine: Engine, sources: Sequence[VolumeSource]) -> Plan:
    """Say what each volume takes, as if nothing was done yet.

    Their metadata are read, and a small part of an engine's first volume, on which its pace is measured.
    """
    forecasts: list[Forecast] = []
    refused: list[tuple[str, str]] = []
    engines, sample = Engines(engine), SharedSample(sources)
    paces: dict[int, CostModel] = {}
    for source in sources:
        try:
            with opened_source(engine, source) as (reader, roi):
                suiting = engines.suiting(reader)
                job = sample.shared_by(suiting, job_of(suiting, source, reader, previous=None, roi=roi))
                if id(suiting) not in paces:
                    paces[id(suiting)] = measure_pace(suiting, job, measure_windows(suiting))
                forecasts.append(forecast(suiting, job, paces[id(suiting)]))
        except ConnectomicsError as error:
            refused.append((source.name, str(error)))
    return Plan(tuple(forecasts), tuple(refused))


class JobForecaster:
    """Predicts volumes as they come; an engine is measured once, where a volume is long enough to be worth it."""

    def __init__(self) -> None:
        self._times: dict[int, tuple[Engine, WindowTimes]] = {}
        self._paces: dict[int, CostModel] = {}
        self._told: dict[Hashable, tuple[Engine, str, float | None]] = {}

    def with_forecast(self, engine: Engine, job: VolumeJob) -> VolumeJob:
        """The job with its predicted time, and a line of the plan in the log."""
        try:
            short, predicted_s = self._forecast(engine, job)
        except (ConnectomicsError, OSError, MemoryError) as error:  # the run itself will say what is wrong
            log.info("plan: none (%s)", error)
            return job
        log.info("plan: %s%s", short, "; too short to be timed" if predicted_s is None else "")
        return replace(job, record=replace(job.record, predicted_s=predicted_s))

    def _forecast(self, engine: Engine, job: VolumeJob) -> tuple[str, float | None]:
        """What is told of a volume and how many seconds it takes, if that is known; equal volumes are equal."""
        info, roi = job.reader.info, job.labeller.roi
        begun = (work_folder(job.run_folder, job.outputs, engine.settings.program) / LEDGER).exists()
        alike = (id(engine), id(engine) in self._paces, info.shape, info.dtype, info.chunk_shape, job.plan)
        if roi is None and not begun and alike in self._told:
            return self._told[alike][1:]
        told = forecast(engine, job, self._pace(engine, job))
        found = engine, told.short(), None if told.time is None else told.time.seconds.median
        if roi is None and not begun:
            self._told = {alike: found}  # one is enough, since equal ones follow each other
        return found[1:]

    def _pace(self, engine: Engine, job: VolumeJob) -> CostModel | None:
        """None where measuring would take a good part of the run."""
        partition, channels = _cut(engine, job), job.reader.info.channels
        counts = [count_windows(member, partition, channels) for member in job.labeller.segmenter.members]
        if id(engine) in self._paces or sum(counts) < WORTH_WINDOWS:
            return self._paces.get(id(engine))
        if id(engine) not in self._times:
            self._times[id(engine)] = engine, measure_windows(engine, BRIEFLY_S)
        times = self._times[id(engine)][1]
        if sum(n * t.median for n, t in zip(counts, times.full, strict=True)) < WORTH_S:
            return None
        self._paces[id(engine)] = measure_pace(engine, job, times)
        return self._paces[id(engine)]


def forecast(engine: Engine, job: VolumeJob, pace: CostModel | None) -> Forecast:
    """What one volume takes, its blocks with a wanted voxel counted; without a pace no time is told."""
    info, members = job.reader.info, job.labeller.segmenter.members
    partition = _cut(engine, job)
    windows = [count_windows(member, partition, info.channels) for member in members]
    contract = job.labeller.contract
    piece = None if contract is None or contract.shared is not None else contract.piece
    sampled = [0 if piece is None else count_sample_windows(m, partition, info.channels, piece) for m in members]
    passes = sum(n * m.window.passes * len(m.spec.folds) for n, m in zip(windows, engine.of_members, strict=True))
    whole = engine.inference.windows.whole
    pairs = list(zip(members, engine.of_members, strict=True))
    read = sum(count_read(member, model.window, partition, whole=whole) for member, model in pairs)
    fills = [batch_fill(member, model.window, partition, whole=whole) for member, model in pairs]
    filled = [n / f for n, f in zip(windows, fills, strict=True)]
    voxels = Box.of_shape(info.extent).voxels
    peak = peak_of(engine, job.labeller.segmenter, info, block=partition.block_shape)
    outputs, scratch = _sizes(engine, job, partition)
    everything = job.labeller.roi is None or _written_everywhere(job)
    wanted = voxels if everything else partition.voxels
    read = round(read * partition.voxels / partition.roi.voxels)
    return Forecast(
        job.name,
        PlannedWork(
            Partition(info.extent, partition.block_shape, Box.of_shape(info.extent)).blocks
            if everything
            else partition.blocks,
            partition.block_shape,
            sum(windows),
            passes,
            voxels=voxels,
            read_voxels=voxels + read,
        ),
        None if pace is None else PlannedTime(pace.predict(filled, sampled, voxels, wanted), pace.basis),
        PlannedMemory(peak.host_bytes, peak.device_bytes, engine.settings.budget_bytes),
        outputs=outputs,
        scratch=scratch,
        backend=", ".join(f"{key} {value}" for key, value in engine.settings.numeric_class.items()),
        notes=_not_counted(engine, job),
    )


def _cut(engine: Engine, job: VolumeJob) -> Partition:
    """Blocks as a run would cut them: as the ledger of an earlier one has them, where there is one."""
    ledger = work_folder(job.run_folder, job.outputs, engine.settings.program) / LEDGER
    plan = plan_of(ledger) or job.plan
    extent = job.reader.info.extent
    roi = job.labeller.roi
    if roi is None:
        return Partition(extent, plan.block_shape, Box.of_shape(extent))
    partition = Partition(extent, plan.block_shape, roi.box)
    if roi.mask is None:
        return partition
    first = vec3([low // size for low, size in zip(roi.box.start, plan.block_shape, strict=True)])
    touched = Box.of_shape(partition.counts).shift(first)
    return replace(partition, wanted=roi.blocks(BlockGrid(extent, plan.block_shape))[touched.slices])


def _written_everywhere(job: VolumeJob) -> bool:
    outside = job.labeller.segmenter.outside((1, 1, 1))
    return any(outside[output.name].any() for output in job.outputs)


def _sizes(engine: Engine, job: VolumeJob, partition: Partition) -> tuple[tuple[PlannedOutput, ...], OutputSize]:
    """Final outputs, and the working stores, which are gone when these are complete."""
    outputs, scratch = [], OutputSize(0, 0)
    for output in job.outputs:
        info, labels = info_of(job, output.name, job.plan), output.name != PROBABILITIES
        levels = None if output.pyramid else 1
        for form, path in output.paths(engine.settings.folder).items():
            size = largest_size(info, form, partition.block_shape, labels=labels, levels=levels)
            outputs.append(PlannedOutput(path, form, size))
        scratch += store_size(info, partition.block_shape)
    return tuple(outputs), scratch


def _not_counted(engine: Engine, job: VolumeJob) -> tuple[str, ...]:
    """What the time leaves out."""
    contract = job.labeller.contract
    tests = [
        (engine.inference.call.decodes, "the steps of decoding"),
        (engine.previous is not None, "the first stage of the cascade"),
        (contract and contract.shared, "the sample of fast against exact, which small volumes share"),
    ]
    return tuple(text for holds, text in tests if holds)
