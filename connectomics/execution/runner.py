"""The blocks of one stage: shared among processes, recorded when they are on disk, set aside when they keep failing.

Every block-wise stage is a ``Task`` with a ledger of its own that goes through ``run_blocks``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.errors import ConnectomicsError, DeviceMemoryError, MissingShardError, StorageError, VolumeError
from connectomics.core.fingerprint import sha256_of_file
from connectomics.core.geometry import Block
from connectomics.execution.append_log import whole_lines
from connectomics.execution.block_claims import QUARANTINE, Apart, BlockClaims
from connectomics.execution.ledger import Ledger, record_of
from connectomics.execution.retry import PAUSES_S, SYSTEMIC, errno_of, retried
from connectomics.execution.task import BlockFailure, BlockRecord, Executor, Task
from connectomics.execution.worker import Worker
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

log = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]
ATTEMPTS = 2  # of a block within one run, beside what is retried within it
SHOWN_FAILURES = 5
FEW_RECORDS = 64  # are all looked at
SAMPLED_BYTES = 1 << 13
CHECKED_BLOCKS = 16  # recorded blocks whose checksums are compared on resume; of all others the files must exist


@dataclass(frozen=True, slots=True)
class BlocksDone:
    """What became of a stage's blocks in this process."""

    planned: int
    skipped: int
    done: int
    windows: int
    failures: tuple[BlockFailure, ...]


RunStage = Callable[[Task, Ledger], BlocksDone]
"""``run_blocks`` with whoever runs blocks here."""


def attempt(task: Task, block: Block, first: Callable[[], BlockRecord] | None = None) -> BlockRecord | BlockFailure:
    """Process a block, a second time when it fails; what fails again is told, not raised.

    ``first`` stands for the first attempt where that has begun already.

    Raises
    ------
    StorageError, VolumeError, DeviceMemoryError
        If the disk is full, read-only, forbidden or gone, or the memory of the device ran out, which no other block
        would survive.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return first() if first is not None and number == 1 else task.process(block)
        except Exception as error:  # noqa: BLE001 - the runner's broad catch: a failure stays with its block
            raise_systemic(error)
            reason = " ".join((str(error) or "out of memory").split())
            if not isinstance(error, ConnectomicsError):
                reason = f"{type(error).__name__}: {reason}"
            failure = BlockFailure(block.key, block.core, reason, traceback.format_exc())
            log.warning("block %s failed, attempt %d of %d: %s", block.key, number, ATTEMPTS, reason)
    return failure


def raise_systemic(error: Exception) -> None:
    """Raise an error that every other block would meet too: as it is for an input, else as a ``StorageError``.

    So is a shard that is missing where it was recorded: its block is to be done again first.
    """
    if isinstance(error, StorageError | DeviceMemoryError | MissingShardError):
        raise error
    if errno_of(error) in SYSTEMIC:
        if isinstance(error, VolumeError):
            raise error
        raise StorageError(f"{' '.join(str(error).split())} Stopped; mend that and run again.") from error


def write_block(store: Store, block: Block, array: Array, pauses_s: tuple[float, ...] = PAUSES_S) -> tuple[str, str]:
    """Write a block's shard (c, z, y, x) and read it back; its path in the work folder and its sha256.

    Raises OutputError or VolumeError if the storage refuses, also after waiting.
    """

    def written() -> str:
        store.write(block.core, array)
        return store.checksum(block.core)

    shard = store.shard_path(block.core)
    checksum = retried(written, f"writing block {block.key} of {store.path}", pauses_s)
    return shard.relative_to(store.path.parent).as_posix(), checksum


def run_blocks(
    task: Task,
    ledger: Ledger,
    executor: Executor,
    worker: Worker,
    on_block: OnBlock,
    apart: Apart | None = None,
) -> BlocksDone:
    """Bring every block of a task into its ledger, together with whichever other processes do the same.

    Parameters
    ----------
    task, ledger
        The stage and its record, which are of one grid.
    executor
        Runs the blocks.
    worker
        This process among the others.
    on_block
        Called with (finished, planned) blocks at the start and whenever a block is finished here.
    apart
        Runs a block that may have killed processes in one of its own; None where that cannot be had.

    Returns
    -------
    done
        With the blocks that failed, here or in another process of this attempt; the tracebacks are in the ledger's
        folder, quarantine/KEY.txt.

    Raises
    ------
    StorageError, DeviceMemoryError
        If the disk refuses, or the device's memory ran out; finished blocks are kept.
    QuarantineError
        If one block after the other fails.
    """
    planned, before = ledger.planned, ledger.finished
    on_block(before, planned)
    log.info("%s: %d blocks planned, %d finished before", task.name, planned, before)
    ledger.sign(worker.signature)
    done = windows = 0
    with BlockClaims(task, ledger, worker, apart) as claims, contextlib.closing(claims.results(executor)) as results:
        for result in results:
            if isinstance(result, BlockFailure):
                claims.fail(result)
            else:
                ledger.append(result)
                done, windows = done + 1, windows + result.windows
                log.info("%s, block %s: %d windows, %.2f s", task.name, result.block, result.windows, result.seconds)
                on_block(ledger.finished, planned)
                claims.finish(result.block)
    if ledger.finished > before + done:
        on_block(ledger.finished, planned)
    return BlocksDone(planned, ledger.finished - done, done, windows, failures=claims.failures())


def failure_message(failures: tuple[BlockFailure, ...], planned: int, folder: Path) -> str:
    """One sentence about quarantined blocks: which, where, why, and where their tracebacks are."""
    shown = "; ".join(f"{f.block}, voxels {f.box.start} to {f.box.stop}: {f.reason}" for f in failures[:SHOWN_FAILURES])
    more = f"; and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
    return (
        f"{len(failures)} of {planned} blocks failed and are quarantined ({shown}{more}); their tracebacks are in "
        f"{folder / QUARANTINE}, all other blocks are finished, and running again tries these once more"
    )


def void_lost(ledger: Ledger, work: Path, stores: Collection[str]) -> int:
    """Undo records whose files are not there or, for a sample, differ from their checksum; how many were undone.

    Only the folders of ``work`` that are named in ``stores`` are looked at; others may have become final outputs.
    """
    stride = max(1, ledger.finished // CHECKED_BLOCKS)
    lost = 0
    for i, (name, record) in enumerate(ledger.named_records()):
        if not is_kept(work, record, stores, compared=i % stride == 0):
            ledger.void(name, record.block)
            lost += 1
    if lost:
        log.warning("%d recorded blocks are missing or damaged on disk and are computed again", lost)
    return lost


def void_lost_if_any(ledger: Ledger, work: Path, stores: Collection[str]) -> int:
    """As ``void_lost``, where a sample gives reason to, or there are few records: who joins looks at no more.

    What is missing all the same is found by whoever reads it.
    """
    few = ledger.finished <= FEW_RECORDS
    if few or not all(is_kept(work, record, stores, compared=True) for record in _some_records(ledger)):
        return void_lost(ledger, work, stores)
    return 0


def _some_records(ledger: Ledger) -> Iterator[BlockRecord]:
    """Records from anywhere in some of the workers' files."""
    files = [ledger.folder / file.name for file in ledger.files()]
    for path in random.sample(files, min(CHECKED_BLOCKS, len(files))):
        lines = whole_lines(path, random.randrange(max(1, path.stat().st_size - SAMPLED_BYTES)))
        for line, _ in itertools.islice(lines, 1, 1 + CHECKED_BLOCKS // len(files) + 1):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a record that is damaged or voids another
                yield record_of(json.loads(line))


def is_kept(work: Path, record: BlockRecord, stores: Collection[str], *, compared: bool) -> bool:
    """Whether the files that a record names in ``stores`` are there and, if ``compared``, have their sha256."""
    looked_at = {name: name.partition("/")[0] for name in record.checksums}
    if looked_at and not set(stores) <= set(looked_at.values()):
        return False  # it was recorded when another output was finished already
    for name, store in looked_at.items():
        if store not in stores:
            continue
        try:
            if not (work / name).exists() or (compared and sha256_of_file(work / name) != record.checksums[name]):
                return False
        except OSError as error:
            raise_systemic(error)
            return False
    return True
