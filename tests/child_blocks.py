"""Blocks for child processes: what one of them does there, and as a script four processes with a block that kills.

The functions are called by name in processes that have nothing of the tests but this file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.errors import DeviceMemoryError, QuarantineError, StorageError
from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.child_process import ChildProcess
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import attempt, run_blocks
from connectomics.execution.task import BlockFailure, BlockRecord
from connectomics.execution.worker import Worker

BLOCKS = 20
KILLER = "5-0-0"
GRID = BlockGrid((BLOCKS, 1, 1), (1, 1, 1))


@dataclass(frozen=True)
class Marks:
    """Each block leaves a file; one of them may kill its process, as a lack of memory or a driver does."""

    folder: Path
    killer: str = ""
    seconds: float = 0.0
    name: str = "marks"
    grid: BlockGrid = GRID

    def process(self, block: Block) -> BlockRecord:
        if block.key == self.killer:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        (self.folder / block.key).write_text(str(os.getpid()))
        return BlockRecord(block.key, {}, 0, 0.0)


def done(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    """Do a block, print a lot and log."""
    os.write(1, b"printed below Python\n")
    sys.stdout.write("printed\n" * 10_000)
    logging.getLogger("connectomics").info("logged")
    return attempt(Marks(folder), block)


def kills(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    return attempt(Marks(folder, killer=block.key), block)


def crashes(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    """Crash as a library does that looks where nothing is."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def exits(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    os._exit(7)


def fails(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    return BlockFailure(block.key, block.core, "the section is torn", "Traceback")


def cannot_begin(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    raise ValueError("no such stage")


def lacks_device_memory(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    raise DeviceMemoryError("ran out")


def meets_full_disk(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    raise StorageError("full") from OSError(errno.ENOSPC, "No space left on device")


def hears_signals(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    """Be asked to end, as all processes of a job are, and go on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return attempt(Marks(folder), block)


def takes_long(folder: Path, block: Block) -> BlockRecord | BlockFailure:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    raise AssertionError


def work(folder: Path, killer: str) -> int:
    """What a worker does; the number of blocks that it knows to have failed."""
    logging.disable(logging.CRITICAL)
    with Worker.of(folder / "coordination") as worker:
        ledger = Ledger(folder / "ledger", "key", {}, BlockPlan((1, 1, 1), (1, 1, 1)), (BLOCKS, 1, 1))
        apart = ChildProcess(kills if killer else done)
        task = Marks(folder, killer, seconds=0.05)
        try:
            blocks = run_blocks(task, ledger, SerialExecutor(), worker, lambda done, planned: None, apart=apart)
        except QuarantineError:
            return BLOCKS
        return len(blocks.failures)


def main(folder: Path, count: int) -> None:
    """Fork workers and print how they ended."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os._exit(work(folder, KILLER))
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    sys.stdout.write(json.dumps(codes) + "\n")


if __name__ == "__main__":
    import child_blocks  # by this name a child finds the functions

    child_blocks.main(Path(sys.argv[1]), int(sys.argv[2]))
