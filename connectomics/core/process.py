"""Marks of processes: who made a temporary file or holds a lease, and whether that process surely lives no more."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import socket
import sys
from pathlib import Path

import psutil

PROC = Path("/proc")
ENDED = ("Z", "X")  # a zombie and a dead process, as Linux calls their states


@functools.cache
def host_mark() -> str:
    """8 hexadecimal digits for this machine since it was started, and for this space of process numbers."""
    facts = [socket.gethostname()]
    try:
        facts.append((PROC / "sys/kernel/random/boot_id").read_text())
        facts.append(str((PROC / "self/ns/pid").readlink()))
    except OSError:  # not Linux
        facts.append(str(int(psutil.boot_time())))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def new_mark() -> str:
    """A name that no other process, and no other call, gives: host, process, its start, and a random part."""
    pid = os.getpid()
    return f"{host_mark()}-{pid}-{_start_of_this(pid, PROC)}-{secrets.token_hex(4)}"


@functools.lru_cache(maxsize=1)
def _start_of_this(pid: int, proc: Path) -> str:
    """Return when this process was started; its number is asked for since a forked child has another."""
    return _started(pid)


def is_dead(mark: str) -> bool:
    """Whether the process that made a mark has ended for sure; of other machines that is never sure."""
    return _is_of_this_machine(mark) and not is_alive(mark)


def is_alive(mark: str) -> bool:
    """Whether the process that made a mark runs on this machine, or is stopped there."""
    _, pid, start, *_ = mark.split("-") if _is_of_this_machine(mark) else ("", "0", "")
    return start != "" and _started(int(pid)) == start


def _is_of_this_machine(mark: str) -> bool:
    parts = mark.split("-")
    return len(parts) == 4 and parts[0] == host_mark() and parts[1].isdecimal()


def is_mark(text: str) -> bool:
    """Whether ``text`` has the form of a mark."""
    parts = text.split("-")
    return len(parts) == 4 and len(parts[0]) == 8 and parts[1].isdecimal()


def _started(pid: int) -> str:
    """When a process was started, in a form that only equals itself; empty where there is no such process."""
    try:
        if PROC.joinpath("self").exists():
            state, *fields = PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
            return "" if state in ENDED else fields[18]
        return str(int(psutil.Process(pid).create_time()))
    except (OSError, psutil.Error):
        return ""


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
