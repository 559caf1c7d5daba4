"""Brings two processes together that measure the disk of a folder; ``connectomics doctor FOLDER`` calls ``check_disk``.

Everything they make lies in one hidden folder, which is removed at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import connectomics
from connectomics.commands.disk.disk_facts import DiskFacts, facts_of
from connectomics.commands.disk.disk_pair import Pair, furnish, measure
from connectomics.commands.disk.disk_sight import FIRST, HEARING_S, SECOND, Post, Tempo
from connectomics.core.errors import ConfigError, ConnectomicsError, OutputError, StorageError
from connectomics.core.files import TEMPORARY, discard, discard_temporaries, temporary_beside
from connectomics.core.process import host_mark

ALONE, WITH_PEER = "connectomics-doctor", "connectomics-doctor-peer"
FACTS, READY = "facts", "ready"
JOINED, BYE = "joined", "bye"
BYE_S = 10.0  # to wait for the other's last word, besides the time that names may be seen late
REMOVAL_S = 10.0  # to remove what was made

Tell = Callable[[str], None]
Ended = Callable[[], str]
Second = Callable[[Path], contextlib.AbstractContextManager[Ended]]
"""Starts the second process in a place; what it gives says why that process failed, empty while it did not."""


@dataclass(frozen=True, slots=True)
class DiskReport:
    """What was measured of a folder's disk.

    Parameters
    ----------
    folder
        Which was named.
    facts
        That this process found out by itself.
    pair
        What both processes found out.
    host
        The other machine, empty if both ran on this one.
    with_child
        Whether the other was a child of this process, which sees the disk in the same way.
    """

    folder: Path
    facts: DiskFacts
    pair: Pair
    host: str = ""
    with_child: bool = True

    @property
    def is_local(self) -> bool:
        """Whether this machine alone writes to the disk, as far as is known."""
        return self.facts.is_local and not self.host


def check_disk(
    folder: Path, tell: Tell, *, peer: bool = False, tempo: Tempo | None = None, second: Second | None = None
) -> DiskReport:
    """Measure what the disk of a folder can do.

    Parameters
    ----------
    folder
        Where runs are to write; it must exist.
    tell
        Hears of what takes time, and of what could not be removed.
    peer
        Meet another call of this function, on a machine that sees the same folder, rather than a process of this one.
    tempo
        How long is measured.
    second
        Starts the second process; None: a child of this one.

    Raises
    ------
    ConfigError
        If there is no such folder.
    StorageError
        If it cannot be written to.
    OutputError
        If the other process ends, or is not heard of.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; name one that is there, such as the folder of results")
    folder, tempo = folder.absolute(), tempo or Tempo()
    with contextlib.ExitStack() as opened:
        try:
            place = opened.enter_context(_place(folder, WITH_PEER if peer else ALONE, tell))
            facts = facts_of(place / FACTS)
            if peer:
                place, role = _meet(place, tell, tempo.wait_s)
                ended: Ended = str
                if role == SECOND:
                    opened.push(lambda kind, *_: None if kind is None else _remove(place, tell))
            else:
                role, ended = FIRST, opened.enter_context((second or child)(place))
            pair, host = together(place, role, ended, tempo=tempo, tell=tell)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be written to or read ({error.strerror or error}); mend the disk or its "
                "permissions, or choose another folder for results"
            ) from error
    return DiskReport(folder, facts, pair, host, with_child=not peer)


def together(place: Path, role: str, ended: Ended, *, tempo: Tempo, tell: Tell) -> tuple[Pair, str]:
    """Measure with the other process.

    Returns
    -------
    pair
        What was measured.
    host
        Name of the other's machine, empty if it is this one.
    """

    def slow() -> None:
        tell("names are seen late on this disk; it takes some minutes to find out how late")

    post = Post(place, role, ended, tempo.wait_s)
    other = _greeted(place, role, post)
    pair = measure(place, role, post, tempo=tempo, slow=slow)
    if role == SECOND:
        post.say(BYE)
    else:
        _hear_last(post, BYE_S + 2 * min(pair.delay_s, tempo.longest_s))
    return pair, "" if other["machine"] == host_mark() else other["host"]


def _greeted(place: Path, role: str, post: Post) -> dict[str, Any]:
    """Let each process know the other's machine, and a third one that it is too late."""
    own = {"host": socket.gethostname(), "machine": host_mark()}
    if role == FIRST:
        other = post.wait(JOINED)
        (place / READY).unlink()
        post.say(JOINED, **own, token=other["token"])
        return other
    token = secrets.token_hex(8)
    post.say(JOINED, **own, token=token)
    other = post.wait(JOINED)
    if other["token"] != token:
        raise OutputError(
            f"{place.parent}: is measured by two other processes just now; begin again when they are done"
        )
    return other


def _hear_last(post: Post, wait_s: float) -> None:
    """Wait until the other needs nothing any more."""
    until = time.monotonic() + wait_s
    with contextlib.suppress(OutputError):
        while post.heard(BYE) is None and time.monotonic() < until:
            time.sleep(HEARING_S)


def _meet(own: Path, tell: Tell, wait_s: float) -> tuple[Path, str]:
    """Where two calls meet: in the place of the one whose name comes first; and the role of this one."""
    folder = own.parent
    tell(f"waiting at most {wait_s:g} s for the same command on another machine: connectomics doctor {folder} --peer")
    post, until = Post(own, FIRST, str, wait_s), time.monotonic() + wait_s
    while time.monotonic() < until:
        if post.heard(JOINED) is not None:
            return own, FIRST
        waiting = next(filter(lambda place: _waits(place, own, wait_s), sorted(folder.glob(f".{WITH_PEER}.*"))), None)
        if waiting is not None:
            _remove(own, tell)
            return waiting, SECOND
        time.sleep(HEARING_S)
    raise OutputError(
        f"no other process has come to {folder} within {wait_s:g} s; run connectomics doctor FOLDER --peer on a second "
        "machine meanwhile, where FOLDER is the same folder"
    )


def _waits(place: Path, own: Path, wait_s: float) -> bool:
    """Whether another process waits in a place, and comes before this one; what is older was left behind."""
    if place.name >= own.name or not place.name.endswith(TEMPORARY):
        return False
    with contextlib.suppress(OSError):
        return own.stat().st_mtime - place.stat().st_mtime < wait_s and place / READY in place.iterdir()
    return False


@contextlib.contextmanager
def _place(folder: Path, name: str, tell: Tell) -> Iterator[Path]:
    """A place for two processes to meet in; removed in the end, like those that processes left which live no more."""
    with contextlib.suppress(OSError):
        discard_temporaries(folder / name)
    place = temporary_beside(folder / name)
    try:
        furnish(place)
        (place / FACTS).mkdir()
        (place / READY).write_text(READY)
        yield place
    finally:
        _remove(place, tell)


def _remove(place: Path, tell: Tell) -> None:
    """Remove a place; what another machine has just made in it may be seen late."""
    until = time.monotonic() + REMOVAL_S
    while True:
        try:
            return discard(place)
        except OSError as error:
            if time.monotonic() > until:
                return tell(f"{place}: could not be removed ({error.strerror or error}); remove it by hand")
        time.sleep(HEARING_S)


@contextlib.contextmanager
def child(place: Path) -> Iterator[Ended]:
    """Start the second process as a child of this one, and end it; see ``Second``."""
    program = "from connectomics.commands.disk.disk_check import second_process; second_process()"
    above = str(Path(connectomics.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(place), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
    ) as process:

        def ended() -> str:
            code = process.poll()
            if not code or process.stderr is None:
                return ""  # it runs, or has said all, which may be seen late
            said = process.stderr.read().split("\n")
            return next(filter(None, reversed(said)), f"exit code {code}")

        try:
            yield ended
        finally:
            process.terminate()


def second_process() -> None:
    """Be the child that ``child`` starts: ``PLACE PARENT`` are its words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    place, parent = Path(sys.argv[1]), int(sys.argv[2])

    def ended() -> str:
        return "" if os.getppid() == parent else f"process {parent} is gone"

    try:
        together(place, SECOND, ended, tempo=Tempo(), tell=lambda text: None)
    except (ConnectomicsError, OSError) as error:
        if ended():
            discard(place)
        raise SystemExit(str(error)) from error
