"""Append-only files of lines that survive a kill, and generations: what was read of all of them, kept as one file.

Each line is on the disk when ``append`` returns. A generation spares whoever comes later the reading; the lines stay.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from connectomics.core.errors import StorageError
from connectomics.core.files import fsync_path, write_once
from connectomics.core.process import new_mark

READ_BYTES = 1 << 20
GENERATION = "generation-"
NEVER = -1e9
OPENED_S = 5.0  # after which a file is opened though it seems not to have grown


@dataclass(slots=True)
class FileRead:
    """How far a file was read, and when it was opened last; ``lines`` are records, the first line tells of them all."""

    bytes: int = 0
    lines: int = 0
    damaged: bool = False
    numeric_class: Mapping[str, object] | None = None
    signature: Mapping[str, Any] = field(default_factory=dict)
    last: int = 0
    opened: float = NEVER

    def is_all_of(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file is as long as when it was read; not if that is long ago, as networks hide what grew."""
        if time.monotonic() - self.opened > OPENED_S:
            return False
        try:
            return entry.stat().st_size <= self.bytes
        except FileNotFoundError:
            return True

    def stands_in(self, path: Path) -> bool:
        """Whether all that was read is there."""
        try:
            return path.stat().st_size >= self.bytes
        except FileNotFoundError:
            return False


class LineFile:
    """A new file of this process alone in ``folder``, whose name ends in ``suffix``."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self.path = folder / (new_mark() + suffix)
        self.bytes = 0
        self._stream: FileIO | None = None

    def append(self, line: str, what: str) -> None:
        """Write a line; on return it is on the disk.

        If the disk refuses, StorageError says that it cannot do ``what``; the file must not be used any more then.
        """
        content = line.encode() + b"\n"
        try:
            if self._stream is None:
                self._stream = FileIO(self.path, "xb")
                fsync_path(self.path.parent)
            if self._stream.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot {what} ({error.strerror}); free the disk and rerun, finished blocks are kept"
            ) from error
        self.bytes += len(content)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def whole_lines(path: Path, start: int) -> Iterator[tuple[bytes, int]]:
    """Lines from byte ``start`` on that are complete, each with the byte behind it; nothing where the file is gone."""
    try:
        stream = path.open("rb", buffering=READ_BYTES)
    except FileNotFoundError:
        return
    with stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield line, start


def keep_generation(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep what was read of the files in a folder as the next generation; another may be first, which is as good."""
    number = max(_generations(folder), default=-1) + 1
    content = json.dumps(facts)
    write_once(folder / f"{GENERATION}{number}", f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")


def last_generation(folder: Path) -> dict[str, Any] | None:
    """What was kept last and can be read, or None where nothing was."""
    for number in sorted(_generations(folder), reverse=True):
        checksum, _, content = (folder / f"{GENERATION}{number}").read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == checksum:
            facts: dict[str, Any] = json.loads(content)
            return facts
    return None


def _generations(folder: Path) -> list[int]:
    numbers = (path.name.removeprefix(GENERATION) for path in folder.glob(f"{GENERATION}*"))
    return [int(number) for number in numbers if number.isdecimal()]
