"""Files that appear under their final name only when complete: write to a temporary name, fsync, rename.

Temporary names carry the mark of their process, so that two processes never share one and only leftovers are removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.core.process import is_dead, is_mark, new_mark

log = logging.getLogger(__name__)
TEMPORARY = ".partial"
REPLACED = ".replaced"
LEFT_S = 24 * 3600.0  # age from which the temporary of another machine's process counts as left behind
LONGEST_NAME = 255
LONG_NAME = 180  # bytes of a name from which its temporaries are called by its digest; file systems allow 255
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR)
NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS)
"""What a file system says that cannot flush a folder; whatever else it says went wrong."""
REMEMBERED_FOLDERS = 4096
PROBED = 40  # characters of a name from the first that differs on


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
    """Flush a file or directory to the disk; an OSError names it.

    Where a file system cannot flush directories, which SMB shares and some FUSE file systems cannot, that is logged
    once and goes on: when their entries reach the disk is up to that file system.
    """
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in NO_FOLDERS or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
        if log.isEnabledFor(logging.INFO):
            _tell_unflushed(error.strerror)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _tell_unflushed(why: str | None) -> None:
    log.info("folders cannot be flushed on this file system (%s): a loss of power may cost the last results", why)


def flushes_folders(folder: Path) -> bool:
    """Whether the file system of a folder can flush folders; True also where flushing fails for another reason."""
    try:
        _flush(folder)
    except OSError as error:
        return error.errno not in NO_FOLDERS
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a loss of power; one that is there is fine."""
    absent = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        fsync_path(folder.parent)


class DurableFolders:
    """Folders from ``root`` on whose entries this process has flushed, each once, whoever made them.

    Libraries that make missing folders flush the files in them and no entry above. The last few thousand folders are
    remembered; to flush one again does no harm. Threads may share it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._once = functools.lru_cache(maxsize=REMEMBERED_FOLDERS)(self._flush)

    def keep(self, folder: Path) -> None:
        """Flush the entries of a folder and of those above it up to ``root``; nothing where it is absent."""
        if folder.is_dir():
            self._once(folder)

    def _flush(self, folder: Path) -> None:
        above = folder.parent
        if self._root in folder.parents:
            self._once(above)
        fsync_path(above)


def tells_apart(folder: Path, one: str, other: str) -> bool:
    """Whether two names are two files in a folder, or the nearest one above that exists; True where it cannot be told.

    Some file systems take names for the same that differ in their case, or in how an accent is written.
    """
    here = next(place for place in (folder, *folder.parents) if place.is_dir())
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = max(0, same - 1)  # an accent of its own belongs to the letter before it
    mark = new_mark()
    probe, twin = (here / f".{mark}.{name[begin : begin + PROBED]}{TEMPORARY}" for name in (one, other))
    try:
        probe.touch(exist_ok=False)
        return not twin.exists()
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


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
    """Rename what is complete, and on the disk, to ``path``; on return the name is on the disk, too.

    A file replaces a file; a folder is let go where one stands already: folders of one name that several processes make
    are equal, so nobody takes away what others work with.

    Raises
    ------
    OutputError
        If the two lie on different disks.
    """
    try:
        complete.replace(path)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise other_disk(complete, path) from error
        if error.errno not in TAKEN or not (path.is_dir() and complete.is_dir()):
            raise
        discard(complete)
    for folder in dict.fromkeys((path.parent, complete.parent)):
        fsync_path(folder)
    discard_temporaries(path)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with all it holds, to the disk."""
    if not path.is_dir():
        fsync_path(path)
        return
    for folder, _, names in os.walk(path, onerror=_raised):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def other_disk(complete: Path, path: Path) -> OutputError:
    return OutputError(
        f"{path}: cannot be put in place, because {complete.parent} lies on another disk (a mount or a link within the "
        f"output folder); remove that mount or link, so that both lie on the disk of {path.parent}, and run again"
    )


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


def _raised(error: OSError) -> None:
    raise error


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
            won = True
        except FileExistsError:
            won = False
        except OSError:  # a file system without hard links: nearly as good
            won = not path.exists()
            if won:
                temporary.replace(path)
        fsync_path(path.parent)  # also of another's file: who goes on rests on it
        return won
    finally:
        temporary.unlink(missing_ok=True)
