"""Where the steps of decoding work: stages of blocks under ledgers, tables and stores that are whole or absent.

``runs.decoding_run`` makes a context for each step; ``stages.decode.binary_filters`` and ``stages.survey.mask`` make
their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import OutputError, QuarantineError
from connectomics.core.files import (
    discard,
    discard_temporaries,
    make_folder,
    put_in_place,
    replacing,
    sync_tree,
    temporary_beside,
    write_once,
)
from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan, plan_of
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import LEDGER
from connectomics.execution.runner import RunStage, failure_message, void_lost
from connectomics.execution.task import Task
from connectomics.objects.numbering.cuts import BlockFiles
from connectomics.objects.numbering.ranges import KeyRanges, prepare
from connectomics.objects.numbering.tables import Numbered, Numbering
from connectomics.objects.selection import Rule, Selection
from connectomics.objects.table import MeasurementUnits
from connectomics.stages.decode.tasks import (
    BlockFunction,
    BlockJoins,
    BlockNumbers,
    BlockPieces,
    BlockTask,
    PaintTask,
    Read,
    block_file,
)
from connectomics.volumes.source import reason
from connectomics.volumes.store import Store, create_store, open_store
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

log = logging.getLogger(__name__)
ProbabilityOf = Callable[[Box, Read], Array]
EVERYTHING = Selection()
BLOCK_VOXELS = 1 << 24
VOXEL_BYTES = 40  # of a block: values, components, runs, probabilities as they are summed
MANY_BLOCKS, FINE_VOXELS, FINE_CHUNK = 8, 1 << 21, 8
CHUNK = 64
CUT = "cut"
JOIN = "join"
TABLES = "tables"
RANGES = "ranges"  # the plan by which many objects are numbered
PARTS = "parts"  # what each range of that gave
PLAN = "ledgers.json"  # the plan of all ledgers of a decoding
SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class DecodingState:
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
    facts
        What steps have to say in the provenance, by their names.
    of_labels
        Probabilities (z, y, x) of a box, of the labels that a function gives for it, where each label has its own; None
        where there are none, or one for all.
    """

    volume: VolumeReader
    frame: MeasurementUnits
    probabilities: Read | None = None
    tables: Path | None = None
    count: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)
    of_labels: ProbabilityOf | None = None


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where a step works, and who does its blocks.

    Parameters
    ----------
    work
        Work folder; all that a step leaves in it is called NAME.SOMETHING, its ledgers ``ledger_NAME.STAGE``.
    name
        Of this step.
    plan
        How the volume is cut.
    grid
        The cut volume.
    run_key
        Of the whole decoding.
    run
        Brings the blocks of a stage into its ledger.
    alone
        Held while something is made that one process alone may make.
    selection
        Which of the objects that the step finds stay, where it selects.
    """

    work: Path
    name: str
    plan: BlockPlan
    grid: BlockGrid
    run_key: str
    run: RunStage
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    selection: Selection = EVERYTHING

    def part(self, name: str) -> StepContext:
        """Return the context of a part of the step."""
        return dataclasses.replace(self, name=f"{self.name}.{name}")

    def finer(self, chunk_shape: Vec3) -> StepContext:
        """Return the context with smaller blocks where there are few, so that several processes have their share.

        Blocks stay whole chunks of what is read, whose chunks have this shape. Where the step was begun with other
        blocks, by a program before, it goes on with those.
        """
        plan = finer_plan(self.plan, self.grid.volume, chunk_shape)
        if plan_of(self.work / f"{LEDGER}_{self.name}.{CUT}") not in (None, plan):
            return self
        return dataclasses.replace(self, plan=plan, grid=BlockGrid(self.grid.volume, plan.block_shape))

    def place(self, kind: str) -> Path:
        """Where the step's result of this kind is."""
        return self.work / f"{self.name}.{kind}"

    def made(self, kind: str, make: Callable[[Path], None]) -> Path:
        """The step's result of this kind, which ``make`` puts in place whole unless it is there.

        Raises OutputError if the disk refuses.
        """
        path = self.place(kind)
        if not path.exists():
            with self.alone():
                if not path.exists():  # another process may have been first
                    _make(make, path)
        return path

    def do(self, task: Task, kept: Path) -> None:
        """Do all blocks of a task whose results in the folder ``kept`` are not recorded, or not there any more.

        Raises QuarantineError if blocks failed.
        """
        folder = self.work / f"{LEDGER}_{task.name}"
        with closing(Ledger(folder, self.run_key, {}, self.plan, volume=self.grid.volume)) as ledger:
            void_lost(ledger, self.work, [kept.name])
            blocks = self.run(task, ledger)
            if blocks.failures:
                raise QuarantineError(failure_message(blocks.failures, blocks.planned, folder))

    def fill(self, kind: str, compute: BlockFunction) -> Path:
        """Compute all blocks; the folder of this kind in which their arrays lie."""
        folder = self.place(kind)
        make_folder(folder)
        self.do(BlockTask(self.grid, folder, compute), folder)
        return folder

    def pieces(self, cut: BlockPieces) -> Path:
        """Cut all blocks into pieces and, where they are joined over faces, find which touch; where they lie."""
        folder = self.fill(CUT, cut)
        if cut.connectivity is not None:
            self.fill(JOIN, BlockJoins(folder, cut.connectivity))
        return folder

    def objects(
        self, pieces: Path, rule: Rule, *, joined: bool, by_first: bool = False, kind: str = TABLES
    ) -> tuple[Path, int, int]:
        """Tables of the objects that stay, how many they are, and the largest number that is painted.

        Pieces are joined over faces, or else by value and numbered by it; with ``by_first`` by their first voxels.
        Few objects are numbered by one process alone, many in ranges that all processes share.
        """
        joins = self.place(JOIN)
        files = BlockFiles(
            [block_file(pieces, block) for block in self.grid],
            [block_file(joins, block) for block in self.grid] if joined else None,
        )
        return self.number(Numbering(files.cuts(), rule, by_first), kind)

    def number(self, numbering: Numbering, kind: str) -> tuple[Path, int, int]:
        """Do as ``objects`` does with whatever is numbered."""
        tables, ranges = self.place(kind), self.place(f"{kind}.{RANGES}")
        if not (tables.exists() or ranges.exists()):
            with self.alone():
                if not (tables.exists() or ranges.exists()):
                    _make(lambda path: self._prepare(numbering, tables=path, ranges=ranges), tables)
        if not tables.exists():
            self._number(numbering, KeyRanges.of(ranges), kind)
        summary = json.loads((tables / SUMMARY).read_text())
        log.info("%s: %d of %d objects stay", tables.stem, summary["kept"], summary["found"])
        return tables, int(summary["kept"]), int(summary["largest"])

    def _prepare(self, numbering: Numbering, tables: Path, ranges: Path) -> None:
        """Put the tables in place where they are small, else the plan by which they are made."""
        scratch = temporary_beside(tables)
        discard_temporaries(tables)
        try:
            scratch.mkdir()
            plan, target = prepare(numbering.cuts, scratch), ranges
            if len(plan) == 1:
                _summarise(numbering.write_alone(plan, scratch), scratch)
                target = tables
            sync_tree(scratch)
            put_in_place(scratch, target)
        finally:
            discard(scratch)

    def _number(self, numbering: Numbering, plan: KeyRanges, kind: str) -> None:
        """Number the objects of all ranges, together with other processes, and write their tables."""
        grid = BlockGrid((len(plan), 1, 1), (1, 1, 1))
        context = self.cut_by(grid)
        parts = context.fill(f"{kind}.{PARTS}", BlockNumbers(numbering, plan))

        def make(path: Path) -> None:
            with replacing(path) as temporary:
                temporary.mkdir()
                file = functools.partial(_file_in, parts, grid)
                _summarise(numbering.write(plan, file, temporary), temporary)

        self.made(kind, make)

    def cut_by(self, grid: BlockGrid) -> StepContext:
        """Return the context with blocks that are those of another grid."""
        return dataclasses.replace(self, grid=grid, plan=BlockPlan(grid.block_shape, grid.block_shape))

    def paint(
        self, pieces: Path, tables: Path, info: VolumeInfo, dtype: np.dtype[Any], under: Read | None = None
    ) -> Store:
        """Write the objects of all blocks."""
        store = self.store(info, dtype)
        self.do(PaintTask(self.grid, pieces, tables, store, under=under), store.path)
        store.expect(lambda index: True)
        return store

    def store(self, info: VolumeInfo, dtype: np.dtype[Any]) -> Store:
        """The working store of the step's result."""
        kept = VolumeInfo((1, *info.extent), dtype, self.plan.chunk_shape, info.voxel_size_nm, origin_nm=info.origin_nm)

        def make(path: Path) -> None:
            create_store(path, kept, shard_shape=self.plan.block_shape, attributes={}).close()

        return open_store(self.made("zarr", make))


def _summarise(numbered: Numbered, folder: Path) -> None:
    (folder / SUMMARY).write_text(json.dumps(asdict(numbered)))


def _file_in(folder: Path, grid: BlockGrid, number: int) -> Path:
    return block_file(folder, grid.numbered(number))


def _make(make: Callable[[Path], None], path: Path) -> None:
    try:
        make(path)
    except OSError as error:
        raise OutputError(
            f"cannot make {path}: {reason(error)}. Free disk space or mend the permission, then run again; finished "
            "blocks are kept."
        ) from error


def kept_plan(path: Path, plan: BlockPlan) -> BlockPlan:
    """The plan that work was begun with and that is kept in the file ``path``: this one, where it begins now."""
    write_once(path, json.dumps(asdict(plan)))
    kept: dict[str, list[int]] = json.loads(path.read_text())
    return BlockPlan(vec3(kept["block_shape"]), vec3(kept["chunk_shape"]))


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
    return in_chunks(vec3(shape))


def finer_plan(plan: BlockPlan, volume: Vec3, chunk_shape: Vec3) -> BlockPlan:
    """Halve blocks until there are ``MANY_BLOCKS`` or they would have less than ``FINE_VOXELS`` voxels.

    They stay whole chunks of what is read; chunks of what is written are halved with them where need be.

    Examples
    --------
    >>> finer_plan(BlockPlan((64, 512, 512), (64, 64, 64)), (256, 512, 512), (1, 512, 512))
    BlockPlan(block_shape=(32, 512, 512), chunk_shape=(32, 64, 64))
    """
    shape, chunk = list(plan.block_shape), list(plan.chunk_shape)
    units = [min(read, extent) for read, extent in zip(chunk_shape, volume, strict=True)]
    while len(BlockGrid(volume, vec3(shape))) < MANY_BLOCKS and math.prod(shape) >= 2 * FINE_VOXELS:
        axes = [axis for axis in (1, 2, 0) if shape[axis] % math.lcm(2 * units[axis], 2 * FINE_CHUNK) == 0]
        if not axes:
            break
        axis = max(axes, key=lambda axis: shape[axis])
        shape[axis] //= 2
        while shape[axis] % chunk[axis]:
            chunk[axis] //= 2
    return BlockPlan(vec3(shape), vec3(chunk))


def in_chunks(block_shape: Vec3) -> BlockPlan:
    """Blocks of this shape, in chunks of about ``CHUNK``: the same for the same blocks, whoever chose them.

    Examples
    --------
    >>> in_chunks((2, 100, 512))
    BlockPlan(block_shape=(2, 100, 512), chunk_shape=(2, 50, 64))
    """
    chunk = list(block_shape)
    for axis in range(3):
        while chunk[axis] > CHUNK and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return BlockPlan(block_shape, vec3(chunk))
