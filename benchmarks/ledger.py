"""Seconds and memory for opening a ledger of a million finished blocks, beside Python's own JSON in a loop.

Prints what docs/recovery.md says of it: ``python benchmarks/ledger.py [--blocks N] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.ledger import Ledger
from connectomics.execution.task import BlockRecord

PLAN = BlockPlan((1, 64, 64), (1, 64, 64))
WORKERS = 8  # files that the records are spread over


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10**6)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "ledger", words.blocks)
    print("\n".join(f"{name:28} {value}" for name, value in figures.items()))
    if words.json:
        words.json.write_text(json.dumps(figures))


def measure(folder: Path, blocks: int) -> dict[str, float]:
    """Write a ledger of so many blocks and read it in every way that a run does."""
    volume = (blocks, 64, 64)
    Ledger(folder, "key", {"threads": 1}, PLAN, volume).close()
    for worker in range(WORKERS):
        with (folder / f"{worker}.jsonl").open("w") as stream:
            stream.write('{"numeric_class": {"threads": 1}}\n')
            for i in range(worker, blocks, WORKERS):
                record = BlockRecord(f"{i}-0-0", {f"labels.zarr/0/c/{i}/0/0": f"{i:064x}"}, 16, 1.5)
                stream.write(json.dumps(asdict(record) | {"at": 0}) + "\n")
    began = time.perf_counter()
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as lines:
            for line in lines:
                json.loads(line)
    json_s = time.perf_counter() - began
    before = peak_bytes()
    began = time.perf_counter()
    ledger = Ledger(folder, "key", {"threads": 1}, PLAN, volume)
    open_s = time.perf_counter() - began
    assert ledger.finished == blocks
    began = time.perf_counter()
    assert sum(1 for _ in ledger.records()) == blocks
    records_s = time.perf_counter() - began
    began = time.perf_counter()
    joined = Ledger(folder, "key", {"threads": 1}, PLAN, volume)
    join_s = time.perf_counter() - began
    assert joined.finished == blocks
    began = time.perf_counter()
    ledger.refresh()
    assert next(ledger.unfinished(), None) is None
    return {
        "blocks": blocks,
        "open_s": round(open_s, 2),
        "join_s": round(join_s, 3),
        "stream_records_s": round(records_s, 2),
        "refresh_s": round(time.perf_counter() - began, 4),
        "json_alone_s": round(json_s, 2),
        "open_over_json": round(open_s / json_s, 2),
        "memory_grown_mb": round((peak_bytes() - before) / 1e6, 1),
    }


def peak_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
