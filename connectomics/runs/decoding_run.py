"""From labels or probabilities to objects: steps one after the other, then the final volume and its table.

``commands.decode`` calls ``run_decode`` for each volume. Whatever a step leaves on disk is whole or absent, so that a
rerun continues.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from connectomics.core.files import make_folder
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import BlockGrid, Box
from connectomics.execution.block_claims import Apart
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.lease import LIMIT_S
from connectomics.execution.ledger import Ledger
from connectomics.execution.name_claims import NameClaims
from connectomics.execution.publishing import Staging
from connectomics.execution.retry import PAUSES_S, RetryingReader, retried
from connectomics.execution.run_folder import COORDINATION, PREPARATION, SINGLE_WRITER, ledger_folders
from connectomics.execution.runner import BlocksDone, OnBlock, RunStage, run_blocks
from connectomics.execution.task import Executor, RunReport, Task
from connectomics.execution.worker import Worker
from connectomics.objects.table import MeasurementUnits, table_key, write_table
from connectomics.runs.job import command_with_blocks
from connectomics.runs.perseverance import until_it_stands
from connectomics.runs.run_report import Accounting, Subject
from connectomics.stages.decode.context import PLAN, DecodingState, ProbabilityOf, StepContext, kept_plan
from connectomics.stages.decode.step_contract import DecodingPass
from connectomics.stages.decode.tasks import Read
from connectomics.stages.output.finish import (
    FinalOutput,
    LevelsOfAnother,
    Publisher,
    check_exportable,
    check_names,
    export_output,
    seal,
    settle,
    withdrawing,
    work_folder,
)
from connectomics.volumes.store import Store, discard_locks
from connectomics.volumes.volume import VolumeInfo, VolumeReader


@dataclass(frozen=True, slots=True)
class DecodeRecord:
    """What is written about a result, and ``program``: its name and version, part of the run key.

    ``require_unchanged`` is that of ``JobRecord``.
    """

    program: str
    provenance: Mapping[str, object]
    command: tuple[str, ...]
    require_unchanged: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class TableProbabilities:
    """Probabilities (z, y, x) of a box for the table, or None, and how they are summed.

    ``of_labels`` gives those of other labels, see ``DecodingState``. ``own_units`` are those of the volume that is
    decoded, see ``MeasurementUnits``.
    """

    read: Read | None = None
    units: tuple[float, float] | None = None
    own_units: tuple[float, float] | None = None
    of_labels: ProbabilityOf | None = None


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One volume and what is wanted of it.

    Parameters
    ----------
    run_folder
        RUN.
    volume
        Labels, ids or probabilities.
    passes
        The steps, in order.
    output
        The final volume.
    table
        Final name of the table of objects, or None.
    plan
        How the volume is cut.
    record
        What is written about it.
    probabilities
        For the table.
    """

    run_folder: Path
    volume: VolumeReader
    passes: tuple[DecodingPass, ...]
    output: FinalOutput
    table: Path | None
    plan: BlockPlan
    record: DecodeRecord
    probabilities: TableProbabilities = TableProbabilities()

    @property
    def work(self) -> Path:
        """Folder of unfinished work."""
        return work_folder(self.run_folder, (self.output,), self.record.program)

    def paths(self, folder: Path) -> tuple[Path, ...]:
        """Final names in a folder."""
        return (*self.output.paths(folder).values(), *([] if self.table is None else [self.table]))

    def is_finished(self, folder: Path) -> bool:
        """Whether all that is wanted is there."""
        return not self.output.missing(folder) and not lacks_table(self.table, self.output.result_key)


def lacks_table(table: Path | None, result_key: str) -> bool:
    """Whether a table is wanted and is not there, or says that it is another result's."""
    return table is not None and not (table.exists() and table_key(table) in (None, result_key))


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How volumes are decoded; nothing here changes a voxel. See ``RunSettings``, whose fields these are."""

    folder: Path
    budget_bytes: int
    stale_s: float = LIMIT_S
    pauses_s: tuple[float, ...] = PAUSES_S


def run_decode(
    job: DecodeJob, settings: DecodeSettings, executor: Executor, on_block: OnBlock, apart: Apart | None = None
) -> RunReport:
    """Bring one volume to its objects, continuing whatever an earlier run of the same result left.

    Several processes may do so at the same time: they share the blocks of each stage, one of them makes what is made
    of all blocks at once, and each returns when all is done. ``on_block`` is called with (finished, planned) blocks of
    each stage. ``apart`` runs what may have killed processes in one of its own, with ``one_block.block_of_decoding``.
    Whatever ConnectomicsError is raised, finished blocks are kept and a rerun continues.
    """
    began = time.perf_counter()
    check_exportable(job.output, _info_of(job, job.plan), settings.folder, settings.budget_bytes)
    work, stages = job.work, list[BlocksDone]()
    make_folder(work)

    def standing() -> RunReport | None:
        return _report(job, stages, began) if job.is_finished(settings.folder) else None

    voxels = Box.of_shape(job.volume.info.extent).voxels
    subject = Subject(job.run_folder, work, lambda: ledger_folders(work), voxels)

    def joined() -> RunReport:
        with (
            withdrawing(job.run_folder, work, (job.output,)),
            Worker.of(work / COORDINATION, limit_s=settings.stale_s) as worker,
        ):

            def run(task: Task, ledger: Ledger) -> BlocksDone:
                stages.append(run_blocks(task, ledger, executor, worker, on_block=on_block, apart=apart))
                return stages[-1]

            names = [(job.output.stem, job.output.result_key)]
            with (
                NameClaims(settings.folder, names, work, worker) as claims,
                Accounting(subject, worker, idle=standing() is not None),
            ):
                check_names((job.output,), settings.folder)  # another run may have made them until just now
                return until_it_stands(
                    lambda: _attempt(job, settings, worker, claims, run=run, stages=stages, began=began), standing
                )

    report = until_it_stands(joined, standing)  # others may finish and tidy while this process joins them
    settle(job.run_folder, work, (job.output,), job.paths(settings.folder))
    return report


def _attempt(
    job: DecodeJob,
    settings: DecodeSettings,
    worker: Worker,
    claims: NameClaims,
    run: RunStage,
    stages: Sequence[BlocksDone],
    began: float,
) -> RunReport:
    """Go on from what is on the disk now to the final volume; a LeaseLostError where others did so meanwhile."""
    with worker.alone(PREPARATION):
        job = replace(job, plan=kept_plan(job.work / PLAN, job.plan))
        finished = job.is_finished(settings.folder)
        if not worker.others():
            for path in job.work.glob("*.zarr"):
                discard_locks(path)
    if not finished:
        state, run_key = objects(job, settings, run, functools.partial(worker.alone, PREPARATION))
        assert isinstance(state.volume, Store), "every step leaves a store"
        levels = LevelsOfAnother(worker, job.work, settings.folder, run)
        meanwhile = functools.partial(levels.fill, state.volume, job.output)
        alone = worker.alone(SINGLE_WRITER, meanwhile)
        with alone, Staging(job.work, worker, SINGLE_WRITER, claims.confirm) as staging:
            publisher = Publisher(staging, settings.folder, job.run_folder)
            _finish(job, state, run_key, publisher, run=run)
    return _report(job, stages, began)


def objects(
    job: DecodeJob, settings: DecodeSettings, run: RunStage, alone: Callable[[], AbstractContextManager[None]]
) -> tuple[DecodingState, str]:
    """Take all steps; what the last one leaves, and the run key. ``alone`` is that of ``StepContext``."""
    grid = BlockGrid(job.volume.info.extent, job.plan.block_shape)
    run_key = key_of({"result": job.output.result_key, "grid": list(grid.block_shape), "program": job.record.program})
    info, likely = job.volume.info, job.probabilities
    state = DecodingState(
        RetryingReader(job.volume, job.output.stem, settings.pauses_s),
        MeasurementUnits(info.voxel_size_nm, info.origin_nm, likely.units, own_units=likely.own_units),
        None if likely.read is None else _patiently(likely.read, job.output.stem, settings.pauses_s),
        of_labels=likely.of_labels,
    )
    context = StepContext(job.work, "", job.plan, grid, run_key=run_key, run=run, alone=alone)
    for number, each in enumerate(job.passes, 1):
        name = f"{number}_{each.step.name}"
        state = each.step.run(state, replace(context, name=name, selection=each.selection))
    assert isinstance(state.volume, Store), "every step leaves a store"
    return replace(state, volume=state.volume.told_in(job.plan.block_shape, job.plan.chunk_shape)), run_key


def _patiently(read: Read, name: str, pauses_s: tuple[float, ...]) -> Read:
    return lambda box: retried(lambda: read(box), f"reading probabilities of {name}", pauses_s)


def _finish(job: DecodeJob, state: DecodingState, run_key: str, publisher: Publisher, run: RunStage) -> None:
    """Write what is still missing."""
    assert isinstance(state.volume, Store), "every step leaves a store"
    if not job.is_finished(publisher.folder):  # else another process was first
        job.record.require_unchanged()
        stamp = dict(job.record.provenance) | {"run_key": run_key, "objects": state.count, **state.facts}
        command = command_with_blocks(job.record.command, job.plan)
        record = stamp | {"result_keys": {job.output.name: job.output.result_key}, "command": command}
        publisher.tell(json.dumps(record, indent=1) + "\n")
        if job.table is not None and state.tables is not None:
            place = publisher.staging.place(job.table.name)
            write_table(state.tables, state.count, place, state.frame, stamp=job.output.result_key)
            publisher.publish(place.name, job.table)
        export_output(state.volume, job.output, publisher, stamp, run=run)
        publisher.keep_ledgers()
    state.volume.close()
    seal(job.run_folder, job.paths(publisher.folder))


def _report(job: DecodeJob, stages: Sequence[BlocksDone], began: float) -> RunReport:
    """What this process did, of all stages."""
    return RunReport(
        sum(stage.planned for stage in stages),
        sum(stage.skipped for stage in stages),
        sum(stage.done for stage in stages),
        sum(len(stage.failures) for stage in stages),
        windows=0,
        voxels=Box.of_shape(job.volume.info.extent).voxels,
        seconds=round(time.perf_counter() - began, 3),
    )


def _info_of(job: DecodeJob, plan: BlockPlan) -> VolumeInfo:
    """The volume of ids, of the larger of their two types."""
    info = job.volume.info
    return VolumeInfo(
        (1, *info.extent), np.dtype(np.uint64), plan.chunk_shape, info.voxel_size_nm, origin_nm=info.origin_nm
    )
