"""Which blocks of a stage this process does: each is leased, by whoever comes first, and says how its holders ended."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from connectomics.core.errors import ConnectomicsError, QuarantineError
from connectomics.core.files import make_folder, write_text
from connectomics.core.geometry import Block
from connectomics.execution.lease import HELD, lease_of
from connectomics.execution.ledger import Ledger
from connectomics.execution.publishing import STAGING
from connectomics.execution.run_folder import stage_of
from connectomics.execution.task import BlockFailure, BlockRecord, Executor, Task
from connectomics.execution.worker import Worker

log = logging.getLogger(__name__)
Apart = Callable[[Path, Block], BlockRecord | BlockFailure]
"""Runs a block of the stage whose ledger is in a folder in a process of its own, whose death is the block's failure."""
QUARANTINE = "quarantine"
MOST_DEATHS = 2  # of a block's holders, after which it is run apart
FAILURES_IN_A_ROW = 16  # from which on something other than these blocks must be wrong
FAILING = "failing"  # the record that counts them


class BlockClaims:
    """The leases of this process on the blocks of a stage; a context manager, which gives back what is left in hand.

    Parameters
    ----------
    task, ledger
        The stage and its record.
    worker
        This process among the others.
    apart
        For blocks that may have killed processes; None to run them like others.
    """

    def __init__(self, task: Task, ledger: Ledger, worker: Worker, apart: Apart | None = None) -> None:
        self._task = task
        self._ledger = ledger
        self._worker = worker
        self._apart = apart
        self._suspect: Block | None = None
        self._failed: dict[str, BlockFailure] = {}
        self._taken: set[str] = set()

    def __enter__(self) -> BlockClaims:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for lease in self._taken:
            with contextlib.suppress(ConnectomicsError):  # the disk may be gone, and what went wrong is told
                self._worker.release(lease)

    def results(self, executor: Executor) -> Generator[BlockRecord | BlockFailure]:
        """What becomes of all blocks that nobody else does; ends when every block is done or has failed.

        A suspect is run when nothing else is in hand here: others may wait for it, and what it does to this process
        costs no other block.
        """
        while True:
            yield from executor.run(self._task, self._claimed())
            if self._suspect is None:
                return
            suspect, self._suspect = self._suspect, None
            yield self._run_apart(suspect)

    def finish(self, key: str) -> None:
        """Give a block back that is in the ledger."""
        lease = self._lease(key)
        self._worker.release(lease)
        self._taken.discard(lease)
        quarantine_file(self._ledger.folder, key).unlink(missing_ok=True)

    def fail(self, failure: BlockFailure) -> None:
        """Set a block aside, for all processes of this attempt.

        Raises
        ------
        LeaseLostError
            If another has the block by now: it failed here since that one, or all others, have gone on meanwhile.
        QuarantineError
            If so many failed, wherever, since the last one was finished, that something else must be wrong.
        """
        lease = self._lease(failure.block)
        self._worker.confirm(lease)
        self._failed[failure.block] = failure
        _set_aside(self._ledger.folder, failure)
        self._worker.fail(lease, failure.reason)
        self._taken.discard(lease)
        self._ledger.refresh()
        in_a_row = self._worker.count(self._lease(FAILING), self._ledger.finished)
        if in_a_row >= FAILURES_IN_A_ROW and in_a_row < self._ledger.planned:
            raise QuarantineError(f"{in_a_row} blocks in a row failed, the last with: {failure.reason}")

    def failures(self) -> tuple[BlockFailure, ...]:
        """All blocks that failed in this attempt and were not done by anybody."""
        return tuple(f for key, f in self._failed.items() if not self._ledger.is_done(self._ledger.block(key)))

    def _claimed(self) -> Iterator[Block | None]:
        """Blocks that nobody has done or has in hand, each leased, until one is a suspect.

        Waits while others have all that are left. None comes before it waits: others may be waiting for what this
        process has in hand.
        """
        for pause in self._worker.pauses():
            taken = busy = False
            for block in self._ledger.unfinished():
                lease = self._lease(block.key)
                if block.key in self._failed or self._worker.holds(lease):
                    continue
                if not self._worker.acquire(lease):
                    busy = not self._has_failed(block) or busy
                    continue
                self._ledger.refresh()
                if self._ledger.is_done(block):
                    self._worker.release(lease)
                    continue
                self._taken.add(lease)
                if self._apart is not None and self._deaths(block.key) >= MOST_DEATHS:
                    self._suspect = block
                    return
                taken = True
                yield block
            if not busy:
                return
            yield None
            if not taken:
                self._worker.sleep(pause)
            self._ledger.refresh()

    def _run_apart(self, block: Block) -> BlockRecord | BlockFailure:
        assert self._apart is not None
        deaths = self._deaths(block.key)
        log.warning(
            "%s, block %s: %d processes ended at it; it gets one of its own", self._task.name, block.key, deaths
        )
        return self._apart(self._ledger.folder, block)

    def _has_failed(self, block: Block) -> bool:
        """Whether another process of this attempt has set a block aside."""
        why = self._worker.failure(self._lease(block.key))
        if why is not None:
            self._failed[block.key] = BlockFailure(block.key, block.core, why, "")
        return why is not None

    def _deaths(self, key: str) -> int:
        """How many processes ended with a block in hand; of one that is built for publishing, in earlier epochs too."""
        deaths = self._worker.held(self._lease(key)).deaths
        own = self._ledger.folder.parent
        for other in own.parent.glob(f"{STAGING}*") if own.name.startswith(STAGING) else ():
            seen = self._worker.store.read(lease_name(other / self._ledger.folder.name, key)) if other != own else None
            before = None if seen is None else lease_of(seen)
            deaths += 0 if before is None else before.deaths + (before.state == HELD)
        return deaths

    def _lease(self, key: str) -> str:
        return lease_name(self._ledger.folder, key)


def lease_name(folder: Path, key: str) -> str:
    """Name of the lease on a block of the stage whose ledger is in a folder.

    Who builds in a staging folder has leases of its own there: an earlier builder who wakes up takes no block of it.
    """
    epoch = f"{folder.parent.name}." if folder.parent.name.startswith(STAGING) else ""
    return f"{epoch}{stage_of(folder)}.{key}"


def quarantined(ledger: Ledger) -> tuple[str, ...]:
    """Keys of the blocks that are set aside and were not done since."""
    keys = sorted(path.stem for path in (ledger.folder / QUARANTINE).glob("*.txt"))
    return tuple(key for key in keys if not ledger.is_done(ledger.block(key)))


def quarantine_file(folder: Path, key: str) -> Path:
    """Where the traceback of a block's failure is, in a ledger's folder."""
    return folder / QUARANTINE / f"{key}.txt"


def _set_aside(folder: Path, failure: BlockFailure) -> None:
    path = quarantine_file(folder, failure.block)
    make_folder(path.parent)
    where = f"block {failure.block}, voxels (z, y, x) {failure.box.start} to {failure.box.stop}"
    write_text(path, f"{where}\n{failure.reason}\n\n{failure.trace}")
    log.error("%s is quarantined: %s", where, failure.reason)
