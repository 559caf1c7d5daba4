"""The durable record of the finished blocks of one stage: a header and one append-only file for each worker.

A line is on disk only after the block's data are; a torn last line is a block that was not finished. A block is undone
by a further line that names the record it voids, so the order between files never matters.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import LedgerError, StorageError
from connectomics.core.files import make_folder, write_once, write_text
from connectomics.core.geometry import Block, Vec3, vec3
from connectomics.execution.append_log import NEVER, FileRead, LineFile, keep_generation, last_generation, whole_lines
from connectomics.execution.block_plan import HEADER, VERSION, BlockPlan, grid_of, plan_in, read_header
from connectomics.execution.task import BlockRecord

log = logging.getLogger(__name__)
SUFFIX = ".jsonl"
GENERATION_LINES = 50_000  # after which what was read is kept for whoever comes later
MOST = 255  # records of one block that are counted


@dataclass(frozen=True, slots=True)
class RecordName:
    """Where a record stands: the file it is in and its number there."""

    file: str
    number: int


@dataclass(frozen=True, slots=True)
class WorkerFile:
    """A worker's file: its name, what it was signed with (see ``Ledger.sign``), and when its last record was made."""

    name: str
    signature: Mapping[str, Any]
    last: int


class Ledger:
    """Open the ledger in ``folder``, or start it; memory holds one byte a block.

    Parameters
    ----------
    folder
        Where it is; made if absent.
    run_key
        Of the work it records.
    numeric_class
        Backend, precision, batch, threads and device that compute the blocks.
    plan
        How the volume is cut, for whoever continues; see ``plan_of``.
    volume
        Extent (z, y, x) in voxels of what is cut.
    allow_other_class
        Go on although the recorded blocks were computed by another numeric class.
    begin
        Whether one is started where there is none; without this, nothing is ever written unless it is asked for.

    Raises
    ------
    LedgerError
        If the folder holds no ledger, one of another run key, or of another numeric class that is not allowed.
    """

    def __init__(
        self,
        folder: Path,
        run_key: str,
        numeric_class: Mapping[str, object],
        plan: BlockPlan,
        volume: Vec3,
        *,
        allow_other_class: bool = False,
        begin: bool = True,
    ) -> None:
        self._folder = folder
        self._class = dict(numeric_class)
        self._signature: Mapping[str, Any] = {}
        self._lenient = allow_other_class
        self._own: LineFile | None = None
        self._read: dict[str, FileRead] = {}
        self._voided: set[RecordName] = set()
        self._undone: set[int] = set()  # blocks of which a record was voided
        self._chosen: npt.NDArray[np.bool_] | None = None
        self._header: dict[str, Any] = {
            "ledger": VERSION,
            "run_key": run_key,
            "numeric_class": self._class,
            "mixed": False,
            "plan": asdict(plan),
            "volume": list(volume),
        }
        if begin:
            make_folder(folder)
            if not (folder / HEADER).exists():
                write_once(folder / HEADER, json.dumps(self._header))
        found = read_header(folder)
        if found.get("run_key") != run_key:
            raise LedgerError(
                f"{folder}: records the run {found.get('run_key')}, expected {run_key}; remove the folder "
                f"{folder.parent} to start this volume over"
            )
        self.grid = grid_of(found)
        self._extent = self.grid.counts
        self._counts = bytearray(len(self.grid))
        self._finished = 0
        self._since = 0  # lines that no generation has
        self._begins = begin
        self._take_generation()
        self.refresh()
        self._join(found)

    @classmethod
    def existing(cls, folder: Path) -> Ledger:
        """The ledger in ``folder`` as it was begun; a LedgerError if there is none."""
        header = read_header(folder)
        return cls(
            folder,
            header["run_key"],
            header["numeric_class"],
            plan_in(header),
            volume=vec3(header["volume"]),
            begin=False,
        )

    def _join(self, found: dict[str, Any]) -> None:
        """Take over the header found, unless its blocks are of another numeric class and that is not allowed."""
        if found.get("numeric_class") == self._class:
            self._header = found
        elif not self._finished:
            write_text(self._folder / HEADER, json.dumps(self._header))
        elif self._lenient:
            self._header = found | {"mixed": True}
            write_text(self._folder / HEADER, json.dumps(self._header))
        else:
            raise self._other_class(found)

    def _other_class(self, found: Mapping[str, Any]) -> LedgerError:
        return LedgerError(
            f"{self._folder}: the finished blocks were computed with {found.get('numeric_class')}, now it is "
            f"{self._class}, whose logits differ in the last bits; use the same again, or state "
            "system.allow_mixed_devices=true to go on without the promise of equal bytes"
        )

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._folder

    @property
    def mixed(self) -> bool:
        """Whether blocks of several numeric classes may stand here."""
        classes = [r.numeric_class for r in self._read.values() if r.lines and r.numeric_class is not None]
        return bool(self._header["mixed"]) or any(c != classes[0] for c in classes)

    @property
    def planned(self) -> int:
        """Number of blocks that have something to do."""
        return int(self._header.get("planned", len(self.grid)))

    @property
    def finished(self) -> int:
        """Number of blocks that are done."""
        return self._finished

    def is_done(self, block: Block) -> bool:
        """Whether a record of the block stands that is not voided; as of the last ``refresh``."""
        return self._counts[self.grid.number(block.index)] > 0

    def is_recorded(self, index: Vec3) -> bool:
        """Whether the block of this index is done; as of the last ``refresh``."""
        return self._counts[self.grid.number(index)] > 0

    def block(self, key: str) -> Block:
        """The block of a key."""
        return self.grid.block(_index(key))

    def choose(self, flags: npt.NDArray[np.bool_]) -> None:
        """Leave out the blocks whose flag (bool of ``grid.counts``) is not set: they have nothing to do."""
        self._chosen = flags.reshape(-1)
        planned = int(np.count_nonzero(flags))
        if planned != self.planned:
            self._header["planned"] = planned
            write_text(self._folder / HEADER, json.dumps(self._header))

    def unfinished(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Numbers of blocks that have something to do and are not done when their turn comes, in raster order.

        Only those from ``start`` on and before ``stop``.
        """
        number = self._counts.find(0, start, stop)
        while number >= 0:
            if self._chosen is None or self._chosen[number]:
                yield number
            number = self._counts.find(0, number + 1, stop)

    def was_undone(self, number: int) -> bool:
        """Whether a record of a block was voided, as of the last ``refresh``."""
        return number in self._undone

    def sign(self, signature: Mapping[str, Any]) -> None:
        """Say who records from now on; it stands in the first line of a file, which is a new one where need be."""
        if signature != self._signature:
            self.close()
        self._signature = dict(signature)

    def append(self, record: BlockRecord) -> None:
        """Record a block whose data are on disk; on return the line is too.

        Raises StorageError if the disk refuses, LedgerError if another process began to record another numeric class.
        """
        self._write(asdict(record) | {"at": int(time.time())}, f"record block {record.block}")

    def void(self, name: RecordName, block: str) -> None:
        """Undo one record of a block, whose data turned out to be missing or damaged; see ``named_records``."""
        self._write({"void": [name.file, name.number], "block": block}, f"undo block {block}")

    def refresh(self) -> None:
        """Take over what other workers appended since the last time."""
        try:
            with os.scandir(self._folder) as entries:
                found = sorted((e for e in entries if e.name.endswith(SUFFIX)), key=lambda entry: entry.name)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self._folder}: was removed or unmounted amid the run; mend the disk and run again, blocks whose "
                "records are there are kept"
            ) from error
        for entry in found:
            state = self._read.setdefault(entry.name, FileRead())
            if not (state.damaged or state.is_all_of(entry)):
                self._go_on(self._folder / entry.name, state)
        if self._begins and self._since >= GENERATION_LINES and not any(r.damaged for r in self._read.values()):
            self._since = 0
            keep_generation(self._folder, self._as_read())

    def _as_read(self) -> dict[str, Any]:
        """What a generation says: how far each file was read, and what was found in them."""
        return {
            "counts": base64.b64encode(zlib.compress(bytes(self._counts))).decode(),
            "voided": [[name.file, name.number] for name in self._voided],
            "undone": sorted(self._undone),
            "files": {file: asdict(state) for file, state in self._read.items()},
        }

    def _take_generation(self) -> None:
        """Begin with what another process kept of its reading, where all files that it read are there."""
        kept = last_generation(self._folder)
        if kept is None:
            return
        files = {file: FileRead(**state | {"opened": NEVER}) for file, state in kept["files"].items()}
        counts = zlib.decompress(base64.b64decode(kept["counts"]))
        if len(counts) != len(self._counts) or not all(r.stands_in(self._folder / f) for f, r in files.items()):
            return
        self._read, self._counts, self._finished = files, bytearray(counts), len(counts) - counts.count(0)
        self._voided = {RecordName(file, number) for file, number in kept["voided"]}
        self._undone = set(kept["undone"])

    def _go_on(self, path: Path, state: FileRead) -> None:
        """Read what is new in a file."""
        state.opened = time.monotonic()
        for line, end in whole_lines(path, state.bytes):
            if not self._take(path.name, state, line):
                state.damaged = True
                log.warning("%s: damaged behind byte %d; nothing from there on is trusted", path, state.bytes)
                break
            state.bytes = end
            self._since += 1

    def records(self) -> Iterator[BlockRecord]:
        """Records that stand, read from the disk one by one; a block may have several."""
        return (record for _, record in self.named_records())

    def files(self) -> list[WorkerFile]:
        """The workers' files, as of the last ``refresh``."""
        return [WorkerFile(name, state.signature, state.last) for name, state in self._read.items()]

    def named_records(self, only: str | None = None) -> Iterator[tuple[RecordName, BlockRecord]]:
        """Yield what ``records`` yields, each with its name; of one file only where that is named."""
        for file, state in list(self._read.items()):
            if only not in (None, file):
                continue
            number = -2
            for line, end in whole_lines(self._folder / file, 0):
                number += 1
                if end > state.bytes:
                    break
                if number < 0:
                    continue
                name, fields = RecordName(file, number), json.loads(line)
                if "void" not in fields and name not in self._voided:
                    yield name, record_of(fields)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _write(self, fields: dict[str, object], what: str) -> None:
        if self._own is None:
            self._require_same_class()
            self._own = LineFile(self._folder, SUFFIX)
            signed = {"signature": self._signature} if self._signature else {}
            self._write({"numeric_class": self._class, **signed}, what)
        own = self._own
        try:
            own.append(json.dumps(fields), what)
        except BaseException:
            self.close()  # its last line may be torn: what follows goes into another file
            raise
        state = self._read.setdefault(own.path.name, FileRead())
        if self._take(own.path.name, state, json.dumps(fields).encode()):
            state.bytes = own.bytes
            self._since += 1

    def _require_same_class(self) -> None:
        found = read_header(self._folder)
        if found.get("numeric_class") != self._class and not self._lenient:
            raise self._other_class(found)

    def _take(self, file: str, state: FileRead, line: bytes) -> bool:
        """Take over a line; False where it is damaged."""
        try:
            fields = json.loads(line)
            if state.bytes == 0:
                state.numeric_class = dict(fields["numeric_class"])
                state.signature = dict(fields.get("signature", {}))
                return True
            number = self._number(fields["block"])
            if "void" in fields:
                name = RecordName(str(fields["void"][0]), int(fields["void"][1]))
                self._void(name, number)
            else:
                _require_whole(fields)
                state.last = int(fields.get("at", 0))
                if not self._voided or RecordName(file, state.lines) not in self._voided:
                    self._count(number, 1)
        except (ValueError, KeyError, TypeError, IndexError):
            return False
        state.lines += 1
        return True

    def _number(self, key: str) -> int:
        """Number a block as ``grid.number`` does; a million take a few seconds less."""
        z, y, x = map(int, key.split("-"))
        nz, ny, nx = self._extent
        if not (0 <= z < nz and 0 <= y < ny and 0 <= x < nx):
            raise IndexError(key)
        return (z * ny + y) * nx + x

    def _void(self, name: RecordName, number: int) -> None:
        if name not in self._voided:
            self._voided.add(name)
            self._undone.add(number)
            if name.file in self._read and name.number < self._read[name.file].lines:
                self._count(number, -1)

    def _count(self, number: int, change: int) -> None:
        before = self._counts[number]
        self._counts[number] = min(MOST, max(0, before + change))
        self._finished += (self._counts[number] > 0) - (before > 0)


def _index(key: str) -> Vec3:
    return vec3([int(part) for part in key.split("-")])


def _require_whole(fields: Mapping[str, Any]) -> None:
    """Raise what ``record_of`` would, without making one."""
    if not isinstance(fields["checksums"], dict):
        raise TypeError("checksums")
    int(fields["windows"])
    float(fields["seconds"])


def record_of(fields: Mapping[str, Any]) -> BlockRecord:
    """The record in a line; errors are those of damaged JSON."""
    return BlockRecord(
        str(fields["block"]), dict(fields["checksums"]), int(fields["windows"]), float(fields["seconds"])
    )
