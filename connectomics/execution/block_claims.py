"""Which blocks of a stage this process does: shards of them are leased, and say how their holders ended."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from connectomics.core.errors import ConnectomicsError, QuarantineError
from connectomics.core.files import make_folder, write_text
from connectomics.core.geometry import Block
from connectomics.execution.block_shards import Shards, cut_point
from connectomics.execution.lease import DONE, HELD, LeaseLostError, Stretch, pauses
from connectomics.execution.ledger import Ledger
from connectomics.execution.publishing import STAGING
from connectomics.execution.task import BlockFailure, BlockRecord, Executor, Task
from connectomics.execution.worker import Worker

log = logging.getLogger(__name__)
Apart = Callable[[Path, Block], BlockRecord | BlockFailure]
"""Runs a block of the stage whose ledger is in a folder in a process of its own, whose death is the block's failure."""
QUARANTINE = "quarantine"
MOST_DEATHS = 2  # of a block's holders, after which it is run apart
FAILURES_IN_A_ROW = 16  # from which on something other than these blocks must be wrong
LOOKED_AT = 8  # shards of others, before the largest rest is cut
SOON_S = 0.2  # between looks at what others have in hand, at most
PAUSE_S = 0.005  # and for each process that has recorded something
REFRESHED_S = 10.0  # how often what others finished is read while there is something to do; more files, less often


class BlockClaims:
    """The leases of this process on the blocks of a stage; a context manager, which gives back what is left in hand.

    A lease is on a shard of blocks. Each process begins at a place of its own; whoever finds no shard that nobody had
    takes half of what another has not begun, so that all end at about the same time. What that costs does not grow with
    the number of processes.

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
        self._shards = Shards.of(ledger.folder, len(task.grid))
        self._earlier = [Shards.of(other, len(task.grid)) for other in _of_earlier_builders(ledger.folder)]
        self._suspect: Block | None = None
        self._failed: dict[int, BlockFailure] = {}
        self._open: list[int] = []  # shards held whose blocks were not all begun
        self._in_hand: dict[int, list[int]] = {}  # blocks that were begun, of each shard held
        self._had: set[int] = set()  # shards that somebody has or had
        self._over: set[int] = set()  # of these, those that are done
        self._place: int | None = None  # among the heads, from where on they were looked at
        self._missed: dict[int, float] = {}  # blocks that are done as their leases say, and not recorded, since when
        self._begun_at_once: int | None = None  # the block that was begun as its shard was taken
        self._refreshed = worker.now()
        self._random = random.Random(worker.mark)

    def __enter__(self) -> BlockClaims:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for start in {*self._open, *self._in_hand}:
            with contextlib.suppress(ConnectomicsError):  # the disk may be gone, and what went wrong is told
                self._worker.release(self._shards.lease(start))

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
        """Let a block go that is in the ledger."""
        self._let_go(self._number(key))
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
        number = self._number(failure.block)
        self._worker.confirm(self._shards.lease(self._shard_of(number)))
        self._failed[number] = failure
        _set_aside(self._ledger.folder, failure)
        told = self._shards.failed(number)
        self._worker.acquire(told)
        self._worker.fail(told, failure.reason)
        self._let_go(number)
        self._refresh()
        in_a_row = self._worker.count(self._shards.failing, self._ledger.finished)
        if in_a_row >= FAILURES_IN_A_ROW and in_a_row < self._ledger.planned:
            raise QuarantineError(f"{in_a_row} blocks in a row failed, the last with: {failure.reason}")

    def failures(self) -> tuple[BlockFailure, ...]:
        """All blocks that failed in this attempt and were not done by anybody."""
        return tuple(f for f in self._failed.values() if not self._ledger.is_done(self._ledger.block(f.block)))

    def _claimed(self) -> Iterator[Block | None]:
        """Blocks of shards that this process holds, each begun, until one is a suspect.

        Waits while others have all that are left. None comes before it waits: others may be waiting for what this
        process has in hand.
        """
        pauses = self._pauses()
        while True:
            while (start := self._shard()) is not None:
                pauses = self._pauses()
                yield from self._begun(start)
                if self._suspect is not None:
                    return
                self._open.remove(start)
                self._close(start)
            if self._is_over():
                return
            yield None
            if not self._open:
                self._worker.sleep(next(pauses))

    def _begun(self, start: int) -> Iterator[Block]:
        """The blocks of a shard that are to be done; ends early where others have the rest."""
        for number in self._ledger.unfinished(start, self._shards.end(start)):
            in_hand = self._in_hand[start]
            if number in self._failed or number in in_hand:
                continue
            if number != self._begun_at_once and not self._worker.begin(self._shards.lease(start), number, in_hand):
                return
            self._begun_at_once = None
            in_hand.append(number)
            block = self._task.grid.numbered(number)
            if self._apart is not None and self._deaths(number) >= MOST_DEATHS:
                self._suspect = block
                return
            yield block
            if self._worker.now() - self._refreshed > max(REFRESHED_S, len(self._ledger.files())):
                self._refresh()

    def _shard(self) -> int | None:
        """A shard that this process holds; None where others have all that are left."""
        if self._open:
            return self._open[-1]
        while (start := self._fresh()) is not None:
            if self._take(start):
                return start
            self._look()  # others are at the same place; what they took meanwhile is known from now on
        return self._part_of_another()

    def _fresh(self) -> int | None:
        """The next shard that nobody had, as far as is known."""
        heads = self._shards.heads
        if self._place is None:
            self._look()
            self._place = self._shards.first_place(self._worker.mark) if self._had else 0
        for number in range(len(heads)):
            start = heads[(self._place + number) % len(heads)]
            if start not in self._had and self._has_work(start):
                self._place = (self._place + number) % len(heads)
                return start
        return None

    def _part_of_another(self) -> int | None:
        """A shard whose holder is gone, or half of what one of some holders has not begun; None where there is none."""
        self._look()
        left = sorted(self._had - self._over - self._in_hand.keys())
        left = [start for start in left if self._has_work(start)]
        best: tuple[int, int, int] | None = None
        for start in self._random.sample(left, min(LOOKED_AT, len(left))):
            if self._take(start):
                return start
            lease = self._worker.look(self._shards.lease(start))
            if lease is None or lease.state != HELD or lease.blocks is None:
                self._over |= {start} if lease is not None and lease.state == DONE else set()
                continue
            at = cut_point(start, lease.blocks)
            if at is not None and next(self._ledger.unfinished(at, lease.blocks.stop), None) is not None:
                best = max(best or (0, 0, 0), (lease.blocks.stop - at, start, at))
        if best is None:
            return None
        _, start, at = best
        blocks = self._worker.cut(self._shards.lease(start), at)
        return at if blocks is not None and self._take(at) else None

    def _take(self, start: int, *, again: bool = False) -> bool:
        """Hold a shard if nobody has it who may be alive."""
        lease, end = self._shards.lease(start), self._shards.end(start)
        first = next((n for n in self._ledger.unfinished(start, end) if n not in self._failed), end)
        anew = Stretch(end, begun=(first,), next=first + 1) if first < end else Stretch(end)
        self._had.add(start)
        if not self._worker.acquire(lease, anew, again=again):
            return False
        self._open.append(start)
        self._in_hand[start] = []
        self._begun_at_once = first if self._worker.held(lease).blocks == anew else None
        if self._worker.held(lease).epoch > 0:  # what its holders before have done, and what failed there
            self._refresh()
            self._look()
        return True

    def _look(self) -> None:
        """Learn which shards somebody has or had, which are done, and what failed."""
        names = self._shards.names(self._worker.store)
        self._had |= names.shards
        self._over |= {start for start, attempt in names.over if attempt == self._worker.attempt}
        for number in names.failed:
            why = None if number in self._failed else self._worker.failure(self._shards.failed(number))
            if why is not None:
                block = self._task.grid.numbered(number)
                self._failed[number] = BlockFailure(block.key, block.core, why, "")

    def _is_over(self) -> bool:
        """Whether all blocks are recorded, or failed, or in hand here; what nobody has in hand is taken."""
        self._refresh()
        mine = {number for numbers in self._in_hand.values() for number in numbers}
        missing = [number for number in self._ledger.unfinished() if number not in self._failed and number not in mine]
        for number in self._random.sample(missing, min(LOOKED_AT, len(missing))):
            start, lease = self._shards.around(number, self._worker.store)
            done = lease is not None and lease.state == DONE
            if start in self._in_hand or (done and not self._is_lost(number)):
                continue
            if self._take(start, again=done):
                break
        return not missing

    def _is_lost(self, number: int) -> bool:
        """Whether a block's record will not be seen, though it was made: it was undone, or is hidden for long."""
        since = self._missed.setdefault(number, self._worker.now())
        return self._ledger.was_undone(number) or self._worker.now() - since > self._worker.limit_s

    def _has_work(self, start: int) -> bool:
        numbers = self._ledger.unfinished(start, self._shards.end(start))
        return any(number not in self._failed for number in numbers)

    def _pauses(self) -> Iterator[float]:
        """Seconds to sleep while others have all that is left: the more they are, the less often each looks."""
        return pauses(self._worker.limit_s, max(SOON_S, PAUSE_S * len(self._ledger.files())))

    def _refresh(self) -> None:
        self._ledger.refresh()
        self._refreshed = self._worker.now()

    def _let_go(self, number: int) -> None:
        start = self._shard_of(number)
        self._in_hand[start].remove(number)
        self._close(start)

    def _close(self, start: int) -> None:
        """Give back a shard of which nothing is left to do."""
        if start in self._open or self._in_hand.get(start):
            return
        self._in_hand.pop(start, None)
        if self._worker.done(self._shards.lease(start)):
            self._worker.store.create(self._shards.over(start, self._worker.attempt), self._worker.mark.encode())
            self._over.add(start)

    def _shard_of(self, number: int) -> int:
        """The shard of a block in hand."""
        return next(start for start, numbers in self._in_hand.items() if number in numbers)

    def _number(self, key: str) -> int:
        return self._task.grid.number(self._ledger.block(key).index)

    def _run_apart(self, block: Block) -> BlockRecord | BlockFailure:
        assert self._apart is not None
        deaths = self._deaths(self._task.grid.number(block.index))
        log.warning(
            "%s, block %s: %d processes ended at it; it gets one of its own", self._task.name, block.key, deaths
        )
        return self._apart(self._ledger.folder, block)

    def _deaths(self, number: int) -> int:
        """How many processes ended with a block in hand; of one that is built for publishing, in earlier epochs too."""
        with contextlib.suppress(LeaseLostError):
            own = self._worker.held(self._shards.lease(self._shard_of(number))).blocks
            deaths = own.deaths.get(number, 0) if own is not None else 0
            for shards in self._earlier:
                _, lease = shards.around(number, self._worker.store)
                if lease is not None and lease.blocks is not None:
                    before = lease.blocks.after_death() if lease.state == HELD else lease.blocks
                    deaths += before.deaths.get(number, 0)
            return deaths
        return 0


def _of_earlier_builders(folder: Path) -> list[Path]:
    """The folders of a stage's ledger that were in the staging folders of others."""
    own = folder.parent
    others = own.parent.glob(f"{STAGING}*") if own.name.startswith(STAGING) else ()
    return [other / folder.name for other in others if other != own]


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
