"""Append-only files of lines that survive a kill: each line is on the disk when ``append`` returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from connectomics.core.errors import StorageError
from connectomics.core.files import fsync_path
from connectomics.core.process import new_mark

READ_BYTES = 1 << 20


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
