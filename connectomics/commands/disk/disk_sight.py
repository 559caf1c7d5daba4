"""What one of two processes sees of the other on a disk that they share: messages, and how late files are seen.

``disk_pair`` measures with it. All is done by names of files, so the two may be on two machines.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from connectomics.core.errors import OutputError

FIRST, SECOND = "first", "second"
NAMED, LISTED, MESSAGES = "named", "listed", "messages"
WATCHED = "watched"
POLL_S = 0.001
LISTING_S = 0.01
LISTING_SHARE = 5  # a folder is listed again after this many times the time that listing it took
HEARING_S = 0.02  # between two looks for a message
FIRST_GAP_S, LAST_GAP_S = 0.05, 0.5  # at most, between two files that are made to be seen
ENOUGH = 3  # names that were looked for in vain and came
SLOW_S = 10.0  # measuring lasts longer than this only where names are seen late


@dataclass(frozen=True, slots=True)
class Tempo:
    """How long is measured.

    Parameters
    ----------
    least_s
        The shortest time in which each watches what the other makes.
    longest_s
        Without anything new, after which what the other makes counts as never seen.
    wait_s
        For a word of the other process.
    names
        That are raced for, each way.
    """

    least_s: float = 1.0
    longest_s: float = 300.0
    wait_s: float = 600.0
    names: int = 50


@dataclass(frozen=True, slots=True)
class Sight:
    """What one process saw of the other's files.

    Parameters
    ----------
    by_name_s
        The longest time from a file's making until its name, which was looked for before, was found; ``inf`` where it
        never was.
    by_listing_s
        The same until it stood in the folder's listing.
    ahead_s
        Between these two this process's monotonic clock is ahead of the other's.
    """

    by_name_s: float
    by_listing_s: float
    ahead_s: tuple[float, float]

    @property
    def delay_s(self) -> float:
        """The longer of the two delays."""
        return max(self.by_name_s, self.by_listing_s)


class Post:
    """What two processes tell each other: one file a message, under a name that is used once.

    Parameters
    ----------
    place
        Where they meet.
    role
        This process's.
    ended
        Says why the other process failed; empty while it did not, as far as is known.
    wait_s
        For a message.
    """

    def __init__(self, place: Path, role: str, ended: Callable[[], str], wait_s: float) -> None:
        self._folder = place / MESSAGES
        self._role = role
        self._ended = ended
        self._wait_s = wait_s

    def say(self, step: str, **content: object) -> None:
        """Tell the other something."""
        appear(self._folder / f"{self._role}.{step}", json.dumps(content), self._folder / f".{self._role}")

    def heard(self, step: str) -> dict[str, Any] | None:
        """What the other has told, or None so far.

        Raises
        ------
        OutputError
            If the other process is gone.
        """
        ended = self._ended()  # before looking, for it may say something and end
        path = self._folder / f"{other_of(self._role)}.{step}"
        text = text_in(path)
        if text:
            content: dict[str, Any] = json.loads(text)
            return content
        if not ended:
            try:
                list(self._folder.iterdir())  # some disks look at names again when a folder is listed
            except FileNotFoundError:
                ended = f"{self._folder.parent} was removed"
        if ended:
            raise OutputError(f"the other process ended before the disk was measured: {ended}; begin again")
        return None

    def wait(self, step: str) -> dict[str, Any]:
        """Wait for what the other tells.

        Raises
        ------
        OutputError
            If it is gone, or says nothing for too long.
        """
        until = time.monotonic() + self._wait_s
        while (content := self.heard(step)) is None:
            if time.monotonic() > until:
                raise self.silent()
            time.sleep(HEARING_S)
        return content

    def silent(self) -> OutputError:
        """The error that nothing was heard for too long."""
        return OutputError(
            f"nothing was heard of the other process for {self._wait_s:g} s in {self._folder.parent}; begin again, and "
            "check that both name the same folder"
        )


def watch(place: Path, role: str, post: Post, *, tempo: Tempo, slow: Callable[[], None]) -> Sight:
    """Make files for the other process to see, and see what it makes, until both know the delay; tell what was seen.

    Each looks for the first name that it has not seen yet, and the other makes that name shortly after it was first
    looked for in vain. So whatever a disk remembers of absent names is met in full. Clocks need not agree: each file
    says when it was made by its maker's clock, and how far the two clocks are apart follows from the looks in vain.
    """
    stream = _Stream(place / role)
    by_name, by_listing = _ByName(place / other_of(role) / NAMED), _ByListing(place / other_of(role) / LISTED)
    began = hear_next = time.monotonic()
    own: Sight | None = None
    told_s, is_slow = math.inf, False
    while True:
        now = time.monotonic()
        stream.make(now - began)
        by_name.look()
        by_listing.look()
        stood = max(by_name.news.stood_still(), by_listing.news.stood_still())
        if own is None and (stood > tempo.longest_s or _is_enough(now - began, stood, by_name, tempo)):
            own = _seen(by_name, by_listing, tempo)
            post.say(WATCHED, **asdict(own))
            told_s = now
        if now >= hear_next:
            if post.heard(WATCHED) is not None and own is not None:
                return own
            if now - told_s > tempo.wait_s:
                raise post.silent()
            hear_next = now + HEARING_S
            if now - began > SLOW_S and not is_slow:
                is_slow = True
                slow()
        time.sleep(POLL_S)


def _is_enough(elapsed_s: float, stood_s: float, by_name: _ByName, tempo: Tempo) -> bool:
    """Whether names were awaited, and the longest time without anything new was met twice."""
    return by_name.awaited >= ENOUGH and elapsed_s >= max(tempo.least_s, 2.2 * stood_s)


class _Stream:
    """The files that this process makes for the other to see: name n says when it was made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next_s = 0.0
        self._number = 0

    def make(self, elapsed_s: float) -> None:
        """Make the next one if it is time."""
        if elapsed_s < self._next_s:
            return
        for kind in (NAMED, LISTED):
            appear(_numbered(self._folder / kind, self._number), repr(time.monotonic()), self._folder / "ready")
        self._number += 1
        self._next_s = elapsed_s + random.uniform(0.1, 1.0) * min(LAST_GAP_S, FIRST_GAP_S + elapsed_s / 50)


@dataclass(slots=True)
class _News:
    """When something new was seen last, and the longest time without."""

    last: float
    longest: float = 0.0

    def come(self, now: float) -> None:
        """Something new was seen."""
        self.longest = max(self.longest, now - self.last)
        self.last = now

    def stood_still(self) -> float:
        """Seconds; the time that goes on counts, too."""
        return max(self.longest, time.monotonic() - self.last)


class _ByName:
    """Looks for one name after the other, each until it is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._missed: float | None = None  # when the name was first looked for, in vain
        self.news = _News(time.monotonic())
        self.awaited = 0
        self.latest = -math.inf  # seen less made, on two clocks
        self.ahead = (-math.inf, math.inf)

    def look(self) -> None:
        """See all that is to be seen."""
        while True:
            began = time.monotonic()
            made = _made(_numbered(self._folder, self._number))
            seen = time.monotonic()
            if made is None:
                self._missed = began if self._missed is None else self._missed
                return
            least, most = self.ahead
            if self._missed is not None:
                self.awaited += 1
                self.latest = max(self.latest, seen - made)
                least = max(least, self._missed - made)
            self.ahead = (least, min(most, seen - made))
            self.news.come(seen)
            self._number, self._missed = self._number + 1, None


class _ByListing:
    """Lists the folder again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: int | None = None
        self._next_s = 0.0
        self.news = _News(time.monotonic())
        self.latest = -math.inf  # seen less made, on two clocks

    def look(self) -> None:
        """List the folder if it is time."""
        began = time.monotonic()
        if began < self._next_s:
            return
        highest = max((int(path.suffix[1:]) for path in self._folder.iterdir()), default=-1)
        seen = time.monotonic()
        self._next_s = seen + max(LISTING_S, LISTING_SHARE * (seen - began))
        if self._known is None or highest > self._known:
            made = None if self._known is None else _made(_numbered(self._folder, self._known + 1))
            if made is not None:
                self.latest = max(self.latest, seen - made)
            self.news.come(seen)
            self._known = highest


def _seen(by_name: _ByName, by_listing: _ByListing, tempo: Tempo) -> Sight:
    """What was seen in all; what has stood still for too long counts as never seen."""
    least = by_name.ahead[0]

    def delay(news: _News, latest: float) -> float:
        stood = news.stood_still() > tempo.longest_s or not math.isfinite(latest - least)
        return math.inf if stood else max(0.0, latest - least)

    return Sight(delay(by_name.news, by_name.latest), delay(by_listing.news, by_listing.latest), by_name.ahead)


def sight_of(told: Mapping[str, Any]) -> Sight:
    """Return what the other process has told of its sight."""
    least, most = told["ahead_s"]
    return Sight(told["by_name_s"], told["by_listing_s"], (least, most))


def other_of(role: str) -> str:
    """Return the role of the other process."""
    return SECOND if role == FIRST else FIRST


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"version.{number}"


def _made(path: Path) -> float | None:
    """When a file was made, by its maker's clock; None where it is not seen."""
    text = text_in(path)
    return float(text) if text else None


def appear(path: Path, text: str, ready: Path) -> None:
    """Make a file that is whole as soon as its name is there."""
    ready.write_text(text)
    ready.rename(path)


def text_in(path: Path) -> str:
    """The content of a file; empty where it is not seen."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
