"""Two processes measure a disk that they share: how late names are seen, and whether each name has one maker.

They speak through small files alone, so they may be on two machines. ``disk_check`` brings them together.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.commands.disk.disk_sight import (
    FIRST,
    LISTED,
    MESSAGES,
    NAMED,
    POLL_S,
    SECOND,
    WATCHED,
    Post,
    Sight,
    Tempo,
    sight_of,
    watch,
)

RACED, LOCK = "raced", "lock"
START, DONE = "start", "done"
STEP_S = 0.004  # between two names that are raced for
LEAD_S = 0.1  # before they are
HELD, NOT_KEPT_OUT = "held", "two processes hold it at once"
WAYS = ("link", "open")


@dataclass(frozen=True, slots=True)
class Creation:
    """How names were made that both processes raced for, in one way.

    ``won`` are the names of the first and of the second process, ``twice`` those that both made, ``never`` those that
    neither did, and ``refused`` is why this way does not work here; empty if it does.
    """

    won: tuple[int, int]
    twice: int = 0
    never: int = 0
    refused: str = ""

    @property
    def exclusive(self) -> bool:
        """Whether each name had exactly one maker."""
        return not (self.refused or self.twice or self.never)

    @property
    def contested(self) -> bool:
        """Whether the two were close enough for each to win some."""
        return min(self.won) > 0


@dataclass(frozen=True, slots=True)
class Pair:
    """What two processes found out together.

    Parameters
    ----------
    sights
        Of the first process and of the second.
    creations
        By way: ``link`` (a hard link to a file that is ready) and ``open`` (exclusive opening).
    lock
        Why ``flock`` does not keep the other process out; empty if it does.
    """

    sights: tuple[Sight, Sight]
    creations: Mapping[str, Creation]
    lock: str

    @property
    def delay_s(self) -> float:
        """The longest delay, either way."""
        return max(sight.delay_s for sight in self.sights)


def furnish(place: Path) -> None:
    """Make the folders in which the two processes meet; the last of them is that of the messages."""
    for role in (FIRST, SECOND):
        for kind in (NAMED, LISTED):
            (place / role / kind).mkdir(parents=True)
    for name in (RACED, MESSAGES):
        (place / name).mkdir()


def measure(place: Path, role: str, post: Post, *, tempo: Tempo, slow: Callable[[], None]) -> Pair:
    """Measure together with the other process, which calls this with the other role.

    Parameters
    ----------
    place
        A folder that ``furnish`` has prepared; what is made in it stays there.
    role
        ``FIRST`` or ``SECOND``.
    slow
        Called once if it takes long.

    Raises
    ------
    OutputError
        If the other process is gone or silent.
    """
    own = watch(place, role, post, tempo=tempo, slow=slow)
    other = sight_of(post.wait(WATCHED))
    descriptor = os.open(place / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        if role == FIRST:
            lock, spread = _lock(descriptor), 0.0
            start = time.monotonic() + min(tempo.longest_s, 1.5 * max(own.delay_s, other.delay_s)) + LEAD_S
            post.say(START, at=start, lock=lock)
        else:
            told, got = post.wait(START), _lock(descriptor)
            lock = told["lock"] or {"": NOT_KEPT_OUT, HELD: ""}.get(got, got)
            least, most = own.ahead_s if all(map(math.isfinite, own.ahead_s)) else (0.0, 0.0)
            start, spread = told["at"] + (least + most) / 2, max(0.0, most - least) / 2 + POLL_S
        wins = _race(place / RACED, role, tempo.names, start=start, spread=spread)
        post.say(DONE, wins=wins, lock=lock)
        done = post.wait(DONE)
    finally:
        os.close(descriptor)
    if role == FIRST:
        return Pair((own, other), _creations(wins, done["wins"], tempo.names), done["lock"])
    return Pair((other, own), _creations(done["wins"], wins, tempo.names), lock)


def _race(folder: Path, role: str, names: int, *, start: float, spread: float) -> dict[str, Any]:
    """Try to make each name in each way at an agreed time; the numbers of those made, and why a way is refused.

    The times of one process run from ``spread`` s before to ``spread`` s after those of the other, so that they meet
    at some names although clocks are compared only so well.
    """
    wins: dict[str, Any] = {}
    for turn, way in enumerate(WAYS):
        won, refused = list[int](), ""
        for number in range(names):
            shift = spread * (2 * number / max(1, names - 1) - 1)
            _sleep_until(start + (turn * names + number) * STEP_S + shift)
            path = folder / f"{way}.{number}"
            try:
                if _linked(role, path) if way == "link" else _opened(path, role):
                    won.append(number)
            except OSError as error:
                refused = _reason(error)
                break
        wins[way] = {"won": won, "refused": refused}
    return wins


def _linked(role: str, path: Path) -> bool:
    try:
        path.symlink_to(role)
    except FileExistsError:
        return str(path.readlink()) == role  # made by this process, and the reply was lost
    return True


def _opened(path: Path, role: str) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, role.encode())
    finally:
        os.close(descriptor)
    return True


def _creations(first: Mapping[str, Any], second: Mapping[str, Any], names: int) -> dict[str, Creation]:
    """What both processes won, by way."""
    found = {}
    for way in WAYS:
        one, two = set(first[way]["won"]), set(second[way]["won"])
        refused = first[way]["refused"] or second[way]["refused"]
        never = 0 if refused else names - len(one | two)
        found[way] = Creation((len(one), len(two)), len(one & two), never, refused=refused)
    return found


def _lock(descriptor: int) -> str:
    """Lock a file; empty where it is locked now, ``HELD`` where another holds it, else why it cannot be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HELD
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _sleep_until(at: float) -> None:
    """Wait on the monotonic clock, the last moment without sleeping."""
    while (left := at - time.monotonic()) > 0:
        if left > 2 * POLL_S:
            time.sleep(left - 2 * POLL_S)
