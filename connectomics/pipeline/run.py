"""One volume from start to end: survey, blocks under a ledger, filters, exports, report.

``VolumeProcessor`` calls ``run_volume`` for each volume that is not finished.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from connectomics.errors import OutputError, VolumeError
from connectomics.fingerprint import key_of
from connectomics.geometry import Block, BlockGrid, Box
from connectomics.io.atomic import discard, write_text
from connectomics.io.store import Store, create_store, open_store
from connectomics.io.volume import VolumeInfo, VolumeReader
from connectomics.pipeline.contracts import BlockRecord, Executor, RunReport
from connectomics.pipeline.finish import Filters, Output, export_output, filter_store
from connectomics.pipeline.ledger import Ledger, plan_of
from connectomics.pipeline.planning import BlockPlan
from connectomics.pipeline.predict import LABELS, PredictTask, Segmenter, Surveyed
from connectomics.pipeline.survey import load_survey, save_survey

log = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]
LEDGER = "ledger.jsonl"
CHECKED_BLOCKS = 16  # recorded blocks whose checksums are compared on resume; of all others the shard must exist


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a volume is run; nothing here changes a voxel.

    Parameters
    ----------
    folder
        Where final outputs and RUN folders go.
    program
        Name and version of the program, part of the run key.
    budget_bytes
        Host memory.
    numeric_class
        Of the backend, kept in the ledger's header.
    allow_mixed
        Resume although the numeric class differs.
    readers
        Threads that read ahead in the survey.
    """

    folder: Path
    program: str
    budget_bytes: int
    numeric_class: Mapping[str, object]
    allow_mixed: bool = False
    readers: int = 1


@dataclass(frozen=True, slots=True)
class VolumeJob:
    """One volume and what is wanted of it."""

    name: str
    run_folder: Path
    reader: VolumeReader
    segmenter: Segmenter
    filters: Filters
    outputs: tuple[Output, ...]
    plan: BlockPlan
    provenance: Mapping[str, object]
    command: tuple[str, ...]


def run_volume(job: VolumeJob, settings: RunSettings, executor: Executor, on_block: OnBlock) -> RunReport:
    """Bring one volume to its final outputs, continuing whatever an earlier run of the same result left.

    Parameters
    ----------
    job
        The volume.
    settings
        Folder, budget and numeric class.
    executor
        Runs the blocks.
    on_block
        Called with (finished, planned) blocks at the start and after each block.

    Raises
    ------
    ConnectomicsError
        If the volume cannot be finished; finished blocks are kept and a rerun continues.
    """
    began = time.perf_counter()
    facts: dict[str, object] = {o.name: o.result_key for o in job.outputs}
    work = _work_folder(job.run_folder, job.outputs, settings.program)
    _make_work_folder(work)
    plan = plan_of(work / LEDGER) or job.plan  # a rerun elsewhere cuts the volume as it was begun
    grid = BlockGrid(job.reader.info.extent, plan.block_shape)
    run_key = key_of(facts | {"grid": list(grid.block_shape), "program": settings.program})
    surveyed = _surveyed(work, job, settings)
    ledger = Ledger(work / LEDGER, run_key, settings.numeric_class, plan, allow_other_class=settings.allow_mixed)
    pending = [o for o in job.outputs if o.missing(settings.folder)]
    try:
        stores = {o.name: _store(work / f"{o.name}.zarr", job, o.name, plan) for o in pending}
        lost = _lost_blocks(ledger, grid, stores)
        if lost:
            ledger.forget(lost)
        skipped = len(ledger.records)
        task = PredictTask(grid, job.segmenter, surveyed, job.reader.read, stores)
        fresh = _run_blocks(task, ledger, executor, on_block)
        mixed = ledger.mixed
    finally:
        ledger.close()
    stamp = dict(job.provenance) | {
        "numeric_class": "mixed" if mixed else dict(settings.numeric_class),
        "run_key": run_key,
        "cases": len(surveyed[0]),
        "statistics": [asdict(c) for c in surveyed[0][0].channels],
    }
    record = stamp | {"result_keys": facts, "command": list(job.command)}
    write_text(job.run_folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    for output in pending:
        _finish(work, job, output, stores[output.name], grid, settings, stamp)
    seconds = round(time.perf_counter() - began, 3)
    windows = sum(r.windows for r in fresh)
    voxels = Box.of_shape(grid.volume).voxels
    report = RunReport(len(grid), skipped, len(fresh), windows, voxels, seconds)
    write_text(job.run_folder / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    discard_leftovers(job.run_folder, job.outputs, settings.program)
    return report


def discard_leftovers(run_folder: Path, outputs: Sequence[Output], program: str) -> None:
    """Remove the working stores of finished outputs, also those that a kill after the last export left."""
    work = _work_folder(run_folder, outputs, program)
    for path in work.iterdir() if work.is_dir() else ():
        if path.is_dir():
            discard(path)


def _work_folder(run_folder: Path, outputs: Sequence[Output], program: str) -> Path:
    facts: dict[str, object] = {o.name: o.result_key for o in outputs}
    return run_folder / key_of(facts | {"program": program})[:16]


def _make_work_folder(work: Path) -> None:
    """Make it, and name unfinished work of other settings beside it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
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


def _surveyed(work: Path, job: VolumeJob, settings: RunSettings) -> Surveyed:
    path = work / "survey.json"
    kept = not any(m.keeps_mask for m in job.segmenter.members)  # a mask is as large as the volume: it is found again
    surveyed: Surveyed | None = load_survey(path) if kept else None
    if surveyed is None:
        surveyed = job.segmenter.survey(job.reader, job.name, settings.readers)
        if kept:
            save_survey(surveyed, path)
        log.info("surveyed %s cases", " + ".join(str(len(cases)) for cases in surveyed))
    return surveyed


def _store(path: Path, job: VolumeJob, name: str, plan: BlockPlan) -> Store:
    if path.exists():
        store = open_store(path)
        if store.shard_shape == plan.block_shape:
            return store
        store.close()  # its ledger was lost, and now the volume is cut in another way
        discard(path)
    source = job.reader.info
    rule = job.segmenter.probabilities
    if name == LABELS or rule is None:
        channels, dtype = 1, job.segmenter.labels.dtype
    else:
        channels, dtype = len(rule.channels), rule.dtype
    info = VolumeInfo(
        (channels, *source.extent), np.dtype(dtype), plan.chunk_shape, source.voxel_size_nm, source.origin_nm
    )
    return create_store(path, info, shard_shape=plan.block_shape, attributes={})


def _lost_blocks(ledger: Ledger, grid: BlockGrid, stores: Mapping[str, Store]) -> set[str]:
    """Recorded blocks whose shards are not there or, for a sample, do not have the recorded checksum."""
    done = [block for block in grid if block.key in ledger.records]
    stride = max(1, len(done) // CHECKED_BLOCKS)
    lost = set()
    for i, block in enumerate(done):
        sums = ledger.records[block.key].checksums
        for name, store in stores.items():
            whole = store.shard_path(block.core).exists()
            if whole and i % stride == 0:
                whole = _checksum(store, block) == sums.get(name)
            if not whole:
                lost.add(block.key)
    if lost:
        log.warning("%d recorded blocks are missing or damaged on disk and are computed again", len(lost))
    return lost


def _checksum(store: Store, block: Block) -> str | None:
    try:
        return store.checksum(block.core)
    except VolumeError:
        return None


def _run_blocks(task: PredictTask, ledger: Ledger, executor: Executor, on_block: OnBlock) -> list[BlockRecord]:
    planned, finished = len(task.grid), len(ledger.records)
    on_block(finished, planned)
    log.info("%d blocks planned, %d finished before", planned, finished)
    fresh = []
    for record in executor.run(task, (b for b in task.grid if b.key not in ledger.records)):
        ledger.append(record)
        fresh.append(record)
        log.info("block %s: %d windows, %.2f s", record.block, record.windows, record.seconds)
        on_block(finished + len(fresh), planned)
    return fresh


def _finish(
    work: Path,
    job: VolumeJob,
    output: Output,
    store: Store,
    grid: BlockGrid,
    settings: RunSettings,
    stamp: dict[str, object],
) -> None:
    source = store
    if output.name == LABELS and job.filters.active:
        source = filter_store(store, grid, work / "filtered.zarr", job.filters)
    export_output(source, output, settings.folder, stamp)
    source.close()
    store.close()
    discard(work / "filtered.zarr")
    discard(work / f"{output.name}.zarr")
