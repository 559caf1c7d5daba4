"""From labels or probabilities to objects: steps over blocks under ledgers, then the final volume and its table.

``lightning.decode`` calls ``run_decode`` for each volume. A step is a frozen value with a name and a ``run`` from one
scene to the next; whatever it leaves on disk is whole or absent, so that a rerun continues.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from connectomics.decode.merge import Cuts, merge
from connectomics.decode.objects import Frame, write_table
from connectomics.decode.selection import Rule, select
from connectomics.fingerprint import key_of
from connectomics.geometry import Block, BlockGrid, Box, vec3
from connectomics.io.atomic import discard, replacing, write_text
from connectomics.io.store import Store, create_store, open_store
from connectomics.io.volume import VolumeInfo, VolumeReader
from connectomics.pipeline.contracts import Executor, RunReport, Task
from connectomics.pipeline.finish import Output, export_output
from connectomics.pipeline.ledger import Ledger
from connectomics.pipeline.pieces import JoinTask, PaintTask, PiecesTask, Read, block_file, smallest_dtype
from connectomics.pipeline.planning import BlockPlan

log = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]
BLOCK_VOXELS = 1 << 24
VOXEL_BYTES = 40  # of a block: values, components, runs, probabilities as they are summed
CHUNK = 64
NUMERIC_CLASS = {"decode": "integers"}
SUMMARY = "summary.json"


class FileTask(Task, Protocol):
    """A task that can say whether a block's result is on disk."""

    def whole(self, block: Block) -> bool:
        """Whether it is."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What a step is given and gives.

    Parameters
    ----------
    volume
        Labels, ids or probabilities.
    frame
        Its voxel size, and how probabilities are summed.
    probabilities
        Probabilities (z, y, x) of a box, for the table, or None.
    tables
        Tables of its objects, or None where it has none yet.
    count
        Objects in them.
    """

    volume: VolumeReader
    frame: Frame
    probabilities: Read | None = None
    tables: Path | None = None
    count: int = 0


class Step(Protocol):
    """One step of ``decoding``."""

    @property
    def name(self) -> str: ...

    def run(self, scene: Scene, shop: Workshop) -> Scene:
        """Make the next scene, continuing whatever an earlier run left in the shop's folder."""
        ...


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where a step works, and whose hands do its blocks.

    Parameters
    ----------
    folder
        Of this step.
    plan
        How the volume is cut.
    grid
        The cut volume.
    run_key
        Of the whole decoding.
    executor
        Runs the blocks.
    on_block
        Called with finished and planned blocks of the current task.
    """

    folder: Path
    plan: BlockPlan
    grid: BlockGrid
    run_key: str
    executor: Executor
    on_block: OnBlock

    def run(self, task: FileTask, name: str) -> None:
        """Do all blocks of a task that its ledger does not have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(self.folder / f"{name}.jsonl", self.run_key, NUMERIC_CLASS, self.plan)
        try:
            lost = {block.key for block in self.grid if block.key in ledger.records and not task.whole(block)}
            if lost:
                log.warning("%s: %d recorded blocks are missing on disk and are done again", name, len(lost))
                ledger.forget(lost)
            self.on_block(len(ledger.records), len(self.grid))
            for record in self.executor.run(task, (b for b in self.grid if b.key not in ledger.records)):
                ledger.append(record)
                log.info("%s: %s block %s: %.2f s", self.folder.name, name, record.block, record.seconds)
                self.on_block(len(ledger.records), len(self.grid))
        finally:
            ledger.close()

    def pieces(self, task: PiecesTask) -> None:
        """Cut all blocks into pieces and, where they are joined over faces, find which touch."""
        task.folder.mkdir(parents=True, exist_ok=True)
        self.run(task, task.folder.name)
        if task.connectivity is not None:
            joins = self.joins_of(task.folder)
            joins.mkdir(exist_ok=True)
            self.run(JoinTask(self.grid, task.folder, joins, task.connectivity), joins.name)

    @staticmethod
    def joins_of(pieces: Path) -> Path:
        """Where the pairs of touching pieces lie."""
        return pieces.with_name(f"{pieces.name}_joins")

    def objects(self, pieces: Path, rule: Rule, *, joined: bool) -> tuple[Path, int, int]:
        """Tables of the objects that stay, how many they are, and the largest number that is painted."""
        tables = pieces.with_name(f"{pieces.name}_tables")
        if not tables.exists():
            _, ny, nx = self.grid.counts
            joins = self.joins_of(pieces)
            cuts = Cuts(
                len(self.grid),
                ny * nx,
                lambda number: block_file(pieces, self._block(number)),
                (lambda number: block_file(joins, self._block(number))) if joined else None,
            )
            with replacing(tables) as temporary:
                temporary.mkdir()
                found = merge(cuts, temporary)
                kept, largest = select(temporary, found, rule)
                (temporary / SUMMARY).write_text(json.dumps({"found": found, "kept": kept, "largest": largest}))
                log.info("%d of %d objects stay", kept, found)
        summary = json.loads((tables / SUMMARY).read_text())
        return tables, int(summary["kept"]), int(summary["largest"])

    def paint(self, pieces: Path, tables: Path, info: VolumeInfo, largest: int, under: Read | None = None) -> Store:
        """Write the objects of all blocks."""
        store = self.store(info, largest)
        self.run(PaintTask(self.grid, pieces, tables, store, under), "objects")
        return store

    def store(self, info: VolumeInfo, largest: int) -> Store:
        """The working store of the step's result."""
        path = self.folder / "objects.zarr"
        if path.exists():
            return open_store(path)
        kept = VolumeInfo(
            (1, *info.extent), smallest_dtype(largest), self.plan.chunk_shape, info.voxel_size_nm, info.origin_nm
        )
        return create_store(path, kept, shard_shape=self.plan.block_shape, attributes={})

    def _block(self, number: int) -> Block:
        _, ny, nx = self.grid.counts
        return self.grid.block((number // (ny * nx), number // nx % ny, number % nx))


def decode_plan(info: VolumeInfo, budget_bytes: int) -> BlockPlan:
    """Blocks of whole input chunks where they fit, of up to ``BLOCK_VOXELS`` voxels, in chunks of about ``CHUNK``.

    Examples
    --------
    >>> import numpy as np
    >>> decode_plan(VolumeInfo((1, 100, 4096, 4096), np.dtype(np.uint8), (1, 512, 512)), 8 << 30)
    BlockPlan(block_shape=(64, 512, 512), chunk_shape=(64, 64, 64))
    """
    most = max(1, min(BLOCK_VOXELS, budget_bytes // VOXEL_BYTES))
    shape = [min(c, n) for c, n in zip(info.chunk_shape, info.extent, strict=True)]
    while shape[0] * shape[1] * shape[2] > most:
        axis = max(range(3), key=lambda a: shape[a])
        shape[axis] = -(-shape[axis] // 2)
    while True:
        growing = [a for a in range(3) if shape[a] < info.extent[a]]
        axis = min(growing, key=lambda a: shape[a], default=0)
        if not growing or shape[0] * shape[1] * shape[2] * 2 > most:
            break
        shape[axis] *= 2
    chunk = list(shape)
    for axis in range(3):
        while chunk[axis] > CHUNK and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return BlockPlan(vec3(shape), vec3(chunk))


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One volume and what is wanted of it.

    Parameters
    ----------
    run_folder
        RUN.
    volume
        Labels, ids or probabilities.
    steps
        In order.
    output
        The final volume.
    table
        Final name of the table of objects, or None.
    plan
        How the volume is cut.
    program
        Name and version, part of the run key.
    provenance
        What is stamped on the output.
    probabilities, probability_units
        Probabilities (z, y, x) of a box for the table, and how they are summed; None without.
    """

    run_folder: Path
    volume: VolumeReader
    steps: tuple[Step, ...]
    output: Output
    table: Path | None
    plan: BlockPlan
    program: str
    provenance: Mapping[str, object]
    probabilities: Read | None = None
    probability_units: tuple[float, float] | None = None

    @property
    def work(self) -> Path:
        """Folder of unfinished work."""
        return self.run_folder / key_of({self.output.name: self.output.result_key, "program": self.program})[:16]


def run_decode(job: DecodeJob, folder: Path, executor: Executor, on_block: OnBlock) -> RunReport:
    """Bring one volume to its objects, continuing whatever an earlier run of the same result left.

    Parameters
    ----------
    job
        The volume.
    folder
        Where final outputs go.
    executor
        Runs the blocks.
    on_block
        Called with (finished, planned) blocks of each task.

    Raises
    ------
    ConnectomicsError
        If it cannot be finished; finished blocks are kept and a rerun continues.
    """
    began = time.perf_counter()
    plan = _kept_plan(job)
    grid = BlockGrid(job.volume.info.extent, plan.block_shape)
    run_key = key_of({"result": job.output.result_key, "grid": list(grid.block_shape), "program": job.program})
    info = job.volume.info
    scene = Scene(job.volume, Frame(info.voxel_size_nm, info.origin_nm, job.probability_units), job.probabilities)
    for number, step in enumerate(job.steps, 1):
        shop = Workshop(job.work / f"{number}_{step.name}", plan, grid, run_key, executor, on_block)
        scene = step.run(scene, shop)
    assert isinstance(scene.volume, Store), "every step leaves a store"
    stamp = dict(job.provenance) | {"run_key": run_key, "objects": scene.count}
    if job.table is not None and scene.tables is not None:
        write_table(scene.tables, scene.count, job.table, scene.frame, job.output.result_key)
    export_output(scene.volume, job.output, folder, stamp)
    scene.volume.close()
    write_text(job.run_folder / "provenance.json", json.dumps(stamp, indent=1) + "\n")
    seconds = round(time.perf_counter() - began, 3)
    report = RunReport(len(grid), 0, len(grid), 0, Box.of_shape(grid.volume).voxels, seconds)
    write_text(job.run_folder / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    discard(job.work)
    return report


def _kept_plan(job: DecodeJob) -> BlockPlan:
    """The plan that the work was begun with, or the job's own, which is kept."""
    path = job.work / "plan.json"
    if path.exists():
        kept: dict[str, list[int]] = json.loads(path.read_text())
        return BlockPlan(vec3(kept["block_shape"]), vec3(kept["chunk_shape"]))
    job.work.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(job.plan)))
    return job.plan
