"""Files that appear under their final name only when complete: write to a temporary name, fsync, rename.

Temporary names carry the mark of their process, so that two processes never share one and only leftovers are removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.core.process import is_dead, is_mark, new_mark

TEMPORARY = ".partial"
REPLACED = ".replaced"
LEFT_S = 24 * 3600.0  # age from which the temporary of another machine's process counts as left behind
LONGEST_NAME = 255
LONG_NAME = 180  # bytes of a name from which its temporaries are called by its digest; file systems allow 255
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR)


def require_short(name: str) -> None:
    """Refuse a name that file systems do not take.

    Raises
    ------
    OutputError
        Saying how much shorter it must be.
    """
    excess = len(os.fsencode(name)) - LONGEST_NAME
    if excess > 0:
        raise OutputError(
            f"{name[:40]}…: the name of the result is {excess} bytes longer than the {LONGEST_NAME} that file systems "
            "allow; shorten the volume's name, or link to it by a shorter one"
        )


def fsync_path(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a loss of power; one that is there is fine."""
    absent = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        fsync_path(folder.parent)


def discard(path: Path) -> None:
    """Remove a file or a folder with all it holds; absent is fine, also when another process removes it too."""
    while path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def temporary_beside(path: Path, kind: str = TEMPORARY) -> Path:
    """A hidden name beside ``path`` that belongs to this process alone."""
    return path.with_name(f"{_hidden(path)}{new_mark()}{kind}")


def _hidden(path: Path) -> str:
    """How the temporaries of a path begin: with its name, where there is room for the rest."""
    name = path.name
    if len(os.fsencode(name)) > LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}."


def discard_temporaries(path: Path) -> None:
    """Remove what processes that live no more left beside ``path`` under temporary names."""
    prefix = _hidden(path)
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            kind = next((k for k in (TEMPORARY, REPLACED) if entry.name.endswith(k)), None)
            if kind is None or not entry.name.startswith(prefix):
                continue
            mark = entry.name.removeprefix(prefix).removesuffix(kind)
            if is_mark(mark) and (is_dead(mark) or _age_s(Path(entry.path)) > LEFT_S):
                discard(Path(entry.path))


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def put_in_place(complete: Path, path: Path) -> None:
    """Rename what is complete to ``path``: a file replaces a file, a folder is let go where one stands already.

    Folders of one name that several processes make are equal; so nobody takes away what others work with.
    """
    try:
        complete.replace(path)
    except OSError as error:
        if error.errno not in TAKEN or not (path.is_dir() and complete.is_dir()):
            raise
        discard(complete)
    for folder in {complete.parent, path.parent}:
        fsync_path(folder)
    discard_temporaries(path)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with all it holds, to the disk."""
    if not path.is_dir():
        fsync_path(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it and rename it to ``path``.

    The body may create a file or a folder there. If it raises, the temporary is removed and ``path`` is untouched.
    Leftovers of killed processes are removed first.
    """
    discard_temporaries(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync_tree(temporary)
        put_in_place(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_once(path: Path, text: str) -> bool:
    """Write a small text file unless one stands there; of several processes that do so at once one wins.

    Returns
    -------
    won
        Whether this call wrote it.
    """
    discard_temporaries(path)
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        fsync_path(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: nearly as good
            if path.exists():
                return False
            temporary.replace(path)
        fsync_path(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
