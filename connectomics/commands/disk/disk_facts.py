"""What one process finds out about a disk by itself: kind, space, clock, and which operations work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

FILE_FSYNC, FOLDER_FSYNC = "fsync of files", "fsync of folders"
LINK, SYMLINK, RENAME = "hard links", "symbolic links", "renaming over a file"
_OF_LINUX = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs"})
LOCAL = _OF_LINUX | {"apfs", "exfat", "hfs", "msdos", "ntfs3", "ufs", "vfat", "zfs"}
"""Kinds of file systems that one machine alone writes to."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What one process finds out by itself.

    Parameters
    ----------
    kind
        Of the file system, as the system calls it; empty where it does not say.
    free_bytes
        That this user may fill.
    free_files
        Inodes that are free; None where the file system does not count them.
    clock_ahead_s
        The time of a new file less this machine's time.
    refused
        Operations that do not work, by their names above, and why.
    ignores_case
        Whether ``a`` and ``A`` are one name.
    """

    kind: str
    free_bytes: int
    free_files: int | None
    clock_ahead_s: float
    refused: Mapping[str, str]
    ignores_case: bool

    @property
    def is_local(self) -> bool:
        """Whether one machine alone writes to it, as far as its kind tells."""
        return self.kind in LOCAL


def facts_of(folder: Path) -> DiskFacts:
    """Find out about the disk of a folder by making files in it, which stay there.

    Raises
    ------
    OSError
        If files cannot be made.
    """
    space = os.statvfs(folder)
    (folder / "case").touch()
    return DiskFacts(
        kind_of(folder),
        space.f_bavail * space.f_frsize,
        space.f_favail if space.f_files else None,
        clock_ahead_s=_clock_ahead_s(folder / "clock"),
        refused={name: why for name, attempt in _ATTEMPTS.items() if (why := _refusal(attempt, folder))},
        ignores_case=(folder / "CASE").exists(),
    )


def kind_of(folder: Path) -> str:
    """What the system calls the file system of a folder, such as ``ext4`` or ``nfs4``; empty where it does not say."""
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    found = [(len(point), place, kind) for place, (point, kind) in enumerate(mounts) if point in above]
    return max(found)[2] if found else ""  # the deepest, and of several there the last


def _clock_ahead_s(path: Path) -> float:
    before = time.time()
    path.write_text("now")
    after = time.time()
    return path.stat().st_mtime - (before + after) / 2


def _refusal(attempt: Callable[[Path], str], folder: Path) -> str:
    try:
        return attempt(folder)
    except OSError as error:
        return error.strerror or str(error)


def _file_fsync(folder: Path) -> str:
    path = folder / "synced"
    path.write_text("data")
    _flush(path)
    return ""


def _folder_fsync(folder: Path) -> str:
    _flush(folder)
    return ""


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(folder: Path) -> str:
    one, two = folder / "one", folder / "two"
    one.write_text("linked")
    os.link(one, two)
    return "" if two.read_text() == "linked" and two.samefile(one) else "the link is another file"


def _symlink(folder: Path) -> str:
    (folder / "target").write_text("pointed to")
    (folder / "symlink").symlink_to("target")
    return "" if (folder / "symlink").read_text() == "pointed to" else "the link leads nowhere"


def _rename(folder: Path) -> str:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    return "" if old.read_text() == "new" and not new.exists() else "the old file is still there"


_ATTEMPTS: Mapping[str, Callable[[Path], str]] = {
    FILE_FSYNC: _file_fsync,
    FOLDER_FSYNC: _folder_fsync,
    LINK: _link,
    SYMLINK: _symlink,
    RENAME: _rename,
}
