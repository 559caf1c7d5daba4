"""Chunked final outputs: each level of a pyramid is a task of its own, block by block under a ledger of its own.

``finish`` calls ``fill_pyramid``. A level is made from the one before, so memory holds part of a block whatever the
volume, and a killed run goes on with the block it was at.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from connectomics.core.errors import OutputError, QuarantineError, VolumeError
from connectomics.core.files import TEMPORARY, discard, replacing
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Block, BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import LEDGER
from connectomics.execution.runner import RunStage, failure_message
from connectomics.execution.task import BlockRecord
from connectomics.stages.output.downsample import mean, mode
from connectomics.stages.output.formats.contract import Multiscale
from connectomics.stages.output.formats.level_array import LevelArray
from connectomics.volumes.levels import Level, grown
from connectomics.volumes.source import reason
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

log = logging.getLogger(__name__)
PIECE_BYTES = 8 << 20
"""What is read at once of the level before, at least one chunk."""
CHECKED_BLOCKS = 16  # recorded blocks of a level that are read again on resume
LEFT_BEHIND = ("*.__lock", f".*{TEMPORARY}")  # by killed writers: locks of TensorStore's and unfinished files


class Readable(Protocol):
    """Whatever boxes of voxels (c, z, y, x) can be read from: the working store, a level."""

    def read(self, box: Box) -> Array: ...


@dataclass(frozen=True, slots=True)
class LevelTask:
    """Copies or downsamples one level from the one before; a block is a unit of its storage, made part by part.

    Parameters
    ----------
    name
        For messages and records.
    before
        The level before; for level 0, which has a step of 1, the working store.
    extent_before
        (z, y, x) of that.
    level
        What is made.
    target
        Where it is written.
    piece
        (z, y, x) that is computed at once.
    labels
        Whether windows become their mode instead of their mean.
    """

    name: str
    before: Readable
    extent_before: Box
    level: Level
    target: LevelArray
    piece: Vec3
    labels: bool

    @property
    def grid(self) -> BlockGrid:
        """One block for each unit of the storage."""
        return BlockGrid(self.level.extent, self.target.unit_shape)

    def process(self, block: Block) -> BlockRecord:
        """Make a block, write it and compare it; an OutputError if the disk refuses or gives other voxels."""
        began, written = time.perf_counter(), sha256()

        def parts() -> Iterator[tuple[Box, Array]]:
            for box in _cut(block.core, self.target.part_shape):
                voxels = self._voxels(box)
                written.update(voxels.data)
                yield box, voxels

        self.target.write(block.core, parts())
        if self._read_back(block.core) != written.hexdigest():
            raise OutputError(
                f"{self.name} reads back with other voxels in {block.core.start} to {block.core.stop} than were "
                "written; check the disk and run again, finished blocks are kept."
            )
        return BlockRecord(block.key, {self.name: written.hexdigest()}, 0, time.perf_counter() - began)

    def whole(self, record: BlockRecord) -> bool:
        """Whether the voxels on disk are those of the record."""
        z, y, x = (int(index) for index in record.block.split("-"))
        try:
            return self._read_back(self.grid.block((z, y, x)).core) == record.checksums.get(self.name)
        except VolumeError:
            return False

    def _read_back(self, core: Box) -> str:
        """sha256 of a block's voxels on disk, part by part."""
        read = sha256()
        for box in _cut(core, self.target.part_shape):
            read.update(self.target.read(box).data)
        return read.hexdigest()

    def _voxels(self, box: Box) -> Array:
        """The voxels (c, z, y, x) of a part, made piece by piece."""
        voxels = np.empty((self.target.shape[0], *box.shape), self.target.dtype)
        for piece in BlockGrid(box.shape, self.piece):
            voxels[(slice(None), *piece.core.slices)] = self._made(piece.core.shift(box.start))
        return voxels

    def _made(self, box: Box) -> Array:
        """The voxels of a box; windows that the volume's faces cut are filled by repeating the face.

        A window has two voxels an axis at most, so repeating counts each remaining voxel alike.
        """
        step, phase = self.level.step, self.level.phase
        roi = Box(
            vec3([a * s - p for a, s, p in zip(box.start, step, phase, strict=True)]),
            vec3([b * s - p for b, s, p in zip(box.stop, step, phase, strict=True)]),
        )
        inside = roi.intersect(self.extent_before)
        voxels = self.before.read(inside)
        if step == (1, 1, 1):
            return voxels
        edges = zip(roi.start, inside.start, inside.stop, roi.stop, strict=True)
        padded = np.pad(voxels, [(0, 0), *((b - a, d - c) for a, b, c, d in edges)], mode="edge")
        return (mode if self.labels else mean)(padded, step)


def _cut(box: Box, shape: Vec3) -> Iterator[Box]:
    return (part.core.shift(box.start) for part in BlockGrid(box.shape, shape))


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A chunked output that is being made at ``place``; no other output of the volume has its name."""

    name: str
    image: Multiscale
    place: Path
    labels: bool


def fill_pyramid(pyramid: Pyramid, source: Store, run: RunStage, key: str) -> None:
    """Make all levels, continuing what a killed run left; the caller is the only one who does.

    ``source`` is the complete working store; the ledgers lie beside the place, and one of another ``key`` is refused.
    Raises OutputError if the disk refuses or gives other voxels, QuarantineError if blocks failed.
    """
    _prepare(pyramid, anew=not pyramid.place.is_dir())
    tasks = level_tasks(pyramid, source)
    if not all(_intact(task, folder, key) for folder, task in tasks.items()):
        log.warning("%s: recorded blocks are missing or damaged on disk and it is made again", pyramid.place.name)
        _prepare(pyramid, anew=True)
        tasks = level_tasks(pyramid, source)
    for folder, task in tasks.items():
        with contextlib.closing(_ledger(task, folder, key)) as ledger:
            blocks = run(task, ledger)
            if blocks.failures:
                raise QuarantineError(failure_message(blocks.failures, blocks.planned, ledger.folder))


def _ledger_folder(pyramid: Pyramid, level: int) -> Path:
    return pyramid.place.parent / f"{LEDGER}_{pyramid.name}.{level}"


def _prepare(pyramid: Pyramid, *, anew: bool) -> None:
    """Arrays, empty where they are made anew."""
    try:
        if anew:
            for k in range(len(pyramid.image.levels)):
                discard(_ledger_folder(pyramid, k))
            discard(pyramid.place)
            _create(pyramid)
        discard_unwritten(pyramid.place)
    except OSError as error:
        raise OutputError(
            f"cannot make {pyramid.place}: {reason(error)}. Free disk space or mend the permission, then run again."
        ) from error


def discard_unwritten(place: Path) -> None:
    """Remove files from an output's folder that were not written to their end."""
    for pattern in LEFT_BEHIND:
        for file in place.rglob(pattern):
            file.unlink(missing_ok=True)


def _create(pyramid: Pyramid) -> None:
    """The folder with the metadata of the arrays; it is there with all of them or not at all."""
    with replacing(pyramid.place) as temporary:
        for name, text in pyramid.image.files().items():
            folder, _, file = name.rpartition("/")
            (temporary / folder).mkdir(parents=True, exist_ok=True)
            if file:
                (temporary / name).write_text(text)


def level_tasks(pyramid: Pyramid, source: Store) -> Mapping[Path, LevelTask]:
    """The task of each level of a pyramid that was begun, by the folder of its ledger, in the order they are done in.

    Pieces are such that each chunk is read once.
    """
    tasks: dict[Path, LevelTask] = {}
    before: Readable = source
    chunk, extent = source.info.chunk_shape, source.info.extent
    for k, level in enumerate(pyramid.image.levels):
        target = pyramid.image.open(pyramid.place, k)
        least = vec3([-(-c // s) for c, s in zip(chunk, level.step, strict=True)])
        read_bytes = target.shape[0] * target.dtype.itemsize * math.prod(level.step)
        piece = grown(least, level.extent, read_bytes, PIECE_BYTES)
        name = f"{pyramid.place.name} level {k}"
        tasks[_ledger_folder(pyramid, k)] = LevelTask(
            name, before, Box.of_shape(extent), level, target=target, piece=piece, labels=pyramid.labels
        )
        before, chunk, extent = target, target.chunk_shape, level.extent
    return tasks


def _ledger(task: LevelTask, folder: Path, key: str) -> Ledger:
    unit, chunk = task.target.unit_shape, task.target.chunk_shape
    level_key = key_of({"result_key": key, "level": task.name, "unit": list(unit), "chunk": list(chunk)})
    return Ledger(folder, level_key, {}, BlockPlan(unit, chunk), volume=task.level.extent)


def _intact(task: LevelTask, folder: Path, key: str) -> bool:
    """Whether a sample of the blocks that a level's ledger has is on disk as it was written."""
    if not folder.exists():
        return True
    with contextlib.closing(_ledger(task, folder, key)) as ledger:
        stride = max(1, ledger.finished // CHECKED_BLOCKS)
        return all(task.whole(record) for record in itertools.islice(ledger.records(), 0, None, stride))
