"""What becomes of one volume, who hears of it, and the log that tells it; for labelling and for decoding."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from connectomics.core.errors import ConnectomicsError, OutputError, VolumeError
from connectomics.core.files import make_folder, require_short
from connectomics.core.process import host_mark
from connectomics.core.text import VisibleFormatter
from connectomics.execution.retry import SYSTEMIC, errno_of
from connectomics.execution.task import RunReport

NOT_BEGUN = "not begun, because the disk of the results refused; mend that and run again"
EXPECTED = (ConnectomicsError, OSError, MemoryError)  # what may go wrong without a mistake of ours


@dataclass(frozen=True, slots=True)
class VolumeOutcome:
    """What became of one volume: ``state`` is done, skipped or failed; ``reason`` says why it failed.

    ``storage`` tells that the disk of the results refused, so that no other volume can be written either.
    """

    name: str
    state: str
    reason: str = ""
    paths: tuple[Path, ...] = ()
    report: RunReport | None = None
    seconds: float = 0.0
    storage: bool = False


class Observer(Protocol):
    """Hears how many volumes come along; the command line draws its progress from it."""

    def listed(self, total: int, finished: int) -> None:
        """Before the first volume: how many there are and how many of them are finished already."""
        ...

    def began(self, name: str) -> None: ...

    def block(self, finished: int, planned: int) -> None: ...

    def ended(self, outcome: VolumeOutcome) -> None: ...


class NullObserver:
    """An observer that does nothing."""

    def listed(self, total: int, finished: int) -> None: ...

    def began(self, name: str) -> None: ...

    def block(self, finished: int, planned: int) -> None: ...

    def ended(self, outcome: VolumeOutcome) -> None: ...


def outcomes_of(
    names: Sequence[str],
    kept: Mapping[str, tuple[Path, ...]],
    process: Callable[[int], VolumeOutcome],
    observer: Observer,
    *,
    stop_on_error: bool = False,
    put_off: Callable[[int], bool] = lambda number: False,
) -> list[VolumeOutcome]:
    """Bring volumes to an end one after the other; when the disk of the results refuses, no other is begun.

    Parameters
    ----------
    names, kept
        The volumes, and final paths of those that are done already, by name.
    process
        Gives the outcome of the volume with this number.
    observer
        Hears of all but what happens within a volume.
    stop_on_error
        Whether the first failure is the last outcome.
    put_off
        Whether the volume with this number is asked for again after all others.

    Returns
    -------
    outcomes
        In the order of the names.
    """
    observer.listed(len(names), len(kept))
    outcomes, storage = dict[int, VolumeOutcome](), False
    for number in _turns(len(names), lambda number: names[number] not in kept and put_off(number)):
        name = names[number]
        if name in kept:
            outcome = VolumeOutcome(name, "skipped", paths=kept[name])
        elif storage:
            outcome = VolumeOutcome(name, "failed", NOT_BEGUN, storage=True)
        else:
            outcome = process(number)
        observer.ended(outcome)
        outcomes[number] = outcome
        storage = storage or outcome.storage
        if stop_on_error and outcome.state == "failed":
            break
    return [outcomes[number] for number in sorted(outcomes)]


def _turns(count: int, put_off: Callable[[int], bool]) -> Iterator[int]:
    """Numbers in order, but for those that are put off when it is their turn."""
    later: list[int] = []
    for number in range(count):
        if put_off(number):
            later.append(number)
        else:
            yield number
    yield from later


def attempted(name: str, folder: Path, run: Callable[[], tuple[tuple[Path, ...], RunReport]]) -> VolumeOutcome:
    """Run one volume; whatever goes wrong is its outcome, never another volume's.

    Its log is kept in the folder, RUN; ``run`` brings it to its final outputs, and gives their paths and the report.
    """
    began = time.perf_counter()
    try:
        with _run_log(folder):
            paths, report = run()
    except Exception as error:  # noqa: BLE001 - the runner's broad catch: a failure stays with its volume
        return failed_outcome(name, error, time.perf_counter() - began)
    return VolumeOutcome(name, "done", "", paths, report=report, seconds=time.perf_counter() - began)


def failed_outcome(name: str, error: Exception, seconds: float) -> VolumeOutcome:
    """The outcome of a volume that an error ended."""
    reason = " ".join((str(error) or "out of memory").split())
    if isinstance(error, OSError):
        reason += "; free the disk or mend the permission, then run again"
    if not isinstance(error, EXPECTED):
        reason = f"{type(error).__name__}: {reason} (unexpected; the traceback is in run.log)"
    storage = not isinstance(error, VolumeError) and errno_of(error) in SYSTEMIC
    return VolumeOutcome(name, "failed", reason, seconds=seconds, storage=storage)


class _LogFile(logging.FileHandler):
    """A log that stays silent when its line cannot be written: the disk is full, and the run will say so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Let the line go."""


@contextlib.contextmanager
def _run_log(folder: Path) -> Iterator[None]:
    """While open, everything the package logs also goes to ``run.log`` in a RUN folder.

    Each line tells its host and its worker, by the first two parts of the marks that name sessions and ledgers' files.
    """
    require_short(folder.name)
    try:
        make_folder(folder)
        handler = _LogFile(folder / "run.log")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot make the RUN folder ({error.strerror}); choose another inference.data.output_path"
        ) from error
    who = f"{socket.gethostname()} {host_mark()}".replace("%", "%%")
    handler.setFormatter(VisibleFormatter(f"%(asctime)s {who}-%(process)d %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("connectomics")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        unexpected = isinstance(error, Exception) and not isinstance(error, EXPECTED)
        logger.info("stopped: %s", error, exc_info=unexpected)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with contextlib.suppress(OSError):  # a full disk; the run says so
            handler.close()
