"""How a result appears: it is built in a folder that one epoch alone ever has, verified, and renamed from there.

A holder of the single writer's lease may sleep between its last check and its rename. So whoever takes over first
empties and removes the folders of earlier epochs: what the sleeper renames is not there any more.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from connectomics.core.errors import StorageError
from connectomics.core.files import discard, fsync_path, make_folder, other_disk
from connectomics.execution.lease import Lease, LeaseLostError
from connectomics.execution.worker import Worker

log = logging.getLogger(__name__)
STAGING = "staging."
ASIDE = "aside."
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


class Staging:
    """The folder in which the holder of a lease builds what it publishes; a context manager.

    What earlier holders left in theirs is moved here under its name, so that it can be gone on with.

    Parameters
    ----------
    work
        Work folder, on the file system of the final names.
    worker, lease
        Who holds the lease.
    confirm
        What else must still hold when something is published; raises LeaseLostError where it does not.
    lasting
        Whether what is built here outlasts a loss of power, so that it can be gone on with.
    """

    def __init__(
        self,
        work: Path,
        worker: Worker,
        lease: str,
        confirm: Callable[[], None] = lambda: None,
        *,
        lasting: bool = True,
    ) -> None:
        self._work = work
        self._lasting = lasting
        self._worker = worker
        self._lease = lease
        self._confirm = confirm
        self._aside = 0
        held = worker.held(lease)
        self._epoch = held.epoch
        self.folder = staging_folder(work, held)

    def __enter__(self) -> Staging:
        if self._lasting:
            make_folder(self.folder)
        else:
            self.folder.mkdir(exist_ok=True)
        self._inode = os.open(self.folder, os.O_RDONLY)
        self.confirm()
        others = [path for path in self._work.glob(f"{STAGING}*") if path != self.folder]
        for other in others:
            if _epoch_of(other) <= self._epoch:  # later ones are of who has taken over here
                revoke(other, self._adopt)
        if others:
            self.confirm()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        stands = self._stands()
        os.close(self._inode)
        if kind is None:
            discard(self.folder)
        elif isinstance(error, Exception) and not isinstance(error, LeaseLostError):
            with contextlib.suppress(StorageError):
                self._confirm()  # what went wrong may be that another run has the names by now
            if not stands:
                raise LeaseLostError(self._lease) from error

    def place(self, name: str) -> Path:
        """Where something is built that will be published."""
        return self.folder / name

    def is_unobserved(self) -> bool:
        """Whether nobody else may still read what this process worked with."""
        return not self._worker.others()

    def confirm(self) -> None:
        """Make sure that this epoch is still the current one; a LeaseLostError where it is not."""
        self._worker.confirm(self._lease)
        self._confirm()

    def publish(self, name: str, final: Path) -> None:
        """Give what is complete and on the disk its final name, where nothing else is kept.

        Both renames start or end in this folder itself, wherever its name leads by now: they fail once it was revoked.
        """
        self.confirm()
        while True:
            try:
                if final.is_dir() or (final.exists() and self.place(name).is_dir()):
                    self.take_away(final)
                rename(name, final, self._inode, None)
                break
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise other_disk(self.folder, final) from error
                if error.errno not in OCCUPIED or not final.is_dir():
                    raise
            self.confirm()
        fsync_path(final.parent)

    def move(self, name: str, target: Path) -> None:
        """Rename what is here to a free name, as ``publish`` does, without asking and flushing; see ``keep``."""
        try:
            rename(name, target, self._inode, None)
        except FileNotFoundError as error:
            raise LeaseLostError(self._lease) from error

    def keep(self) -> None:
        """Flush what was moved out of here: a rename is one step, whichever of its two folders is flushed."""
        fsync_path(self.folder)

    def take_away(self, path: Path) -> None:
        """Move a file or folder here, if it is there, to be removed with this folder."""
        with contextlib.suppress(FileNotFoundError):
            rename(path, self._unused(), None, self._inode)

    def _stands(self) -> bool:
        """Whether the folder is where it was made."""
        try:
            return os.path.samestat(os.fstat(self._inode), self.folder.stat())
        except OSError:
            return False

    def _adopt(self, entry: Path) -> None:
        target = self.folder / (self._unused() if entry.name.startswith(ASIDE) else entry.name)
        if target.exists():
            target = self.folder / self._unused()
        entry.rename(target)

    def _unused(self) -> str:
        """A name that nothing has here, also of what this holder left when it was here before."""
        while True:
            self._aside += 1
            if not os.path.lexists(self.folder / f"{ASIDE}{self._aside}"):
                return f"{ASIDE}{self._aside}"


def staging_folder(work: Path, lease: Lease) -> Path:
    """Where the holder of a lease builds what it publishes."""
    return work / f"{STAGING}{lease.epoch}.{lease.holder}"


def _epoch_of(folder: Path) -> int:
    epoch = folder.name.removeprefix(STAGING).partition(".")[0]
    return int(epoch) if epoch.isdecimal() else -1


def rename(source: Path | str, target: Path | str, source_folder: int | None, target_folder: int | None) -> None:
    """Rename, where a name may be one in an open folder."""
    os.rename(source, target, src_dir_fd=source_folder, dst_dir_fd=target_folder)


def revoke(folder: Path, move: Callable[[Path], None] = discard) -> None:
    """Make sure that nothing is ever published from a staging folder again; a plain file takes its place.

    ``move`` takes each entry away.
    """
    while not folder.is_file():
        with contextlib.suppress(FileNotFoundError):
            for entry in list(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    move(entry)
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
            continue  # its owner has written there once more
        with contextlib.suppress(FileExistsError), folder.open("x"):
            log.info("%s is revoked", folder)


def revoke_all(work: Path) -> None:
    """Revoke all staging folders in a work folder."""
    for folder in work.glob(f"{STAGING}*"):
        revoke(folder)
