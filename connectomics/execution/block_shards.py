"""How the blocks of a stage are cut into shards, which processes lease: names, ends, and where one may be cut.

A shard is ``size`` consecutive blocks in raster order, or what was cut from one: always such that its end follows from
its first block, so that a shard is found again that a process cut off and died before it had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from connectomics.execution.coordination import CoordinationStore
from connectomics.execution.lease import Lease, Stretch, lease_of
from connectomics.execution.publishing import STAGING
from connectomics.execution.run_folder import stage_of

SHARDS = 256  # at the beginning, at least, where there are so many blocks
MOST_BLOCKS = 1024  # of a shard
FAILED_BLOCK = "failed-"
OVER = "-over-"
FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Names:
    """What the records of a stage tell by their names alone: shards, those done in an attempt, blocks that failed."""

    shards: frozenset[int]
    over: frozenset[tuple[int, int]]
    failed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of a stage.

    Parameters
    ----------
    prefix
        Begins the names of its records.
    blocks
        How many there are.
    """

    prefix: str
    blocks: int

    @classmethod
    def of(cls, folder: Path, blocks: int) -> Shards:
        """Those of the stage whose ledger is in a folder.

        Who builds in a staging folder has leases of its own there: an earlier builder who wakes up takes none of them.
        """
        epoch = f"{folder.parent.name}." if folder.parent.name.startswith(STAGING) else ""
        return cls(f"{epoch}{stage_of(folder)}.blocks-", blocks)

    @property
    def size(self) -> int:
        """Blocks of a shard that was not cut, a power of two.

        Examples
        --------
        >>> [Shards("", blocks).size for blocks in (1, 511, 512, 3840, 20_000, 10**6)]
        [1, 1, 2, 8, 64, 1024]
        """
        return int(min(MOST_BLOCKS, 1 << max(0, (self.blocks // SHARDS).bit_length() - 1)))

    @property
    def heads(self) -> range:
        """First blocks of the shards that there are before any is cut."""
        return range(0, self.blocks, self.size)

    def lease(self, start: int) -> str:
        """Name of the lease on the shard that begins with a block."""
        return f"{self.prefix}{start}"

    def over(self, start: int, attempt: int) -> str:
        """Name of the record that a shard is done in an attempt."""
        return f"{self.prefix}{start}{OVER}{attempt}"

    @property
    def failed_prefix(self) -> str:
        """Begins the names of the records that blocks failed."""
        return self.prefix + FAILED_BLOCK

    def failed(self, number: int) -> str:
        """Name of the record that a block failed."""
        return f"{self.failed_prefix}{number}"

    @property
    def failing(self) -> str:
        """Name of the record that counts failures in a row."""
        return f"{self.prefix}{FAILING}"

    def end(self, start: int) -> int:
        """Behind the last block of a shard that was not cut further.

        Examples
        --------
        >>> shards = Shards("", 3840)
        >>> [shards.end(start) for start in (0, 8, 4, 6, 7, 3832)]
        [8, 16, 8, 8, 8, 3840]
        """
        whole = self.size if start % self.size == 0 else start & -start
        return min(start + whole, self.blocks)

    def first_place(self, mark: str) -> int:
        """Where among the heads a process begins to look."""
        return int.from_bytes(sha256(mark.encode()).digest()[:8]) % len(self.heads)

    def names(self, store: CoordinationStore) -> Names:
        """What the names of all records tell."""
        shards, over, failed = set[int](), set[tuple[int, int]](), set[int]()
        for name in store.list(self.prefix):
            rest = name.removeprefix(self.prefix)
            start, done, attempt = rest.partition(OVER)
            if done:
                over.add((int(start), int(attempt)))
            elif rest.isdecimal():
                shards.add(int(rest))
            elif rest.startswith(FAILED_BLOCK):
                failed.add(int(rest.removeprefix(FAILED_BLOCK)))
        return Names(frozenset(shards), frozenset(over), frozenset(failed))

    def around(self, number: int, store: CoordinationStore) -> tuple[int, Lease | None]:
        """First block of the shard that a block is in by now, and its lease; None where nobody ever had it."""
        start = number - number % self.size
        while True:
            seen = store.read(self.lease(start))
            lease = None if seen is None else lease_of(seen)
            stop = self.end(start) if lease is None or lease.blocks is None else lease.blocks.stop
            if number < stop:
                return start, lease
            start = stop


def cut_point(start: int, blocks: Stretch) -> int | None:
    """Where a shard that begins with ``start`` is best cut in two; None where nothing can be had of it.

    The part from there on is about half of what was not begun, and none of its blocks ever ended a process.

    Examples
    --------
    >>> [cut_point(0, Stretch(8, next=next)) for next in range(9)]
    [4, 4, 4, 4, 4, 6, 6, 7, None]
    >>> cut_point(0, Stretch(8, next=1, deaths={4: 1}))
    6
    """
    low = max([start + 1, blocks.next, *(number + 1 for number in blocks.deaths)])
    if low >= blocks.stop:
        return None
    at = blocks.stop - 1
    while at & (at - 1) >= low:
        at &= at - 1
    return at
