"""One block of a run that is under way, done again by a process that has nothing of the run but its job.

``jobs.apart`` calls this in a child process. It goes the way of the run, over what is on the disk already, to the stage
that the block belongs to. It holds no lease, publishes nothing and writes no ledger: its parent does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from connectomics.core.errors import LedgerError, VolumeError
from connectomics.core.geometry import Block
from connectomics.execution.ledger import Ledger
from connectomics.execution.publishing import STAGING
from connectomics.execution.run_folder import LEDGER
from connectomics.execution.runner import BlocksDone, attempt
from connectomics.execution.stage import LABELS, Workspace
from connectomics.execution.task import BlockFailure, BlockRecord, Task
from connectomics.runs.decoding_run import DecodeJob, DecodeSettings, objects
from connectomics.runs.job import RunSettings, VolumeJob
from connectomics.runs.surveying import surveyed_before
from connectomics.runs.volume import patient, predict_task
from connectomics.stages.decode.context import PLAN, kept_plan
from connectomics.stages.output.finish import begun_levels, work_folder
from connectomics.stages.predict.filters import filter_store
from connectomics.volumes.store import Store, open_store
from connectomics.volumes.watched import changed_input


class _Reached(Exception):
    """The block was tried."""

    def __init__(self, outcome: BlockRecord | BlockFailure) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class _OnlyBlock:
    """A ``RunStage`` that does one block and nothing else: all stages before its own are done."""

    folder: Path
    block: Block

    def __call__(self, task: Task, ledger: Ledger) -> BlocksDone:
        if ledger.folder == self.folder:
            self.reach(task)
        if ledger.finished < ledger.planned:
            raise LedgerError(
                f"{ledger.folder}: {ledger.finished} of {ledger.planned} blocks are done, although a later stage has "
                "begun; run again, what is missing is computed again"
            )
        return BlocksDone(ledger.planned, ledger.finished, done=0, windows=0, failures=())

    def reach(self, task: Task) -> NoReturn:
        """Try the block of this task; the outcome is raised, since nothing that follows is wanted."""
        if task.grid.block(self.block.index).core != self.block.core:
            raise LedgerError(f"{self.folder}: the volume is cut in another way now; run again")
        raise _Reached(attempt(task, self.block))

    def outcome_of(self, way: Callable[[], None]) -> BlockRecord | BlockFailure:
        """What became of the block that lies somewhere on the way."""
        try:
            way()
        except _Reached as reached:
            return reached.outcome
        raise LedgerError(f"{self.folder}: is the ledger of no stage of this run; run again")


def block_of_volume(job: VolumeJob, settings: RunSettings, folder: Path, block: Block) -> BlockRecord | BlockFailure:
    """Do a block of a stage of ``run_volume`` whose ledger lies in ``folder``, and put it on the disk.

    Raises
    ------
    ConnectomicsError
        If the stage is none of this job, or what comes before it is not on the disk.
    """
    work, only = work_folder(job.run_folder, job.outputs, settings.program), _OnlyBlock(folder, block)
    staging = _staging(folder, work, job.name)
    job, reader = patient(job, settings)
    workspace = Workspace(work, only, job.limits.filter_block_bytes)

    def way() -> None:
        surveyed = surveyed_before(job, reader, workspace)
        ledger = Ledger.existing(work / LEDGER)
        pending = [o for o in job.outputs if o.missing(settings.folder)]
        stores = {o.name: open_store(work / f"{o.name}.zarr") for o in pending}
        only(predict_task(job, settings, reader, ledger.grid, surveyed=surveyed, stores=stores), ledger)
        for output in pending:
            source = stores[output.name]
            source.expect(ledger.is_recorded)
            if output.name == LABELS and job.labeller.filters.active:
                source = filter_store(source, ledger.grid, workspace, job.labeller.filters)
            _reach(only, begun_levels(source, output, staging, settings.folder))

    return only.outcome_of(way)


def block_of_decoding(
    job: DecodeJob, settings: DecodeSettings, folder: Path, block: Block
) -> BlockRecord | BlockFailure:
    """As ``block_of_volume``, of a stage of ``run_decode``."""
    only = _OnlyBlock(folder, block)
    staging = _staging(folder, job.work, job.output.stem)

    def way() -> None:
        cut = replace(job, plan=kept_plan(job.work / PLAN, job.plan))
        state, _ = objects(cut, settings, only, nullcontext)
        assert isinstance(state.volume, Store), "every step leaves a store"
        _reach(only, begun_levels(state.volume, job.output, staging, settings.folder))

    return only.outcome_of(way)


def _staging(folder: Path, work: Path, name: str) -> Path:
    """The folder in which a stage works whose ledger lies in ``folder``: a job's work folder, or one in that.

    Raises VolumeError where the job has another work folder by now, since that is named by its result keys.
    """
    place = folder.parent
    if work != (place.parent if place.name.startswith(STAGING) else place):
        raise VolumeError(changed_input(name))
    return place


def _reach(only: _OnlyBlock, tasks: Mapping[Path, Task]) -> None:
    if only.folder in tasks:
        only.reach(tasks[only.folder])
