"""Processes that are simulated: the product's own code in threads that are let go from one operation to the next.

Each operation on a record, and each rename, is a point where a process may stand for as long as it likes, or end for
good. Clocks are simulated, too, and each process has its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from connectomics.execution.coordination import Version

STEP_S = 0.001  # that passes at each point
MOST_STEPS = 200_000


class Killed(BaseException):
    """A simulated process has ended; nothing that it still does has an effect."""


class Simulated:
    """A thread of a simulated process."""

    def __init__(self, world: World, process: Process, body: Callable[[], None]) -> None:
        self.world, self.process = world, process
        self.ended = False
        self.wake = 0.0
        self._go, self._at = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.start()

    def _run(self, body: Callable[[], None]) -> None:
        self.world.current[threading.get_ident()] = self
        self._go.acquire()
        try:
            if not self.process.killed:
                body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever ends it is its outcome
            self.process.outcome = f"wrong: {type(error).__name__}: {error}"
        finally:
            self.ended = True
            self._at.release()

    def step(self) -> None:
        """Go on to the next point, or to the end."""
        if not self.ended:
            self._go.release()
            self._at.acquire()

    def point(self) -> None:
        if self.process.killed:
            raise Killed
        self._at.release()
        self._go.acquire()
        if self.process.killed:
            raise Killed


@dataclass
class Process:
    """A simulated process: its threads, its clock, and what became of it."""

    name: str
    rate: float = 1.0
    offset: float = 0.0
    killed: bool = False
    threads: list[Simulated] = field(default_factory=list)
    outcome: str = ""
    publishes: bool = False  # whether it stands just before it gives a result its final name

    @property
    def ended(self) -> bool:
        return self.killed or bool(self.outcome)


class World:
    """All processes, the time, and what goes wrong next."""

    def __init__(self) -> None:
        self.time = 0.0
        self.current: dict[int, Simulated] = {}
        self.processes: list[Process] = []
        self.faults: list[str] = []
        self.stores: dict[str, dict[str, list[bytes]]] = {}

    def start(self, process: Process, body: Callable[[], None]) -> None:
        """Add a thread to a process."""
        if process not in self.processes:
            self.processes.append(process)
        process.threads.append(Simulated(self, process, body))

    def here(self) -> Simulated | None:
        return self.current.get(threading.get_ident())

    def point(self) -> None:
        """Wait until this thread is let go; outside of simulated processes nothing happens."""
        thread = self.here()
        if thread is not None:
            thread.point()

    def now(self) -> float:
        """The time on the clock of the process that asks."""
        thread = self.here()
        assert thread is not None
        return self.time * thread.process.rate + thread.process.offset

    def sleep(self, seconds: float) -> None:
        thread = self.here()
        assert thread is not None
        thread.wake = self.time + seconds / thread.process.rate
        while self.time < thread.wake:
            thread.point()

    def run(self, process: Process, steps: int) -> None:
        """Let a process do some steps, its threads in turn."""
        for _ in range(steps):
            ready = [t for t in process.threads if not t.ended and t.wake <= self.time]
            for thread in ready:
                self.time += STEP_S
                thread.step()
            if not ready:
                return

    def finish(self) -> None:
        """Let all processes run, in turn and with time passing, until they end."""
        for _ in range(MOST_STEPS):
            living = [p for p in self.processes if not p.ended]
            if not living:
                return
            for process in living:
                self.run(process, 1)
            waiting = [t.wake for p in living for t in p.threads if not t.ended]
            if waiting and min(waiting) > self.time:
                self.time = min(waiting)
        raise AssertionError("it does not come to an end")

    def kill(self, process: Process) -> None:
        process.killed = True
        for thread in process.threads:
            while not thread.ended:
                thread.step()

    def close(self) -> None:
        for process in self.processes:
            self.kill(process)

    def store(self, folder: object, *_: object) -> MemoryStore:
        """The records that are said to be in a folder."""
        return MemoryStore(self, self.stores.setdefault(str(folder), {}))

    def threading(self) -> Any:
        """What takes the place of the module of this name: locks that wait from point to point."""
        lock = lambda: Lock(self)  # noqa: E731
        return SimpleNamespace(Lock=lock, RLock=lock, Event=threading.Event, Thread=threading.Thread)


class Lock:
    """A lock among simulated threads, which its owner may take again."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._owner: object = None
        self._depth = 0

    def __enter__(self) -> None:
        me = self._world.here() or threading.get_ident()
        while self._owner is not None and self._owner is not me:
            self._world.point()
        self._owner, self._depth = me, self._depth + 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None


class MemoryStore:
    """A coordination store in memory, which loses replies, fails for a moment and shows what was, as networks do."""

    def __init__(self, world: World, records: dict[str, list[bytes]]) -> None:
        self._world = world
        self._records = records

    def create(self, name: str, content: bytes) -> Version | None:
        return self._write(name, 0, content)

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        return self._write(name, seen.number + 1, content)

    def _write(self, name: str, number: int, content: bytes) -> Version | None:
        made = self._verb(lambda: self._made(name, number, content))
        return Version(number, content) if made else None

    def _made(self, name: str, number: int, content: bytes) -> bool:
        versions = self._records.setdefault(name, [])
        if len(versions) == number:
            versions.append(content)
        return len(versions) > number and versions[number] == content

    def read(self, name: str) -> Version | None:
        def current() -> Version | None:
            versions = self._records.get(name, [])
            return Version(len(versions) - 1, versions[-1]) if versions else None

        return self._verb(current)

    def list(self, prefix: str) -> list[str]:
        return self._verb(
            lambda: sorted(n for n, versions in self._records.items() if versions and n.startswith(prefix))
        )

    def _verb(self, action: Callable[[], Any]) -> Any:
        """Do an action between two points; a reply that is lost, or an error, makes it happen again."""
        while True:
            self._world.point()
            fault = self._world.faults.pop() if self._world.faults and self._world.here() else ""
            if fault == "error":
                continue
            result = action()
            self._world.point()
            if fault != "lost":
                return result


@contextlib.contextmanager
def interrupted(world: World, owner: Any, name: str) -> Iterator[None]:
    """Points before and after a function while the context is open."""
    real = getattr(owner, name)

    def function(*arguments: Any, **more: Any) -> Any:
        world.point()
        result = real(*arguments, **more)
        world.point()
        return result

    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, real)
