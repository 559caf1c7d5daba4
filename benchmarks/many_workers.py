"""Many workers share the blocks of one stage: how much of their time is work, and what a block costs to claim.

Each worker is a process whose blocks sleep, so that hundreds fit on a small machine; the time they take to start does
not count. Prints a table: ``python benchmarks/many_workers.py [--workers 8 64] [--blocks 60] [--delay-ms 0 2]``.
With ``--least`` and ``--most-growth`` it exits with 1 where the figures are worse.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from connectomics.core.geometry import Block, BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.coordination import DiskStore, Version
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import run_blocks
from connectomics.execution.task import BlockRecord
from connectomics.execution.worker import Worker

PLAN = BlockPlan((1, 1, 1), (1, 1, 1))
READY_S = 2.0  # from when all are ready to the beginning


class CountedStore(DiskStore):
    """Records on a disk whose operations are counted, each of which takes longer."""

    def __init__(self, folder: Path, delay_s: float) -> None:
        super().__init__(folder)
        self._delay_s = delay_s
        self.operations = Counter[str]()

    def _count(self, verb: str) -> None:
        self.operations[verb] += 1
        time.sleep(self._delay_s)

    def create(self, name: str, content: bytes) -> Version | None:
        self._count("create")
        return super().create(name, content)

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        self._count("replace")
        return super().replace(name, seen, content)

    def read(self, name: str) -> Version | None:
        self._count("read")
        return super().read(name)

    def list(self, prefix: str) -> list[str]:
        self._count("list")
        return super().list(prefix)


@dataclass(frozen=True, slots=True)
class Sleep:
    """A task whose blocks take so many seconds."""

    blocks: int
    seconds: float
    name: str = "sleep"

    @property
    def grid(self) -> BlockGrid:
        """Blocks in a row."""
        return BlockGrid((self.blocks, 1, 1), (1, 1, 1))

    def process(self, block: Block) -> BlockRecord:
        """Sleep."""
        time.sleep(self.seconds)
        return BlockRecord(block.key, {}, 0, self.seconds)


def _worker(folder: Path, task: Sleep, delay_s: float, pipe: Connection) -> None:
    """Join, say so, work from the moment that is told, and tell when it ended and what it did."""
    opened = Counter[str]()
    store = CountedStore(folder / "coordination", delay_s)
    with (
        Worker(store) as worker,
        closing(Ledger(folder / "ledger_sleep", "key", {}, PLAN, (task.blocks, 1, 1))) as ledger,
    ):
        pipe.send("ready")
        begin = pipe.recv()
        time.sleep(max(0.0, begin - time.monotonic()))
        store.operations.clear()
        sys.addaudithook(_counting(opened))
        before = time.process_time()
        done = run_blocks(task, ledger, SerialExecutor(), worker, lambda finished, planned: None)
        ended, cpu_s, operations, files = (
            time.monotonic(),
            time.process_time() - before,
            store.operations.total(),
            opened.total(),
        )
    pipe.send((ended - begin, done.done, operations, files, cpu_s))


def _counting(opened: Counter[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened[event] += 1

    return hook


def measure(workers: int, blocks: int, seconds: float, delay_s: float) -> dict[str, float]:
    """Let so many workers do ``blocks`` blocks of ``seconds`` for each of them."""
    context, task = multiprocessing.get_context("fork"), Sleep(workers * blocks, seconds)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "coordination").mkdir()
        pipes, processes = [], []
        for _ in range(workers):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=_worker, args=(folder, task, delay_s, theirs)))
            processes[-1].start()
            pipes.append(mine)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        begin = time.monotonic() + READY_S
        for pipe in pipes:
            pipe.send(begin)
        told = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    total = sum(done for _, done, _, _, _ in told)
    assert total >= task.blocks, "a block was not done"
    took_s = max(ended for ended, _, _, _, _ in told)
    return {
        "workers": workers,
        "store delay, ms": 1000 * delay_s,
        "efficiency": round(blocks * seconds / took_s, 3),
        "store operations a block": round(sum(operations for _, _, operations, _, _ in told) / task.blocks, 2),
        "files opened a block": round(sum(files for _, _, _, files, _ in told) / task.blocks, 2),
        "CPU ms a block": round(1000 * sum(cpu_s for _, _, _, _, cpu_s in told) / task.blocks, 2),
        "blocks done twice": total - task.blocks,
    }


def main() -> int:
    """Measure and print; 1 where a figure is worse than it may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--blocks", type=int, default=60, help="for each worker")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0, 2.0], help="added to each store operation")
    parser.add_argument("--least", type=float, help="smallest efficiency")
    parser.add_argument("--most-growth", type=float, help="of the operations a block, largest over fewest workers")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    words = parser.parse_args()
    rows = [
        measure(workers, words.blocks, words.seconds, delay / 1000)
        for delay in words.delay_ms
        for workers in words.workers
    ]
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{value:g}" for value in row.values()) + " |")
    if words.json:
        words.json.write_text(json.dumps(rows))
    wrong = [row for row in rows if words.least is not None and row["efficiency"] < words.least]
    for delay in words.delay_ms:
        counted = [row["store operations a block"] for row in rows if row["store delay, ms"] == delay]
        if words.most_growth is not None and counted[-1] > words.most_growth * counted[0]:
            wrong.append({"delay, ms": delay, "operations grow": counted[-1] / counted[0]})
    for each in wrong:
        print(f"worse than it may be: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
