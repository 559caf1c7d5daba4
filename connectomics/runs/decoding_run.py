"""From labels or probabilities to objects: steps one after the other, then the final volume and its table.

``commands.decode`` calls ``run_decode`` for each volume. Whatever a step leaves on disk is whole or absent, so that a
rerun continues.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from connectomics.core.files import make_folder, write_text
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import BlockGrid, Box
from connectomics.core.process import new_mark
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.lease import STALE_S, Worker, pauses
from connectomics.execution.ledger import Ledger
from connectomics.execution.retry import PAUSES_S, RetryingReader, retried
from connectomics.execution.run_folder import PROVENANCE, SINGLE_WRITER, WORKERS
from connectomics.execution.runner import BlocksDone, OnBlock, RunStage, run_blocks
from connectomics.execution.task import Executor, RunReport, Task
from connectomics.objects.table import MeasurementUnits, table_key, write_table
from connectomics.runs.job import command_with_blocks
from connectomics.stages.decode.context import PLAN, DecodingState, ProbabilityOf, StepContext, kept_plan
from connectomics.stages.decode.step_contract import DecodingPass
from connectomics.stages.decode.tasks import Read
from connectomics.stages.output.finish import (
    FinalOutput,
    check_exportable,
    discard_stores,
    export_output,
    seal,
    unseal,
    work_folder,
)
from connectomics.volumes.store import Store, discard_locks
from connectomics.volumes.volume import VolumeInfo, VolumeReader

HERE = "decoder"  # the lease of each process that still needs what unfinished work has left


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
    stale_s: float = STALE_S
    pauses_s: tuple[float, ...] = PAUSES_S


def run_decode(job: DecodeJob, settings: DecodeSettings, executor: Executor, on_block: OnBlock) -> RunReport:
    """Bring one volume to its objects, continuing whatever an earlier run of the same result left.

    Several processes may do so at the same time: they share the blocks of each stage, one of them makes what is made
    of all blocks at once, and each returns when all is done. ``on_block`` is called with (finished, planned) blocks of
    each stage. Whatever ConnectomicsError is raised, finished blocks are kept and a rerun continues.
    """
    began = time.perf_counter()
    check_exportable(job.output, _info_of(job, job.plan), settings.folder, settings.budget_bytes)
    work, stages = job.work, list[BlocksDone]()
    make_folder(work)
    with Worker(work / WORKERS, stale_s=settings.stale_s) as worker:
        here = f"{HERE}.{new_mark()}"
        with worker.alone(SINGLE_WRITER):
            job = replace(job, plan=kept_plan(work / PLAN, job.plan))
            finished = job.is_finished(settings.folder)
            if not finished:
                worker.acquire(here)
            if not worker.others():
                for path in work.glob("*.zarr"):
                    discard_locks(path)

        def run(task: Task, ledger: Ledger) -> BlocksDone:
            stages.append(run_blocks(task, ledger, executor, worker, on_block=on_block))
            return stages[-1]

        try:
            if not finished:
                state, run_key = _objects(job, settings, run, worker=worker)
                worker.release(here)
                with _last(worker):
                    _finish(job, state, run_key, settings.folder, run=run)
        finally:
            report = _report(job, stages, began)
    return report


@contextlib.contextmanager
def _last(worker: Worker) -> Iterator[None]:
    """Wait until nobody else needs what unfinished work has left, and keep everybody out meanwhile.

    Who still needs it may be waiting to be alone, so nobody is kept out while one waits.
    """
    for pause in pauses():
        with worker.alone(SINGLE_WRITER):
            if worker.is_free(HERE):
                yield
                return
        time.sleep(pause)


def _objects(job: DecodeJob, settings: DecodeSettings, run: RunStage, worker: Worker) -> tuple[DecodingState, str]:
    """What the last step leaves, and the run key."""
    grid = BlockGrid(job.volume.info.extent, job.plan.block_shape)
    run_key = key_of({"result": job.output.result_key, "grid": list(grid.block_shape), "program": job.record.program})
    info, likely = job.volume.info, job.probabilities
    state = DecodingState(
        RetryingReader(job.volume, job.output.stem, settings.pauses_s),
        MeasurementUnits(info.voxel_size_nm, info.origin_nm, likely.units, own_units=likely.own_units),
        None if likely.read is None else _patiently(likely.read, job.output.stem, settings.pauses_s),
        of_labels=likely.of_labels,
    )
    alone = functools.partial(worker.alone, SINGLE_WRITER)
    context = StepContext(job.work, "", job.plan, grid, run_key=run_key, run=run, alone=alone)
    for number, each in enumerate(job.passes, 1):
        name = f"{number}_{each.step.name}"
        state = each.step.run(state, replace(context, name=name, selection=each.selection))
    return state, run_key


def _patiently(read: Read, name: str, pauses_s: tuple[float, ...]) -> Read:
    return lambda box: retried(lambda: read(box), f"reading probabilities of {name}", pauses_s)


def _finish(job: DecodeJob, state: DecodingState, run_key: str, folder: Path, run: RunStage) -> None:
    """Write what is still missing, and remove what is not needed any more."""
    assert isinstance(state.volume, Store), "every step leaves a store"
    if not job.is_finished(folder):  # else another process was first
        job.record.require_unchanged()
        stamp = dict(job.record.provenance) | {"run_key": run_key, "objects": state.count, **state.facts}
        if job.table is not None and state.tables is not None:
            unseal(job.run_folder, job.table)
            write_table(state.tables, state.count, job.table, state.frame, stamp=job.output.result_key)
        discard_locks(state.volume.path)
        for form in job.output.missing(folder):
            unseal(job.run_folder, job.output.paths(folder)[form])
        command = command_with_blocks(job.record.command, job.plan)
        record = stamp | {"result_keys": {job.output.name: job.output.result_key}, "command": command}
        write_text(job.run_folder / PROVENANCE, json.dumps(record, indent=1) + "\n")
        export_output(state.volume, job.output, folder, stamp, work=job.work, run=run)
    state.volume.close()
    seal(job.run_folder, job.paths(folder))
    discard_stores(job.work)


def _report(job: DecodeJob, stages: Sequence[BlocksDone], began: float) -> RunReport:
    """What this process did, of all stages; also in RUN."""
    report = RunReport(
        sum(stage.planned for stage in stages),
        sum(stage.skipped for stage in stages),
        sum(stage.done for stage in stages),
        sum(len(stage.failures) for stage in stages),
        windows=0,
        voxels=Box.of_shape(job.volume.info.extent).voxels,
        seconds=round(time.perf_counter() - began, 3),
    )
    write_text(job.run_folder / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    return report


def _info_of(job: DecodeJob, plan: BlockPlan) -> VolumeInfo:
    """The volume of ids, of the larger of their two types."""
    info = job.volume.info
    return VolumeInfo(
        (1, *info.extent), np.dtype(np.uint64), plan.chunk_shape, info.voxel_size_nm, origin_nm=info.origin_nm
    )
