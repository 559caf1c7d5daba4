"""One volume from start to end: survey, blocks under a ledger, filters, exports, report.

``VolumeProcessor`` calls ``run_volume`` for each volume that is not finished.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from connectomics.core.errors import MissingShardError, OutputError, QuarantineError
from connectomics.core.files import discard, fsync_path, make_folder
from connectomics.core.geometry import BlockGrid, Box
from connectomics.execution.block_claims import Apart
from connectomics.execution.block_plan import HEADER, BlockPlan, plan_of, read_header
from connectomics.execution.lease import LeaseLostError
from connectomics.execution.ledger import Ledger
from connectomics.execution.name_claims import NameClaims
from connectomics.execution.publishing import Staging
from connectomics.execution.retry import RetryingReader
from connectomics.execution.run_folder import COORDINATION, LEDGER, PREPARATION, SINGLE_WRITER
from connectomics.execution.runner import (
    BlocksDone,
    OnBlock,
    RunStage,
    failure_message,
    run_blocks,
    void_lost,
    void_lost_if_any,
)
from connectomics.execution.stage import LABELS, Workspace
from connectomics.execution.task import Executor, RunReport
from connectomics.execution.worker import Worker
from connectomics.runs.agreement import agreement_of
from connectomics.runs.job import RunSettings, VolumeJob
from connectomics.runs.perseverance import until_it_stands
from connectomics.runs.run_report import Accounting, Subject
from connectomics.runs.stamps import record_of, run_key_of, stamp_of, unit_of
from connectomics.runs.surveying import survey_together, surveyed_before
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
from connectomics.stages.predict.filters import filter_store
from connectomics.stages.predict.precision_check import Agreement
from connectomics.stages.predict.segmenter import Surveyed
from connectomics.stages.predict.task import PredictTask
from connectomics.stages.survey.region import RegionOfInterest
from connectomics.volumes.store import Store, create_store, discard_locks, open_store
from connectomics.volumes.volume import VolumeInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the blocks of a volume need; ``sources`` are what is exported, which are complete."""

    work: Path
    run_key: str
    ledger: Ledger
    surveyed: Surveyed
    pending: tuple[FinalOutput, ...]
    stores: Mapping[str, Store]
    agreement: Agreement | None
    sources: Mapping[str, Store] = field(default_factory=dict)


def run_volume(
    job: VolumeJob, settings: RunSettings, executor: Executor, on_block: OnBlock, apart: Apart | None = None
) -> RunReport:
    """Bring one volume to its final outputs, continuing whatever an earlier run of the same result left.

    Several processes may do so at the same time: they share the blocks, and each returns when all is done. ``on_block``
    is called with (finished, planned) blocks at the start and after each block. ``apart`` runs what may have killed
    processes in one of its own, with ``one_block.block_of_volume``. Whatever ConnectomicsError is raised, finished
    blocks are kept and a rerun continues.
    """
    for note in job.reader.info.notes:
        log.warning("%s: %s", job.name, note)
    for output in job.outputs:
        check_exportable(output, info_of(job, output.name, job.plan), settings.folder, settings.budget_bytes)
    work = work_folder(job.run_folder, job.outputs, settings.program)
    _make_work_folder(work)
    job, reader = patient(job, settings)
    names = [(output.stem, output.result_key) for output in job.outputs]

    def standing() -> RunReport | None:
        if any(output.missing(settings.folder) for output in job.outputs):
            return None
        planned = len(BlockGrid(reader.info.extent, job.plan.block_shape))
        return RunReport(
            planned, planned, done=0, failed=0, windows=0, voxels=Box.of_shape(reader.info.extent).voxels, seconds=0.0
        )

    def ledgers() -> tuple[Path, ...]:
        return (work / LEDGER,) if _is_begun(work) else ()  # else a process made it in memory

    voxels = Box.of_shape(reader.info.extent).voxels
    subject = Subject(job.run_folder, work, ledgers, voxels, predicted_s=job.record.predicted_s)

    def joined() -> RunReport:
        with (
            withdrawing(job.run_folder, work, job.outputs),
            Worker.of(work / COORDINATION, limit_s=settings.stale_s) as worker,
            NameClaims(settings.folder, names, work, worker) as claims,
            Accounting(subject, worker, idle=standing() is not None),
        ):
            check_names(job.outputs, settings.folder)  # another run may have made them until just now
            crew = _Crew(worker, claims, executor, on_block, apart=apart)
            return until_it_stands(
                lambda: _attempt(work, job, reader, settings, crew=crew, standing=standing), standing
            )

    report = until_it_stands(joined, standing)  # others may finish and tidy while this process joins them
    settle(job.run_folder, work, job.outputs, (p for o in job.outputs for p in o.paths(settings.folder).values()))
    return report


@dataclass(frozen=True, slots=True)
class _Crew:
    """Who does the work: this process among others, whoever runs its blocks, who hears of them."""

    worker: Worker
    claims: NameClaims
    executor: Executor
    on_block: OnBlock
    apart: Apart | None


def patient(job: VolumeJob, settings: RunSettings) -> tuple[VolumeJob, RetryingReader]:
    """The job and its volume, both read again where reading fails for a moment."""
    if job.labeller.roi is not None:
        roi = job.labeller.roi.patiently(settings.pauses_s)
        job = replace(job, labeller=replace(job.labeller, roi=roi))
    return job, RetryingReader(job.reader, job.name, settings.pauses_s)


def _is_begun(work: Path) -> bool:
    return (work / LEDGER / HEADER).exists()


def _attempt(
    work: Path,
    job: VolumeJob,
    reader: RetryingReader,
    settings: RunSettings,
    crew: _Crew,
    standing: Callable[[], RunReport | None],
) -> RunReport:
    """Go on from what is on the disk now to the final outputs; a LeaseLostError where others did so meanwhile."""
    began, worker = time.perf_counter(), crew.worker
    run = functools.partial(run_blocks, executor=crew.executor, worker=worker, on_block=crew.on_block, apart=crew.apart)
    alone = functools.partial(worker.alone, PREPARATION)
    workspace = Workspace(work, run, job.limits.filter_block_bytes, alone)
    if not _is_begun(work):
        with worker.alone(SINGLE_WRITER):
            if told := standing():
                return told  # another process made it in memory at once
    kept = survey_together(job, reader, workspace)
    with alone():
        prepared = _prepare(workspace, job, reader, settings, worker=worker, kept=kept)
    ledger = prepared.ledger
    try:
        task = predict_task(job, settings, reader, ledger.grid, surveyed=prepared.surveyed, stores=prepared.stores)
        blocks = run(task, ledger)
        if not blocks.failures:
            prepared = _filtered(prepared, job, workspace)
            meanwhile = functools.partial(_fill_levels, prepared, LevelsOfAnother(worker, work, settings.folder, run))
            single = worker.alone(SINGLE_WRITER, meanwhile)
            with single, Staging(work, worker, SINGLE_WRITER, crew.claims.confirm) as staging:
                publisher = Publisher(staging, settings.folder, job.run_folder)
                _finish(prepared, job, settings, run, publisher=publisher)
        return _report(job, prepared, blocks, began)
    except MissingShardError:  # whoever reads it undoes the record
        void_lost(ledger, work, [store.path.name for store in prepared.stores.values()])
        raise
    finally:
        ledger.close()
        for store in (*prepared.stores.values(), *prepared.sources.values()):
            store.close()


def predict_task(
    job: VolumeJob,
    settings: RunSettings,
    reader: RetryingReader,
    grid: BlockGrid,
    surveyed: Surveyed,
    stores: Mapping[str, Store],
) -> PredictTask:
    """The first stage of blocks."""
    labeller = job.labeller
    return PredictTask(
        grid,
        labeller.segmenter,
        surveyed,
        reader.read,
        stores=stores,
        pauses_s=settings.pauses_s,
        roi=labeller.roi,
    )


def _prepare(
    workspace: Workspace,
    job: VolumeJob,
    reader: RetryingReader,
    settings: RunSettings,
    worker: Worker,
    kept: Surveyed | None,
) -> _Prepared:
    """Survey, agreement, ledger and stores; records whose shards were lost are undone."""
    work = workspace.work
    plan = plan_of(work / LEDGER) or job.plan  # a rerun elsewhere cuts the volume as it was begun
    if job.limits.on_device and plan != job.plan:
        job.labeller.segmenter.try_memory(plan.block_shape)
    run_key, extent = run_key_of(job, plan, settings.program), reader.info.extent
    surveyed = surveyed_before(job, reader, workspace, kept)
    agreement = agreement_of(work, job, reader, surveyed)
    ledger = Ledger(
        work / LEDGER, run_key, settings.numeric_class, plan, volume=extent, allow_other_class=settings.allow_mixed
    )
    try:
        missing = {output: output.missing(settings.folder) for output in job.outputs}
        pending = tuple(output for output, formats in missing.items() if formats)
        stores = {o.name: _store(work / f"{o.name}.zarr", job, o.name, plan) for o in pending}
        if not worker.others():
            for store in stores.values():
                discard_locks(store.path)
        if job.labeller.roi is not None:
            _choose_blocks(ledger, job, job.labeller.roi)
        if any(output.missing(settings.folder) != found for output, found in missing.items()):
            raise LeaseLostError(PREPARATION)  # published meanwhile: what it was made from may be gone already
        if pending:
            void_lost_if_any(ledger, work, [store.path.name for store in stores.values()])
    except BaseException:
        ledger.close()
        raise
    return _Prepared(work, run_key, ledger, surveyed, pending=pending, stores=stores, agreement=agreement)


def _filtered(prepared: _Prepared, job: VolumeJob, workspace: Workspace) -> _Prepared:
    """What is exported, filtered together with whoever does the same."""
    prepared.ledger.refresh()
    sources = dict(prepared.stores)
    for store in sources.values():
        store.expect(prepared.ledger.is_recorded)
    if LABELS in sources and job.labeller.filters.active:
        sources[LABELS] = filter_store(sources[LABELS], prepared.ledger.grid, workspace, job.labeller.filters)
    return replace(prepared, sources=sources)


def _fill_levels(prepared: _Prepared, levels: LevelsOfAnother) -> None:
    """Do blocks of chunked outputs that another process builds and will publish."""
    for output in prepared.pending:
        levels.fill(prepared.sources[output.name], output)


def _finish(prepared: _Prepared, job: VolumeJob, settings: RunSettings, run: RunStage, publisher: Publisher) -> None:
    """Write what is still missing of the outputs."""
    pending = [o for o in prepared.pending if o.missing(settings.folder)]  # another process may have been first
    if pending:
        job.record.require_unchanged()
    prepared.ledger.refresh()
    stamp = stamp_of(job, prepared.surveyed, prepared.agreement, run_key=prepared.run_key) | {
        "numeric_class": "mixed" if prepared.ledger.mixed else dict(settings.numeric_class)
    }
    if pending:
        plan = BlockPlan(prepared.ledger.grid.block_shape, job.plan.chunk_shape)
        publisher.tell(record_of(job, settings, stamp, plan))
    for output in pending:
        export_output(prepared.sources[output.name], output, publisher, stamp | unit_of(job, output), run=run)
        _discard_sources(prepared, output.name, publisher)
    publisher.keep_ledgers()
    seal(job.run_folder, (p for o in job.outputs for p in o.paths(settings.folder).values()))


def _discard_sources(prepared: _Prepared, name: str, publisher: Publisher) -> None:
    """Free the disk of what was exported, where nobody else may still read it."""
    if publisher.staging.is_unobserved():
        for store in {prepared.sources[name], prepared.stores[name]}:
            store.close()
            discard(store.path)


def _report(job: VolumeJob, prepared: _Prepared, blocks: BlocksDone, began: float) -> RunReport:
    """What this process did; raises QuarantineError if blocks failed."""
    voxels = Box.of_shape(prepared.ledger.grid.volume).voxels
    seconds = round(time.perf_counter() - began, 3)
    failed = len(blocks.failures)
    predicted = (
        None
        if job.record.predicted_s is None
        else round(job.record.predicted_s * blocks.done / max(1, blocks.planned), 3)
    )
    ratio = round(seconds / predicted, 3) if predicted else None
    report = RunReport(
        blocks.planned,
        blocks.skipped,
        blocks.done,
        failed,
        windows=blocks.windows,
        voxels=voxels,
        seconds=seconds,
        predicted_s=predicted,
        ratio=ratio,
    )
    if predicted and not failed:
        log.info("took %.1f s, predicted were %.1f s for its share of the blocks", seconds, predicted)
    if blocks.failures:
        raise QuarantineError(failure_message(blocks.failures, blocks.planned, prepared.ledger.folder))
    return report


def begun_class(run_folder: Path, outputs: Sequence[FinalOutput], program: str) -> Mapping[str, object] | None:
    """The numeric class in which unfinished work on these outputs was begun, or None where there is none."""
    work = work_folder(run_folder, outputs, program)
    if not _is_begun(work):
        return None
    begun: Mapping[str, object] = read_header(work / LEDGER)["numeric_class"]
    return begun


def _make_work_folder(work: Path) -> None:
    """Make it, and name unfinished work of other settings beside it."""
    try:
        if work.is_dir():  # by who thought to be done at once
            fsync_path(work.parent)
        make_folder(work)
    except OSError as error:
        raise OutputError(
            f"{work}: cannot make the RUN folder ({error.strerror}); choose another output_path"
        ) from error
    others = [p.name for p in work.parent.iterdir() if p.is_dir() and p != work and (p / "labels.zarr").exists()]
    if others:
        log.warning(
            "%s also holds unfinished work of other settings (%s); remove it if it is not wanted any more",
            work.parent,
            ", ".join(sorted(others)),
        )


def _choose_blocks(ledger: Ledger, job: VolumeJob, roi: RegionOfInterest) -> None:
    """Leave blocks without wanted voxels out: an absent shard reads as 0, which is right where the outside is 0."""
    flags = roi.blocks(ledger.grid)
    count = int(np.count_nonzero(flags))
    log.info("%d of %d blocks hold wanted voxels", count, len(ledger.grid))
    if count == 0:
        log.warning("%s: no voxel is wanted (inference.mask is zero everywhere), so all becomes background", job.name)
    outside = job.labeller.segmenter.outside((1, 1, 1))
    if not any(outside[o.name].any() for o in job.outputs):
        ledger.choose(flags)


def _store(path: Path, job: VolumeJob, name: str, plan: BlockPlan) -> Store:
    """The working store at a path: one that is there and can be used, or a new one."""
    if path.exists():
        try:
            store = open_store(path)
        except OutputError as error:
            log.warning("%s", error)  # part of a folder that was removed amid a run
        else:
            if store.shard_shape == plan.block_shape:
                return store
            store.close()  # its ledger was lost, and now the volume is cut in another way
        discard(path)
    return create_store(path, info_of(job, name, plan), shard_shape=plan.block_shape, attributes={})


def info_of(job: VolumeJob, name: str, plan: BlockPlan) -> VolumeInfo:
    """The volume that an output is: its chunks are those of the working store."""
    source = job.reader.info
    rule = job.labeller.segmenter.probabilities
    if name == LABELS or rule is None:
        channels, dtype = 1, job.labeller.segmenter.labels.dtype
    else:
        channels, dtype = len(rule.channels), rule.dtype
    return VolumeInfo(
        (channels, *source.extent), np.dtype(dtype), plan.chunk_shape, source.voxel_size_nm, origin_nm=source.origin_nm
    )
