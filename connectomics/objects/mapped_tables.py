"""Tables in files that are mapped into memory, so that memory holds a part of them; ``merge`` and its like fill them.

A mapped page for which the disk has no room kills the process (SIGBUS), so all of a table's room is taken beforehand.
"""

from __future__ import annotations

import errno
import os
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import StorageError
from connectomics.volumes.volume import Array

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENODEV)
"""What is said where room cannot be taken without writing."""
ZEROS = bytes(1 << 20)


def table(path: Path, count: int, kind: npt.DTypeLike) -> np.memmap[Any, Any]:
    """A new table of ``count`` rows, all zero, in a file, mapped; where there is none it holds one row nobody reads.

    Raises
    ------
    StorageError
        If the disk has no room for it.
    """
    dtype, shape = np.dtype(kind), (max(count, 1),)
    try:
        with path.open("w+b", buffering=0) as stream:
            head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, head)
            _allocate(stream, stream.tell() + shape[0] * dtype.itemsize)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}, {shape[0] * dtype.itemsize} bytes: {error.strerror}. Free disk space or mend the "
            "permission, then run again; finished blocks are kept."
        ) from error
    return changeable(path)


def changeable(path: Path) -> np.memmap[Any, Any]:
    """A table that is there, mapped, for reading and changing."""
    found: np.memmap[Any, Any] = np.load(path, mmap_mode="r+")
    return found


def flush(*tables: np.memmap[Any, Any]) -> None:
    """Bring what was changed in tables to the disk; an OSError names the file."""
    for each in tables:
        try:
            each.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(each.filename)) from error


def mapped(path: Path, count: int, kind: npt.DTypeLike) -> Array:
    """The rows of a file without header, mapped, for reading."""
    return np.memmap(path, kind, "r", shape=(count,)) if count else np.zeros(0, kind)


def _allocate(stream: FileIO, nbytes: int) -> None:
    """Give a file this size, with room on the disk for all of it."""
    if sys.platform == "linux":
        try:
            os.posix_fallocate(stream.fileno(), 0, nbytes)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    missing = nbytes - stream.seek(0, os.SEEK_END)
    while missing > 0:
        missing -= stream.write(ZEROS[:missing])
