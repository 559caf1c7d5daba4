"""This process among those that work in one folder: a session that a thread renews, and the leases it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.errors import ConnectomicsError, StorageError
from connectomics.core.files import make_folder
from connectomics.core.process import is_dead
from connectomics.execution.coordination import CoordinationStore, DiskStore, Version
from connectomics.execution.lease import (
    DONE,
    FAILED,
    FREE,
    HELD,
    LIMIT_S,
    RENEWALS,
    Lease,
    LeaseLostError,
    Presence,
    Session,
    Stretch,
    Witness,
    following,
    lease_of,
    packed,
    pauses,
)

log = logging.getLogger(__name__)
ATTEMPT = "attempt"  # the record that counts the attempts at a run, each begun when nobody of the last one is here
MEMBER = "member-"  # begins the name of the record that a process takes part in an attempt


@dataclass(frozen=True, slots=True)
class Time:
    """What time it is, in seconds that only grow, and how to wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(slots=True)
class _Held:
    """A lease of this process, and its record as it was last seen."""

    lease: Lease
    seen: Version


class Worker:
    """A process among others; a context manager.

    Whether what it holds is still its own shows when it tries to change the record: ``confirm`` does so. Other threads
    of the process may call everything here.

    Parameters
    ----------
    store
        Where all agree.
    limit_s
        How long a session may stand still before others take over.
    clock
        Of this process.
    """

    def __init__(self, store: CoordinationStore, *, limit_s: float = LIMIT_S, clock: Time | None = None) -> None:
        self.store = store
        self.limit_s = limit_s
        self._clock = clock or Time()
        self._witness = Witness(store, limit_s, self._clock.now)
        self._lock = threading.RLock()
        self._held: dict[str, _Held] = {}
        self._session: Session | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="session", daemon=True)
        self.renewals: list[Callable[[], object]] = [self.renew]
        self.attempt = 0
        self._begun_by = ""  # the session that began the attempt
        self._first: Presence | None = None

    @classmethod
    def of(cls, folder: Path, *, limit_s: float = LIMIT_S) -> Worker:
        """One among those that work in a folder, which is made if absent."""
        make_folder(folder)
        return cls(DiskStore(folder), limit_s=limit_s)

    def __enter__(self) -> Worker:
        self.join()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        self.leave()

    def join(self) -> None:
        """Become one of those who are here; whoever finds nobody of the last attempt begins another."""
        with self._lock:
            first = self._session is None
            self._session = Session(self.store, self.limit_s)
            self._first = self._first or self._session.told
            self.attempt = self._take_part(first=first)

    def give_back(self) -> None:
        """Give back what is held, so that a kill from here on counts against no block."""
        with contextlib.suppress(ConnectomicsError):  # the disk may be gone; all of it goes with the process then
            for name in list(self._held):
                self.release(name)

    def leave(self) -> None:
        """Give back what is held, and end."""
        self.give_back()
        with contextlib.suppress(ConnectomicsError):
            if self._session is not None:
                self._session.leave()

    def renew(self) -> bool:
        """Show that this process is alive; False where it counts as gone."""
        return self._session is not None and self._session.renew()

    def _renew_often(self) -> None:
        while not self._ended.wait(self.limit_s / RENEWALS):
            for renew in self.renewals:
                with contextlib.suppress(ConnectomicsError):  # whoever works meets the same error and tells it
                    renew()

    @property
    def mark(self) -> str:
        """Name of the session."""
        assert self._session is not None
        return self._session.mark

    @property
    def signature(self) -> dict[str, object]:
        """What this process signs its work with: the name of its first session, who it is, and in which attempt."""
        first = self._first
        assert first is not None
        who = {"worker": first.mark, "host": first.host, "pid": first.pid, "since": first.since}
        return who | {"attempt": self._begun_by}

    def others(self) -> list[str]:
        """Sessions of others that have not ended, as far as is known now."""
        return [mark for mark in self._witness.present() if mark != self.mark]

    def acquire(self, name: str, blocks: Stretch | None = None, *, again: bool = False) -> bool:
        """Take a lease if nobody holds it who may be alive.

        What has failed in this attempt is not to be had, nor what is done in it, but ``again``. A session that was
        revoked is replaced by a new one first. ``blocks`` are those of a lease that nobody had before.
        """
        with self._lock:
            if self._session is None or self._session.lost:
                log.warning("this process stood still for too long and counts as gone; it joins again")
                self._held.clear()
                self.join()
            if name in self._held:
                return False
            seen = self.store.read(name)
            lease = Lease(self.mark, note=str(self.attempt), blocks=blocks)
            if seen is None:
                made = self.store.create(name, packed(lease))
            else:
                before = lease_of(seen)
                if before is not None and not (self._is_free(before) or (again and before.state == DONE)):
                    return False
                if before is None and not self._witness.watch.is_stale(name, seen.number, self.limit_s):
                    return False  # it has just been made, or its maker died as it made it
                lease = following(lease, before, seen)
                made = self.store.replace(name, seen, packed(lease))
            if made is not None:
                self._held[name] = _Held(lease, made)
            return made is not None

    def _is_free(self, lease: Lease) -> bool:
        if lease.state in (FAILED, DONE):
            return lease.note.partition(" ")[0] != str(self.attempt)
        return lease.state == FREE or self._witness.is_gone(lease.holder)

    def holds(self, name: str) -> bool:
        """Whether this process took the lease and has not found it lost."""
        return name in self._held

    def held(self, name: str) -> Lease:
        """What is held; a LeaseLostError where it is not."""
        with self._lock:
            if name not in self._held:
                raise LeaseLostError(name)
            return self._held[name].lease

    def confirm(self, name: str) -> None:
        """Make sure that a lease is still held at this moment; a LeaseLostError where it is not."""
        with self._lock:
            if not self._change(name, HELD):
                raise LeaseLostError(name)

    def release(self, name: str) -> bool:
        """Give a lease back; one that another took over is left to it, and False is returned."""
        with self._lock:
            if name not in self._held:
                return False
            try:
                return self._change(name, FREE)
            finally:
                self._held.pop(name, None)

    def fail(self, name: str, why: str) -> None:
        """Give a lease back for the last time in this attempt, since what it is for fails."""
        self._end(name, FAILED, f"{self.attempt} {why}")

    def done(self, name: str) -> bool:
        """Give a lease back for the last time in this attempt, as what it is for is done; False where it was lost."""
        return self._end(name, DONE, str(self.attempt))

    def _end(self, name: str, state: str, note: str) -> bool:
        with self._lock:
            ended = self._change(name, state, note)
            self._held.pop(name, None)
            return ended

    def begin(self, name: str, number: int, in_hand: Iterable[int]) -> bool:
        """Say that a block is begun while others are in hand; False where it is another's by now, or all are."""
        with self._lock:
            if self._session is None or self._session.lost:
                return False
            return self._change(name, HELD, begun=(*in_hand, number))

    def cut(self, name: str, at: int) -> Stretch | None:
        """Take from a lease's holder the blocks from a number on; which these were, None where that was too late."""
        seen = self.store.read(name)
        lease = None if seen is None else lease_of(seen)
        if seen is None or lease is None or lease.state != HELD or lease.blocks is None:
            return None
        if not lease.blocks.next <= at < lease.blocks.stop:
            return None
        left = dataclasses.replace(lease, note=f"{self.attempt} cut by {self.mark}", counter=lease.counter + 1)
        left = dataclasses.replace(left, blocks=dataclasses.replace(lease.blocks, stop=at))
        return None if self.store.replace(name, seen, packed(left)) is None else lease.blocks

    def look(self, name: str) -> Lease | None:
        """What the record of a lease says, None where there is none or it is not whole."""
        seen = self.store.read(name)
        return None if seen is None else lease_of(seen)

    def count(self, name: str, value: int) -> int:
        """How often this was called in this attempt, by any process, since ``value`` is what it is."""
        while True:
            seen = self.store.read(name)
            before = None if seen is None else lease_of(seen)
            note = str(self.attempt)
            same = before is not None and (before.epoch, before.note) == (value, note)
            counted = Lease(self.mark, value, before.counter + 1 if before is not None and same else 1, note=note)
            made = self.store.create(name, packed(counted)) if seen is None else None
            if seen is not None:
                made = self.store.replace(name, seen, packed(counted))
            if made is not None:
                return counted.counter

    def failure(self, name: str) -> str | None:
        """Why what a lease is for failed in this attempt, or None where it did not."""
        lease = self.look(name)
        if lease is None or lease.state != FAILED or self._is_free(lease):
            return None
        return lease.note.partition(" ")[2]

    def _change(
        self,
        name: str,
        state: str,
        note: str | None = None,
        *,
        begun: tuple[int, ...] | None = None,
    ) -> bool:
        """Write a held lease anew; where it is not this process's any more, it is held no longer.

        Others may have taken the upper part of its blocks meanwhile: False where the last of ``begun`` is among them.
        """
        while (held := self._held.get(name)) is not None:
            lease = dataclasses.replace(held.lease, counter=held.lease.counter + 1, state=state)
            if lease.blocks is not None:
                kept = lease.blocks.holding(begun if state == HELD else ())
                if kept is None:
                    return False
                lease = dataclasses.replace(lease, blocks=kept)
            if note is not None:
                lease = dataclasses.replace(lease, note=note)
            seen = self.store.replace(name, held.seen, packed(lease))
            if seen is not None:
                self._held[name] = _Held(lease, seen)
                return True
            now = self.store.read(name)
            left = None if now is None else lease_of(now)
            if now is None or left is None or (left.holder, left.epoch) != (held.lease.holder, held.lease.epoch):
                del self._held[name]
            else:
                self._held[name] = _Held(left, now)
        return False

    @contextlib.contextmanager
    def alone(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Wait for a lease and hold it; a LeaseLostError where it was lost meanwhile, whatever else went wrong.

        ``meanwhile`` is called again and again while another has it.
        """
        for pause in pauses(self.limit_s):
            if self.acquire(name):
                break
            meanwhile()
            self._clock.sleep(pause)
        try:
            yield
        except LeaseLostError:
            raise
        except Exception as error:
            self._still(name, error)
            raise
        else:
            if not self.release(name):
                raise LeaseLostError(name)
        finally:
            with contextlib.suppress(ConnectomicsError):
                self.release(name)

    def _still(self, name: str, error: Exception) -> None:
        """Raise a LeaseLostError where a lease is lost for sure."""
        try:
            self.confirm(name)
        except ConnectomicsError:
            return
        except LeaseLostError as lost:
            raise lost from error

    def pauses(self) -> Iterator[float]:
        """Seconds to sleep between looks at what others do."""
        return pauses(self.limit_s)

    def now(self) -> float:
        """What time it is, in seconds that only grow."""
        return self._clock.now()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._clock.sleep(seconds)

    def witness_of(self, folder: Path) -> Witness:
        """Who looks at those that work in another folder, with this process's patience."""
        return Witness(DiskStore(folder), self.limit_s, self._clock.now)

    def _take_part(self, *, first: bool) -> int:
        """Take part in the attempt of those who are here, or begin another; its number.

        One who was there before and counted as gone begins none. Whoever takes part says so first and then looks
        whether it still is the last attempt: others begin theirs by replacing the record that they saw.
        """
        while True:
            seen = self.store.read(ATTEMPT)
            last = None if seen is None else lease_of(seen)
            number = -1 if last is None else last.epoch
            if last is None or (first and not self._has_members(number)):
                self._sign_in(number + 1)
                begun = packed(Lease(self.mark, number + 1))
                made = self.store.create(ATTEMPT, begun) if seen is None else self.store.replace(ATTEMPT, seen, begun)
                if made is not None:
                    self._begun_by = self.mark
                    return number + 1
                continue
            self._sign_in(number)
            now = self.store.read(ATTEMPT)
            if now is not None and seen is not None and now.number == seen.number:
                self._begun_by = last.holder
                return number

    def _sign_in(self, attempt: int) -> None:
        self.store.create(f"{MEMBER}{attempt}-{self.mark}", self.mark.encode())

    def _has_members(self, attempt: int) -> bool:
        """Whether a process takes part in an attempt, or is about to, that may be alive."""
        prefix = f"{MEMBER}{attempt}-"
        marks = (name.removeprefix(prefix) for name in self.store.list(prefix))
        return any(mark != self.mark and not (is_dead(mark) or self._witness.is_gone(mark)) for mark in marks)


def is_deserted(folder: Path) -> bool:
    """Whether nobody who may be alive works in a folder, as far as is known without waiting."""
    try:
        return not folder.is_dir() or not any(Witness(DiskStore(folder), LIMIT_S).present())
    except StorageError:
        if folder.is_dir():
            raise
        return True  # another process has just found it deserted, and removed it
