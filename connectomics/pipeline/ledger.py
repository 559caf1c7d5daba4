"""The durable record of the finished blocks of one run key: a header line, then one JSON line a block.

A line is on disk only after the block's data are; a torn last line is a block that was not finished.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from connectomics.errors import LedgerError, OutputError
from connectomics.geometry import vec3
from connectomics.io.atomic import write_text
from connectomics.pipeline.contracts import BlockRecord
from connectomics.pipeline.planning import BlockPlan

VERSION = 1


class Ledger:
    """Open the ledger at ``path``, or start it.

    Parameters
    ----------
    path
        The file; its folder exists.
    run_key
        Of the work it records.
    numeric_class
        Backend, precision, batch, threads and device that compute the blocks.
    plan
        How the volume is cut, for whoever continues; see ``plan_of``.
    allow_other_class
        Go on although the recorded blocks were computed by another numeric class.

    Raises
    ------
    LedgerError
        If the file is not a ledger, is of another run key, or of another numeric class that is not allowed.
    """

    def __init__(
        self,
        path: Path,
        run_key: str,
        numeric_class: Mapping[str, object],
        plan: BlockPlan,
        *,
        allow_other_class: bool = False,
    ) -> None:
        self._path = path
        self._stream: FileIO | None = None
        self._records: dict[str, BlockRecord] = {}
        self._header: dict[str, Any] = {
            "ledger": VERSION,
            "run_key": run_key,
            "numeric_class": dict(numeric_class),
            "mixed": False,
            "plan": asdict(plan),
        }
        if not path.exists():
            self._rewrite()
        lines = path.read_bytes().split(b"\n")
        found = _parse_header(path, lines[0])
        if found.get("run_key") != run_key:
            raise LedgerError(
                f"{path}: records the run {found.get('run_key')}, expected {run_key}; remove the folder "
                f"{path.parent} to start this volume over"
            )
        self._whole_bytes = len(lines[0]) + 1
        for line in lines[1:-1]:
            record = _parse_record(line)
            if record is None:
                break
            self._records[record.block] = record
            self._whole_bytes += len(line) + 1
        self._join(found, allow_other_class)

    def _join(self, found: dict[str, Any], allow_other_class: bool) -> None:
        """Take over the header found, unless its blocks are of another numeric class and that is not allowed."""
        now = self._header["numeric_class"]
        if found.get("numeric_class") == now:
            self._header = found
        elif not self._records:
            self._rewrite()
        elif allow_other_class:
            self._header = found | {"mixed": True}
            self._rewrite()
        else:
            raise LedgerError(
                f"{self._path}: the finished blocks were computed with {found.get('numeric_class')}, now it is {now}, "
                "whose logits differ in the last bits; use the same again, or state "
                "system.allow_mixed_devices=true to go on without the promise of equal bytes"
            )

    @property
    def mixed(self) -> bool:
        """Whether blocks of several numeric classes may stand here."""
        return bool(self._header["mixed"])

    @property
    def records(self) -> Mapping[str, BlockRecord]:
        """Finished blocks by key."""
        return self._records

    def forget(self, blocks: set[str]) -> None:
        """Take blocks out again whose data turned out to be missing or damaged; rewrites the file whole."""
        self._records = {k: r for k, r in self._records.items() if k not in blocks}
        self._rewrite()

    def _rewrite(self) -> None:
        self.close()
        lines = [json.dumps(self._header), *(json.dumps(asdict(r)) for r in self._records.values())]
        write_text(self._path, "\n".join([*lines, ""]))
        self._whole_bytes = self._path.stat().st_size

    def append(self, record: BlockRecord) -> None:
        """Record a block whose data are on disk; on return the line is too.

        Raises
        ------
        OutputError
            If the disk refuses.
        """
        line = json.dumps(asdict(record)).encode() + b"\n"
        try:
            if self._stream is None:
                self._stream = self._path.open("r+b", buffering=0)
                self._stream.truncate(self._whole_bytes)
                self._stream.seek(0, os.SEEK_END)
            if self._stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._stream.fileno())
        except OSError as error:
            self.close()
            raise OutputError(
                f"{self._path}: cannot record block {record.block} ({error.strerror}); free the disk and rerun, "
                "finished blocks are kept"
            ) from error
        self._whole_bytes += len(line)
        self._records[record.block] = record

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def plan_of(path: Path) -> BlockPlan | None:
    """The plan in the header of the ledger at ``path``, or None where there is no ledger.

    Raises
    ------
    LedgerError
        If the file is not a ledger of this version.
    """
    if not path.exists():
        return None
    with path.open("rb") as stream:
        plan = _parse_header(path, stream.readline())["plan"]
    return BlockPlan(vec3(plan["block_shape"]), vec3(plan["chunk_shape"]))


def _parse_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError as error:
        raise LedgerError(
            f"{path}: the first line is not a ledger's header ({error}); remove {path.parent} to start this volume over"
        ) from error
    if not isinstance(header, dict) or header.get("ledger") != VERSION:
        raise LedgerError(
            f"{path}: found ledger version {header!r:.80}, expected {VERSION}; finish the run with the program "
            f"that began it, or remove {path.parent} to start over"
        )
    return header


def _parse_record(line: bytes) -> BlockRecord | None:
    """The record in a line, or None where the line is torn."""
    try:
        fields = json.loads(line)
        return BlockRecord(
            str(fields["block"]), dict(fields["checksums"]), int(fields["windows"]), float(fields["seconds"])
        )
    except (ValueError, KeyError, TypeError):
        return None
