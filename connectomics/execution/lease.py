"""Who is here, and who may do what: the run protocol in the verbs of a coordination store, without threads or files.

A *session* is one process's presence; it is renewed again and again. A *lease* is held by a session and has an epoch,
the number of its holder. It is taken over when its holder's session has ended or stood still for too long; that session
is *revoked* first, so that whoever wakes up in it finds out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from connectomics.core.process import is_alive, is_dead, new_mark
from connectomics.execution.coordination import CoordinationStore, Version

log = logging.getLogger(__name__)
LIMIT_S = 180.0  # a session that an observer sees stand still for so long is that of a process that is no more
RENEWALS = 6  # of a session in its limit
LOOKS = 4  # of an observer at a session before it may be revoked
SESSION = "session-"
HERE, LEFT, REVOKED = "here", "left", "revoked"
HELD, FREE, FAILED, DONE = "held", "free", "failed", "done"
FIRST_PAUSE_S = 0.02
LAST_PAUSE_S = 1.0


class LeaseLostError(Exception):
    """What was held is held by another now: stop, read again what is true, and go on from there."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What a session's record says; times in seconds. ``by`` is who revoked it."""

    mark: str
    host: str
    pid: int
    since: int
    limit_s: float
    counter: int = 0
    state: str = HERE
    by: str = ""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive blocks that a lease is for, by their numbers; the first is in the name of the lease.

    Parameters
    ----------
    stop
        Behind the last one. It only ever goes down: whoever has nothing to do takes the upper part of another's.
    next
        No block from here on was begun by the holder.
    begun
        Blocks that are in hand.
    deaths
        Of blocks: how many processes ended that had them in hand.
    """

    stop: int
    next: int = 0
    begun: tuple[int, ...] = ()
    deaths: Mapping[int, int] = field(default_factory=dict)

    def holding(self, begun: tuple[int, ...] | None) -> Stretch | None:
        """The same with other blocks in hand (None: those it has), None where the last of them is behind it."""
        if begun is None:
            return self
        following = max(self.next, begun[-1] + 1) if begun else self.next
        return None if following > self.stop else replace(self, begun=begun, next=following)

    def after_death(self) -> Stretch:
        """What is left when the holder ended without giving it back."""
        numbers = sorted({*self.deaths, *self.begun})
        deaths = {number: self.deaths.get(number, 0) + (number in self.begun) for number in numbers}
        return replace(self, begun=(), next=0, deaths=deaths)


@dataclass(frozen=True, slots=True)
class Lease:
    """What a lease's record says.

    Parameters
    ----------
    holder
        Mark of the session that wrote it.
    epoch
        Number of the holder: it grows whenever the lease changes hands.
    counter
        Of the changes in an epoch.
    state
        Whether it is held, free, or what it is for has failed or is done.
    note
        In which attempt that was so, and why.
    blocks
        What a lease on blocks is for.
    """

    holder: str
    epoch: int = 0
    counter: int = 0
    state: str = HELD
    note: str = ""
    blocks: Stretch | None = None


def packed(record: Presence | Lease) -> bytes:
    """A record's content."""
    return json.dumps(asdict(record), sort_keys=True).encode()


def unpacked(content: bytes) -> dict[str, Any]:
    """The fields in a record's content; none where it is not whole."""
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def presence_of(version: Version) -> Presence | None:
    """The session that a record tells of, None where it is not whole."""
    try:
        return Presence(**unpacked(version.content))
    except TypeError:
        return None


def lease_of(version: Version) -> Lease | None:
    """The lease that a record tells of, None where it is not whole."""
    try:
        lease = Lease(**unpacked(version.content))
        return lease if lease.blocks is None else replace(lease, blocks=_stretch(lease.blocks))
    except (TypeError, ValueError, AttributeError):
        return None


def _stretch(fields: Any) -> Stretch:
    deaths = {int(number): int(count) for number, count in fields.pop("deaths").items()}
    return Stretch(**fields | {"begun": tuple(fields["begun"])}, deaths=deaths)


def following(lease: Lease, before: Lease | None, seen: Version) -> Lease:
    """The lease of the next holder, who inherits the blocks of those before, and their deaths."""
    if before is None:
        return replace(lease, epoch=seen.number + 1)
    blocks = before.blocks
    if blocks is not None:
        blocks = blocks.after_death() if before.state == HELD else replace(blocks, begun=(), next=0)
    return replace(lease, epoch=before.epoch + 1, blocks=blocks)


@dataclass(slots=True)
class _Look:
    """What an observer saw of a record: since when it has stood as it is."""

    number: int
    first: float
    last: float
    count: int = 1
    changed: bool = False


class Watch:
    """An observer of records, which judges by change and by its own clock alone.

    Parameters
    ----------
    clock
        Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: dict[str, _Look] = {}

    def is_stale(self, name: str, number: int, limit_s: float) -> bool:
        """Whether a record has stood at this version for longer than the limit, as seen in enough looks.

        A gap of more than half the limit between two looks may be this observer's own sleep: it starts again.
        """
        now, look = self._clock(), self._looks.get(name)
        if look is None or look.number != number or now - look.last > limit_s / 2:
            changed = look is not None and (look.changed or look.number != number)
            self._looks[name] = _Look(number, now, now, changed=changed)
            return False
        look.last = now
        look.count += 1
        return look.count >= LOOKS and now - look.first > limit_s

    def has_changed(self, name: str) -> bool:
        """Whether a record was seen to change."""
        look = self._looks.get(name)
        return look is not None and look.changed


class Session:
    """This process among those that share a store.

    Parameters
    ----------
    store
        Where all agree.
    limit_s
        How long it may stand still before others revoke it; it ought to be renewed ``RENEWALS`` times as often.
    mark
        Of this session alone.
    """

    def __init__(self, store: CoordinationStore, limit_s: float, mark: str = "") -> None:
        self._store = store
        self._lock = threading.Lock()
        self._lost = False
        mark = mark or new_mark()
        self._told = Presence(mark, host=socket.gethostname(), pid=os.getpid(), since=int(time.time()), limit_s=limit_s)
        seen = store.create(SESSION + mark, packed(self._told))
        if seen is None:
            raise LeaseLostError(mark)
        self._seen = seen

    @property
    def mark(self) -> str:
        """Its name."""
        return self._told.mark

    @property
    def told(self) -> Presence:
        """What its record says."""
        return self._told

    @property
    def lost(self) -> bool:
        """Whether it is known to have been revoked."""
        return self._lost

    def renew(self) -> bool:
        """Show that it is alive; False where it has been revoked meanwhile."""
        return self._change(HERE)

    def leave(self) -> bool:
        """End it."""
        return self._change(LEFT)

    def _change(self, state: str) -> bool:
        with self._lock:
            if self._lost:
                return False
            told = replace(self._told, counter=self._told.counter + 1, state=state)
            seen = self._store.replace(SESSION + self.mark, self._seen, packed(told))
            if seen is None or state == LEFT:
                self._lost = True
            if seen is None:
                return False
            self._told, self._seen = told, seen
            return True


class Witness:
    """Judges the sessions in a store; what it calls gone is revoked, and stays gone."""

    def __init__(self, store: CoordinationStore, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._limit_s = limit_s
        self._clock = clock
        self._gone: set[str] = set()
        self._looked: dict[str, float] = {}
        self.watch = Watch(clock)

    def is_gone(self, mark: str) -> bool:
        """Whether a session has ended; one that stood still for too long is ended here and now."""
        if mark in self._gone:
            return True
        now = self._clock()
        if now - self._looked.get(mark, -math.inf) < min(FIRST_PAUSE_S, self._limit_s / (8 * LOOKS)):
            return False  # many leases may have one holder
        self._looked[mark] = now
        name = SESSION + mark
        seen = self._store.read(name)
        told = None if seen is None else presence_of(seen)
        if told is not None and told.state in (LEFT, REVOKED):
            self._gone.add(mark)
            return True
        number, limit = (-1 if seen is None else seen.number), self._limit_s if told is None else told.limit_s
        if not is_dead(mark) and not self.watch.is_stale(name, number, limit):
            return False
        told = told or Presence(mark, host="", pid=0, since=0, limit_s=limit)
        revoked = packed(replace(told, state=REVOKED, by=new_mark()))
        done = self._store.create(name, revoked) if seen is None else self._store.replace(name, seen, revoked)
        if done is None:
            return False
        log.warning("process %s is gone; taking over what it had in hand", mark)
        self._gone.add(mark)
        return True

    def sessions(self) -> list[str]:
        """Marks of all sessions that are not known to have ended."""
        marks = (name.removeprefix(SESSION) for name in self._store.list(SESSION))
        return [mark for mark in marks if mark not in self._gone]

    def present(self) -> Iterator[str]:
        """Marks of the sessions that have not ended, as far as is known now."""
        return (mark for mark in self.sessions() if not self.is_gone(mark))

    def presence(self, mark: str) -> Presence | None:
        """What a session says of itself."""
        seen = self._store.read(SESSION + mark)
        return None if seen is None else presence_of(seen)

    def is_surely_alive(self, mark: str) -> bool:
        """Whether a session's process is on this machine, or was seen to do something."""
        return mark not in self._gone and (is_alive(mark) or self.watch.has_changed(SESSION + mark))


def pauses(limit_s: float = LIMIT_S, most_s: float = LAST_PAUSE_S) -> Iterator[float]:
    """Seconds to sleep between looks at something that others do, growing to ``most_s``, without end."""
    pause, most = FIRST_PAUSE_S, min(most_s, limit_s / (2 * LOOKS))
    while True:
        yield min(pause, most)
        pause = min(most, 1.5 * pause)
