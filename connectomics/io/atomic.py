"""Files that appear under their final name only when complete: write to a temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".partial"
REPLACED = ".replaced"


def fsync_path(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or a folder with all it holds; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(complete: Path, path: Path) -> None:
    """Rename a complete file or folder to ``path``; a folder that stands there is moved aside, never half removed."""
    aside = path.with_name(f".{path.name}{REPLACED}")
    discard(aside)
    if path.is_dir():
        path.rename(aside)
    complete.replace(path)
    for folder in {complete.parent, path.parent}:
        fsync_path(folder)
    discard(aside)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it and rename it to ``path``.

    The body may create a file or a folder there. If it raises, the temporary is removed and ``path`` is untouched.
    A leftover of a killed process is removed first.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    discard(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(folder, name))
                fsync_path(Path(folder))
        else:
            fsync_path(temporary)
        put_in_place(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)
