"""Runs a block in a process of its own, whose death is the block's failure and nobody else's.

``BlockClaims`` does so with blocks that may have killed processes. The child is started, never forked, so that it
shares no state of a device or library; the parent only waits for it, and it ends when its parent ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from connectomics.core.errors import ConnectomicsError, DeviceMemoryError, StorageError, VolumeError
from connectomics.core.geometry import Block
from connectomics.execution.retry import errno_of
from connectomics.execution.runner import raise_systemic
from connectomics.execution.task import BlockFailure, BlockRecord

log = logging.getLogger(__name__)
BEGIN = (
    "import sys; sys.path[:] = sys.argv[1:]; from connectomics.execution.executors import child_process as c; c.main()"
)
ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a job to end. They may reach the child too, but its parent decides, and then ends it."""
WITNESS_S = 1.0  # what kills both may kill the child first: only a parent that lives on has seen the block's doing
LAST_WORDS = 1 << 14  # characters of what a child said that are kept
UNSENDABLE = (pickle.PicklingError, AttributeError, TypeError)  # pickle's words for what only this process knows


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What would stop every other block too, with the operating system's number of it."""

    error: ConnectomicsError
    number: int | None


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """Does one block in a child process: what ``run_blocks`` takes as ``apart``.

    Parameters
    ----------
    do
        Called in the child with the folder of a stage's ledger and the block: makes the stage's task again, and does
        the block as ``runner.attempt`` does. It is pickled, so it is a function of a module with plain values.
    release
        Called here before: gives back memory that the child needs and this process only keeps.
    """

    do: Callable[[Path, Block], BlockRecord | BlockFailure]
    release: Callable[[], None] = lambda: None

    def __call__(self, folder: Path, block: Block) -> BlockRecord | BlockFailure:
        """Do a block of the stage whose ledger lies in ``folder``.

        Returns
        -------
        outcome
            A failure also where the child died, or could not be started or begin.

        Raises
        ------
        StorageError, VolumeError
            If the disk of the results, or that of the input, refuses in a way that no other block would survive.
        """
        self.release()
        try:
            request = pickle.dumps((folder, block, pickle.dumps(self.do)))
            with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
                code = _awaited(request, answer, said)
                outcome = _unpacked(_content(answer))
                words = _content(said).decode(errors="replace")[-LAST_WORDS:]
        except (OSError, *UNSENDABLE) as error:
            return _unable(block, error)
        for line in words.splitlines():
            log.info("block %s, in a process of its own: %s", block.key, line)
        if outcome is None:
            time.sleep(WITNESS_S)
            return BlockFailure(block.key, block.core, f"killed its process ({_death(code)})", words)
        if isinstance(outcome, _Refusal):
            number = outcome.number
            raise outcome.error from None if number is None else OSError(number, os.strerror(number))
        return outcome


def _awaited(request: bytes, answer: IO[bytes], said: IO[bytes]) -> int:
    """How a child ended, as ``Popen.returncode``; whatever else happens here, it has ended afterwards."""
    words = [sys.executable, "-P", "-c", BEGIN, *sys.path]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ORDERLY)  # the child is begun with these blocked
    try:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=answer, stderr=said)
        assert process.stdin is not None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
            return process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _unpacked(answer: bytes) -> BlockRecord | BlockFailure | _Refusal | None:
    """What a child answered, None where it did not come so far."""
    try:
        outcome: BlockRecord | BlockFailure | _Refusal = pickle.loads(answer)  # noqa: S301 - of a process that was begun here
    except (EOFError, pickle.UnpicklingError):
        return None
    return outcome


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    known = {number.value: f", {number.name}" for number in signal.Signals} | {signal.SIGKILL: "; out of memory?"}
    return f"signal {-code}{known.get(-code, '')}"


def _unable(block: Block, error: Exception) -> BlockFailure:
    """The failure of a block that did not come to be tried."""
    reason = f"could not be done in a process of its own: {type(error).__name__}: {' '.join(str(error).split())}"
    return BlockFailure(block.key, block.core, reason, "".join(traceback.format_exception(error)))


def main() -> None:
    """Be the child: do what stands on standard input, answer on standard output, and end without taking anything down.

    Whatever prints or logs does so to standard error.
    """
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        _be_the_child()
        folder, block, what = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the process that began this one
        threading.Thread(target=_end_with_parent, daemon=True).start()
        outcome: BlockRecord | BlockFailure | _Refusal
        try:
            outcome = pickle.loads(what)(folder, block)  # noqa: S301 - as before
        except Exception as error:  # noqa: BLE001 - the parent's broad catch: a failure stays with its block
            outcome = _told(error, block)
        answer.seek(0)  # before what was printed there until now
        answer.truncate()
        answer.write(pickle.dumps(outcome))
        answer.flush()
        os._exit(0)


def _be_the_child() -> None:
    """Say where it crashed, if it does; leave orderly ends to the parent; be the one whom a lack of memory kills."""
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("connectomics").setLevel(logging.INFO)
    for number in ORDERLY:
        signal.signal(number, lambda number, frame: None)  # not ignored: children of this process would inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERLY)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open while it lives."""
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os._exit(1)


def _told(error: Exception, block: Block) -> BlockFailure | _Refusal:
    """What an error of the preparation, or one that stops a run, is for the parent."""
    try:
        raise_systemic(error)
    except DeviceMemoryError:  # which the parent has part of
        pass
    except (StorageError, VolumeError) as refusal:
        return _Refusal(refusal, errno_of(refusal))
    return _unable(block, error)
