"""A small volume of one block at once, in memory: nothing of it is on the disk before its outputs are.

``VolumeProcessor`` calls ``run_any_volume``. What is not plain here, because somebody has begun the volume, another
process has it in hand, or something goes wrong, goes the way of larger volumes, ``run_volume``, from where it stands.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from connectomics.core.errors import AgreementError, ConnectomicsError, StorageError, VolumeError
from connectomics.core.files import discard, fsync_path
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.block_claims import Apart
from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import DiskStore
from connectomics.execution.lease import LeaseLostError, Stretch
from connectomics.execution.name_claims import NameClaims
from connectomics.execution.publishing import Staging
from connectomics.execution.run_folder import (
    CHECKSUMS,
    COORDINATION,
    LEDGER,
    LOG,
    PROVENANCE,
    REPORT,
    SINGLE_WRITER,
    SURVEY,
    checksums_of,
)
from connectomics.execution.runner import OnBlock, attempt
from connectomics.execution.stage import LABELS
from connectomics.execution.task import BlockFailure, BlockRecord, Executor, RunReport
from connectomics.execution.worker import Worker, is_deserted
from connectomics.inference.case import ReadBox
from connectomics.runs.job import RunSettings, VolumeJob
from connectomics.runs.stamps import record_of, run_key_of, stamp_of, unit_of
from connectomics.runs.volume import info_of, patient, run_volume
from connectomics.stages.output.export import export_file, output_format
from connectomics.stages.output.finish import check_exportable, check_names, settle, withdrawing, work_folder
from connectomics.stages.output.formats.contract import FileFormat
from connectomics.stages.predict.precision_check import Agreement
from connectomics.stages.predict.segmenter import Surveyed
from connectomics.volumes.digests import digest_lines
from connectomics.volumes.in_memory import ArrayVolume
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

log = logging.getLogger(__name__)
SMALL_BYTES = 4 << 20  # of the voxels that are read, and of those of each output


def run_any_volume(
    job: VolumeJob, settings: RunSettings, executor: Executor, on_block: OnBlock, apart: Apart | None = None
) -> RunReport:
    """Bring a volume to its final outputs, as ``run_volume`` does; a small one that nobody has begun at once."""
    report = run_at_once(job, settings, on_block)
    return run_volume(job, settings, executor, on_block, apart=apart) if report is None else report


def run_at_once(job: VolumeJob, settings: RunSettings, on_block: OnBlock) -> RunReport | None:
    """Bring a small volume that nobody has begun to its final outputs; None where ``run_volume`` must do it.

    Raises VolumeError where the volume cannot be labelled, AgreementError where fast changes too many labels.
    """
    if not is_small(job):
        return None
    paths = [path for output in job.outputs for path in output.paths(settings.folder).values()]
    standing = [os.path.lexists(path) for path in paths]
    if all(standing) and not any(output.missing(settings.folder) for output in job.outputs):
        return _report(job, None)  # another process of this list has made it meanwhile
    if any(standing) or not _is_untouched(job.run_folder):
        return None
    for output in job.outputs:
        check_exportable(output, info_of(job, output.name, job.plan), settings.folder, settings.budget_bytes)
    work = work_folder(job.run_folder, job.outputs, settings.program)
    try:
        with withdrawing(job.run_folder, work, job.outputs):
            report = _alone(job, settings, work, on_block)
    except (AgreementError, VolumeError):
        raise
    except (LeaseLostError, ConnectomicsError, OSError, MemoryError) as error:
        log.info("%s goes the way of larger volumes: %s", job.name, error)
        return None
    if report is not None:
        settle(job.run_folder, work, job.outputs, paths)
    return report


def is_small(job: VolumeJob) -> bool:
    """Whether a volume is one small block, wanted whole, of which nothing but files is made."""
    info, contract = job.reader.info, job.labeller.contract
    formats = {form for output in job.outputs for form in output.formats}
    infos = [info, *(info_of(job, output.name, job.plan) for output in job.outputs)]
    return (
        all(math.prod(each.shape) * each.dtype.itemsize <= SMALL_BYTES for each in infos)
        and len(BlockGrid(info.extent, job.plan.block_shape)) == 1
        and job.labeller.roi is None
        and (contract is None or contract.shared is not None)
        and all(isinstance(output_format(form), FileFormat) for form in formats)
    )


def is_in_hand(run_folder: Path) -> bool:
    """Whether another process makes a volume in memory now, as far as is known without waiting."""
    begun = (LEDGER, SURVEY)
    try:
        return any(
            not any((records.parent / name).exists() for name in begun) and not is_deserted(records)
            for records in run_folder.glob(f"*/{COORDINATION}")
        )
    except (OSError, StorageError):
        return False  # whoever begins the volume meets it, too, and tells


def _is_untouched(run_folder: Path, *own: str) -> bool:
    """Whether RUN holds nothing but a log and what is named."""
    try:
        return all(path.name in (LOG, *own) for path in run_folder.iterdir())
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class _Made:
    """What became of a volume in memory: an array (c, z, y, x) for each output, and what is told of them."""

    arrays: Mapping[str, Array]
    surveyed: Surveyed
    agreement: Agreement | None
    record: BlockRecord
    who: Mapping[str, object]
    since: float
    began: float


def _alone(job: VolumeJob, settings: RunSettings, work: Path, on_block: OnBlock) -> RunReport | None:
    """Make a volume as the first who ever held its lease; None where another was before, or its block fails."""
    for folder in (work, work / COORDINATION):
        folder.mkdir(exist_ok=True)  # need not outlast a loss of power, since what they hold is of living processes
    names = [(output.stem, output.result_key) for output in job.outputs]
    with Worker(DiskStore(work / COORDINATION), limit_s=settings.stale_s) as worker:
        if not worker.acquire(SINGLE_WRITER) or worker.held(SINGLE_WRITER).epoch > 0:
            return None
        with NameClaims(settings.folder, names, work, worker) as claims:
            check_names(job.outputs, settings.folder)  # another run may have made them until just now
            if not _is_untouched(job.run_folder, work.name):
                return None  # another process of this run has
            on_block(0, 1)
            made = _made(job, settings, work, worker=worker)
            if made is None:
                return None
            on_block(1, 1)
            staging = Staging(work, worker, SINGLE_WRITER, claims.confirm, lasting=False)
            try:
                with staging:
                    return _published(job, settings, made, staging)
            except BaseException:
                if staging.folder.is_dir():
                    discard(staging.folder)  # nobody could go on with it
                raise


def _made(job: VolumeJob, settings: RunSettings, work: Path, worker: Worker) -> _Made | None:
    """Label the volume; None where its block fails or has ended a process before."""
    since, began = time.time(), time.perf_counter()
    job, reader = patient(job, settings)
    whole = Box.of_shape(reader.info.extent)
    volume = ArrayVolume(reader.read(whole), reader.info.chunk_shape)
    surveyed = job.labeller.segmenter.survey(volume, job.name, job.limits.readers)
    log.info("surveyed %s cases", " + ".join(str(len(cases)) for cases in surveyed))
    agreement = _agreement(job)
    task = _InMemory(BlockGrid(reader.info.extent, job.plan.block_shape), job, volume.read, surveyed, arrays={})
    (block,) = task.grid
    lease = Shards.of(work / LEDGER, len(task.grid)).lease(0)
    if not worker.acquire(lease, Stretch(1, begun=(0,), next=1)) or worker.held(lease).epoch > 0:
        return None
    record = attempt(task, block)
    worker.release(lease)
    if isinstance(record, BlockFailure):
        return None
    log.info("predict, block %s: %d windows, %.2f s", record.block, record.windows, record.seconds)
    return _Made(task.arrays, surveyed, agreement, record, who=worker.signature, since=since, began=began)


def _agreement(job: VolumeJob) -> Agreement | None:
    """What fast changes in the sample that this volume shares; an AgreementError if it is too much."""
    contract = job.labeller.contract
    if contract is None or contract.shared is None:
        return None
    found = contract.shared()
    contract.require(found, job.name)
    return found


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A ``Task`` of one block whose outputs stay in memory, in ``arrays``."""

    grid: BlockGrid
    job: VolumeJob
    read: ReadBox
    surveyed: Surveyed
    arrays: dict[str, Array]

    @property
    def name(self) -> str:
        """Name of the task in logs."""
        return "predict"

    def process(self, block: Block) -> BlockRecord:
        """Label the block, filters of whole objects included."""
        began, labeller = time.perf_counter(), self.job.labeller
        arrays = labeller.segmenter.segment(self.read, self.surveyed, block.core)
        windows = labeller.segmenter.windows(self.read, self.surveyed, block.core)
        if labeller.filters.active:
            arrays[LABELS] = labeller.filters.apply(arrays[LABELS][0])[None]
        self.arrays.update(arrays)
        return BlockRecord(block.key, {}, windows, round(time.perf_counter() - began, 3))


@dataclass(frozen=True, slots=True)
class _Output:
    """An output in memory, as it is written to a file."""

    path: Path
    info: VolumeInfo
    volume: VolumeReader

    def read(self, box: Box) -> Array:
        """Voxels of a box."""
        return self.volume.read(box)


def _published(job: VolumeJob, settings: RunSettings, made: _Made, staging: Staging) -> RunReport:
    """Give the outputs their final names, when all that is told of them lasts.

    A flush each for the files, one for all that is told of them, and one for the names: everything is renamed out of
    one folder, and whoever takes over takes that away first.
    """
    for note in job.reader.info.notes:
        log.warning("%s: %s", job.name, note)
    job.record.require_unchanged()
    run_key = run_key_of(job, job.plan, settings.program)
    stamp = stamp_of(job, made.surveyed, made.agreement, run_key) | {"numeric_class": dict(settings.numeric_class)}
    finals = dict[str, Path]()
    for output in job.outputs:
        info = info_of(job, output.name, job.plan)
        source = _Output(staging.folder, info, ArrayVolume(made.arrays[output.name]))
        full = stamp | unit_of(job, output) | {"result_key": output.result_key}
        for form, path in output.paths(settings.folder).items():
            export_file(source, staging.place(path.name), form, full, path=path)
            finals[path.name] = path
    told = {PROVENANCE: record_of(job, settings, stamp | _survey(made.surveyed), job.plan)}
    told |= {
        checksums_of(Path(), path).name: "".join(digest_lines(staging.place(name))) for name, path in finals.items()
    }
    report = _report(job, made)
    told[REPORT] = json.dumps(_facts(report, made), indent=1) + "\n"
    for name, text in told.items():
        _write(staging.place(name), text)
    staging.place(CHECKSUMS).mkdir()
    staging.move(CHECKSUMS, job.run_folder / CHECKSUMS)
    for name in told:
        of_run = name in (PROVENANCE, REPORT)
        staging.move(name, job.run_folder / name if of_run else job.run_folder / CHECKSUMS / name)
    staging.keep()
    for name, path in finals.items():
        staging.move(name, path)
    fsync_path(settings.folder)
    for path in finals.values():
        log.info("wrote %s", path)
    if report.predicted_s:
        log.info("took %.1f s, predicted were %.1f s", report.seconds, report.predicted_s)
    return report


def _survey(surveyed: Surveyed) -> dict[str, object]:
    """All cases of each model, where there is more than the one of which all is told anyway; masks are left out."""
    if len(surveyed) == len(surveyed[0]) == 1:
        return {}
    return {"survey": [[asdict(replace(case, mask=None)) for case in cases] for cases in surveyed]}


def _write(path: Path, text: str) -> None:
    """Write a new file; on return it is on the disk."""
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _report(job: VolumeJob, made: _Made | None) -> RunReport:
    """What this process did, or, without that, that all was done."""
    voxels = Box.of_shape(job.reader.info.extent).voxels
    if made is None:
        return RunReport(1, 1, done=0, failed=0, windows=0, voxels=voxels, seconds=0.0)
    seconds = round(time.perf_counter() - made.began, 3)
    predicted = job.record.predicted_s
    ratio = round(seconds / predicted, 3) if predicted else None
    return RunReport(
        1,
        0,
        done=1,
        failed=0,
        windows=made.record.windows,
        voxels=voxels,
        seconds=seconds,
        predicted_s=predicted,
        ratio=ratio,
    )


def _facts(report: RunReport, made: _Made) -> dict[str, object]:
    """What ``report.json`` says; see ``run_report``."""
    until = round(time.time(), 3)
    who = {key: made.who[key] for key in ("host", "pid")} | {"since": round(made.since, 3), "until": until}
    worker = who | {"blocks": 1, "windows": report.windows, "seconds": report.seconds}
    wall_s = round(until - made.since, 3)
    return asdict(report) | {"wall_s": wall_s, "repeated": 0, "workers": [worker]}
