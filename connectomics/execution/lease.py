"""Several processes on one run: each shows a heartbeat and takes leases on blocks and on what one alone may do.

A heartbeat is a file whose time is renewed every few seconds; a lease is a symbolic link to its holder's heartbeat.
Times are compared on the clock of the file system alone. A lease lost by mistake is harmless: whatever is done twice
gives the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from connectomics.core.files import discard, discard_temporaries, temporary_beside
from connectomics.core.process import is_dead, new_mark

log = logging.getLogger(__name__)
BEAT_S = 5.0
STALE_S = 60.0  # a heartbeat this old is that of a process that is no more; on the same machine it is known at once
FIRST_PAUSE_S = 0.02
LAST_PAUSE_S = 1.0
HEARTBEAT = ".worker"
CLOCK = "clock"  # touched to learn the time of the file system
LEASE = ".lease"
BREAKING = ".breaking"
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system says that knows no symbolic links


class Worker:
    """This process among those that work in one folder; a context manager.

    Parameters
    ----------
    folder
        Where heartbeats and leases are; made if absent.
    beat_s
        Between two signs of life.
    stale_s
        Age of a heartbeat from which on its process counts as dead.
    """

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self._folder = folder
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._mark = new_mark()
        self._heartbeat = folder / (self._mark + HEARTBEAT)
        self._held: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Worker:
        self._folder.mkdir(parents=True, exist_ok=True)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
        self._heartbeat.write_text(json.dumps(who))
        self._thread.start()
        _sweep(self._folder, (HEARTBEAT,))
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the disk may be gone; the leases go with the process then
            for name in list(self._held):
                self.release(name)
            self._heartbeat.unlink(missing_ok=True)
            _sweep(self._folder)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):  # whoever works meets the same error and tells it
                os.utime(self._heartbeat)

    def acquire(self, name: str) -> bool:
        """Take the lease ``name`` if nobody alive holds it; the lease of a dead process is taken over."""
        lease = self._path(name)
        for _ in range(2):
            if _claim(lease, self._heartbeat.name):
                self._held.add(name)
                return True
            holder = _holder(lease)
            if holder is not None and (holder == self._heartbeat.name or not self._is_stale(lease, holder)):
                return False
            if holder is not None:
                log.warning("taking over %s from %s, which is gone", name, holder.removesuffix(HEARTBEAT))
                self._break(lease, holder)
        return False

    def release(self, name: str) -> None:
        """Give a lease back; one that another took over meanwhile is left to it."""
        self._held.discard(name)
        lease = self._path(name)
        if _holder(lease) == self._heartbeat.name:
            lease.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether the lease is this worker's."""
        return name in self._held

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait for the lease ``name`` and hold it."""
        for pause in pauses():
            if self.acquire(name):
                break
            time.sleep(pause)
        try:
            yield
        finally:
            self.release(name)

    def others(self) -> list[str]:
        """Names of the heartbeats of other living workers."""
        found = living(self._folder, self._stale_s)
        return [name for name in found if name != self._heartbeat.name]

    def wait_until_free(self, prefix: str) -> None:
        """Wait while another living worker holds a lease whose name begins so."""
        for pause in pauses():
            if self.is_free(prefix):
                return
            time.sleep(pause)

    def is_free(self, prefix: str) -> bool:
        """Whether no other living worker holds a lease whose name begins so."""
        leases = [(lease, _holder(lease)) for lease in self._folder.glob(f"{prefix}*{LEASE}")]
        return all(h is None or h == self._heartbeat.name or self._is_stale(p, h) for p, h in leases)

    def _path(self, name: str) -> Path:
        return self._folder / (name + LEASE)

    def _is_stale(self, lease: Path, holder: str) -> bool:
        if is_dead(holder.removesuffix(HEARTBEAT)):
            return True
        heartbeat = self._folder / holder
        os.utime(self._heartbeat)
        now = self._heartbeat.stat().st_mtime
        try:
            return now - heartbeat.stat().st_mtime > self._stale_s
        except FileNotFoundError:  # it has ended, unless it has released the lease meanwhile
            return _holder(lease) == holder

    def _break(self, lease: Path, holder: str) -> None:
        """Take a stale lease away; one worker at a time does so, so that nobody loses a fresh one."""
        breaking = lease.with_name(lease.name + BREAKING)
        if not _claim(breaking, self._heartbeat.name):
            other = _holder(breaking)
            if other is not None and self._is_stale(breaking, other):
                breaking.unlink(missing_ok=True)  # it died in the middle; whoever looks next is free to break
            return
        try:
            if _holder(lease) == holder:
                lease.unlink(missing_ok=True)
        finally:
            breaking.unlink(missing_ok=True)


def pauses() -> Iterator[float]:
    """Seconds to sleep between looks at something that others do, growing, without end."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(LAST_PAUSE_S, 1.5 * pause)


def living(folder: Path, stale_s: float = STALE_S) -> list[str]:
    """Names of the heartbeats in ``folder`` whose processes are alive."""
    heartbeats = [path for path in folder.glob("*" + HEARTBEAT) if not is_dead(path.stem)]
    if not heartbeats:
        return []
    now, found = _now(folder), []
    for path in heartbeats:
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime <= stale_s:
                found.append(path.name)
    return sorted(found)


def _sweep(folder: Path, endings: tuple[str, ...] = (HEARTBEAT, LEASE, BREAKING)) -> None:
    """Remove what processes of this machine left that are dead for sure."""
    for ending in endings:
        for path in folder.glob("*" + ending):
            holder = path.name if ending == HEARTBEAT else _holder(path)
            if holder is not None and is_dead(holder.removesuffix(HEARTBEAT)):
                path.unlink(missing_ok=True)
    discard_temporaries(folder / CLOCK)


def tidy(folder: Path) -> bool:
    """Remove the heartbeats and leases of the dead, unless somebody is alive.

    Returns
    -------
    idle
        Whether nobody is.
    """
    if living(folder):
        return False
    for ending in (HEARTBEAT, LEASE, BREAKING):
        for path in folder.glob("*" + ending):
            path.unlink(missing_ok=True)
    discard_temporaries(folder / CLOCK)
    return True


def _now(folder: Path) -> float:
    """The time on the file system's clock; this machine's where the folder may not be written to."""
    probe = temporary_beside(folder / CLOCK)
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            discard(probe)


def _claim(lease: Path, holder: str) -> bool:
    try:
        lease.symlink_to(holder)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with lease.open("x") as stream:
                stream.write(holder)
        except FileExistsError:
            return False
    return True


def _holder(lease: Path) -> str | None:
    """Who holds a lease, or None where there is none."""
    try:
        return str(lease.readlink()) if lease.is_symlink() else lease.read_text()
    except FileNotFoundError:
        return None
