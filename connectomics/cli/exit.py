"""How a command ends: an error becomes one sentence, a signal stops it, and both become an exit code."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from connectomics.cli.usage import say
from connectomics.core.errors import ConnectomicsError
from connectomics.core.text import VisibleFormatter

FAILED = 3
INTERRUPTED = 128  # plus the signal's number


class _Stopped(BaseException):
    """A signal asked for an end; whatever was finished is on disk already."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {signal.Signals(number).name}")
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    for repeated in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(repeated, signal.SIG_IGN)  # schedulers send them twice; once is enough
    raise _Stopped(number)


def _wait_asleep() -> None:
    """Let threads that wait for each other sleep, unless the environment says otherwise; before PyTorch is loaded.

    GNU OpenMP lets them spin for milliseconds, and where other programs use the same cores a network then took ten
    times as long.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def guarded(command: Callable[[argparse.Namespace], int], words: argparse.Namespace) -> int:
    """Run a command with errors turned into one sentence and an exit code."""
    _wait_asleep()
    before = {n: signal.signal(n, _stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with _warnings_on_stderr():
            return command(words)
    except (ConnectomicsError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}", sys.stderr)
        return error.exit_code if isinstance(error, ConnectomicsError) else FAILED
    except _Stopped as stop:
        print("stopped by a signal; finished blocks are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED + stop.number
    except KeyboardInterrupt:
        print("interrupted; finished blocks are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED + signal.SIGINT
    finally:
        gc.unfreeze()
        for number, previous in before.items():
            signal.signal(number, previous)


def leave(command: Callable[[], int]) -> NoReturn:
    """Run a command and end the process without taking down PyTorch and OpenVINO first, which lasts most of a second.

    All that was to be written is written by then. What is registered with ``atexit`` meanwhile runs, and streams are
    flushed; where they refuse, a command that was done has failed.
    """
    codes: list[int] = []

    def end() -> None:
        if not codes:  # the command was left in another way
            return
        logging.shutdown()
        try:
            print(end="", flush=True)
            print(end="", flush=True, file=sys.stderr)
        except OSError:
            codes[0] = codes[0] or FAILED
        os._exit(codes[0])

    atexit.register(end)  # the first to be registered is the last to be called
    codes.append(command())
    raise SystemExit(codes[0])


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """While open, warnings that the package logs are printed."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("connectomics")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
