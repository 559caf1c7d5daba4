"""Out-of-core labelling against cc3d on the whole volume and dask-image, in one run; the merge of 10^7 face pairs.

    python benchmarks/decode.py [--quick] [--json FILE] [--folder FOLDER]

Both sides read the same Zarr store and write the same kind of store; every side is a process of its own, so that its
peak memory is its own, and the best of --rounds counts. "Real" is the shared dense segmentation, tiled; "mask" is
the phantom's ground truth, tiled, as a mask. Labels are compared voxel by voxel.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import COORDINATION, SINGLE_WRITER
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.task import Task
from connectomics.execution.worker import Worker
from connectomics.objects.arrays import save
from connectomics.objects.components import Connectivity
from connectomics.objects.numbering.cuts import BlockFiles
from connectomics.objects.numbering.tables import merge
from connectomics.objects.pieces import Pieces, nothing
from connectomics.objects.selection import Selection
from connectomics.stages.decode.context import StepContext
from connectomics.stages.decode.tasks import BlockPieces, smallest_dtype
from connectomics.stages.decode.values import Values
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import Store, create_store, open_store
from connectomics.volumes.volume import VolumeInfo

BLOCK: Vec3 = (256, 256, 256)
CHUNK: Vec3 = (64, 64, 64)
PLAN = BlockPlan(BLOCK, CHUNK)
NAME = "labelled"
SPAWN = multiprocessing.get_context("spawn")  # TensorStore's threads do not survive a fork


@dataclass(frozen=True, slots=True)
class Spent:
    """Wall and processor seconds, and peak memory above what importing takes."""

    seconds: float
    processor_s: float
    peak_mb: float


def repository_data() -> Path:
    stated = os.environ.get("CONNECTOMICS_SHARED_DATA")
    return Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"


def real_labels() -> Any:
    """The shared segmentation of neurons (z, y, x), 512 voxels each way."""
    import crackle

    packed = repository_data() / "em" / "labels" / "cc3d_connectomics" / "connectomics.npy.ckl.gz"
    return np.ascontiguousarray(crackle.decompress(gzip.decompress(packed.read_bytes())).T)


def phantom_mask() -> Any:
    """The phantom's mitochondria as a mask (z, y, x), 256 voxels each way."""
    reader = open_volume("phantom:256x256x256?seed=3&what=label")
    return (reader.read(Box.of_shape((256, 256, 256)))[0] > 0).astype(np.uint8)


def tiled(tile: Any, shape: Vec3, path: Path) -> Store:
    """A store filled with a tile over and over."""
    store = create_store(path, VolumeInfo((1, *shape), tile.dtype, CHUNK), shard_shape=BLOCK, attributes={})
    for block in BlockGrid(shape, BLOCK):
        at = [np.arange(a, b) % n for a, b, n in zip(block.core.start, block.core.stop, tile.shape, strict=True)]
        store.write(block.core, np.ascontiguousarray(tile[np.ix_(*at)])[None])
    return store


def target(source: Store, path: Path, dtype: Any) -> Store:
    info = VolumeInfo(source.info.shape, np.dtype(dtype), CHUNK)
    return open_store(path) if path.exists() else create_store(path, info, shard_shape=BLOCK, attributes={})


def in_memory(source_path: Path, folder: Path, connectivity: int) -> None:
    """What one would write without blocks: read all, cc3d, write all."""
    source = open_store(source_path)
    whole = source.read(Box.of_shape(source.info.extent))[0]
    found = cc3d.connected_components(whole, connectivity=connectivity, out_dtype=np.uint32)
    store = target(source, folder / "memory.zarr", np.uint32)
    for block in BlockGrid(source.info.extent, BLOCK):
        store.write(block.core, found[None][(slice(None), *block.core.slices)])


def labelled(source: Store, work: Path, plan: BlockPlan, connectivity: int) -> int:
    """The program's own way, with ledgers, beside whichever other processes do the same; how many objects."""
    grid = BlockGrid(source.info.extent, plan.block_shape)
    with Worker.of(work / COORDINATION) as worker:

        def run(task: Task, ledger: Ledger) -> BlocksDone:
            return run_blocks(task, ledger, SerialExecutor(), worker, lambda done, planned: None)

        context = StepContext(work, NAME, plan, grid, "0" * 64, run, functools.partial(worker.alone, SINGLE_WRITER))
        pieces = context.pieces(BlockPieces(Values(source), Connectivity(connectivity)))
        tables, count, largest = context.objects(pieces, Selection(), joined=True)
        context.paint(pieces, tables, source.info, smallest_dtype(largest))
    return count


def by_blocks(source_path: Path, folder: Path, connectivity: int) -> None:
    """In one process."""
    labelled(open_store(source_path), folder / "work", PLAN, connectivity)


def share(source_path: Path, folder: Path, connectivity: int, gate: Any) -> None:
    """One of two processes."""
    source = open_store(source_path)
    gate.wait()
    labelled(source, folder / "work", PLAN, connectivity)
    gate.wait()


def two_processes(source_path: Path, folder: Path, connectivity: int) -> Spent:
    """The same, shared by two processes."""
    gate = SPAWN.Barrier(3)
    workers = [SPAWN.Process(target=share, args=(source_path, folder, connectivity, gate)) for _ in range(2)]
    for worker in workers:
        worker.start()
    gate.wait()
    began = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")
    return Spent(seconds, math.nan, math.nan)


def measured(job: Callable[..., None], *arguments: Any) -> Spent:
    """What a job takes in a process of its own."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_measure, args=(sender, job, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{job.__name__} failed")
    found: Spent = receiver.recv()
    return found


def peak_mb() -> float:
    """Largest resident memory of this program so far; ``getrusage`` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _measure(sender: Any, job: Callable[..., None], *arguments: Any) -> None:
    own = peak_mb()
    began, processor = time.perf_counter(), time.process_time()
    job(*arguments)
    seconds, busy = time.perf_counter() - began, time.process_time() - processor
    sender.send(Spent(seconds, busy, peak_mb() - own))


def same(a: Store, b: Store) -> bool:
    """Whether two stores hold the same voxels."""
    return all(np.array_equal(a.read(block.core), b.read(block.core)) for block in BlockGrid(a.info.extent, BLOCK))


def labelling(name: str, source: Store, folder: Path, connectivity: int, rounds: int) -> dict[str, Any]:
    """Times, ratios and peak memory of one volume."""
    spent: dict[str, list[Spent]] = {}
    for _ in range(rounds):
        for job in (in_memory, by_blocks, two_processes):
            place = folder / job.__name__
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            found = job(source.path, place, connectivity) if job is two_processes else None
            spent.setdefault(job.__name__, []).append(found or measured(job, source.path, place, connectivity))
    best = {job: min(times, key=lambda t: t.seconds) for job, times in spent.items()}
    expected = open_store(folder / "in_memory" / "memory.zarr")
    equal = all(same(expected, open_store(folder / job / "work" / f"{NAME}.zarr")) for job in list(best)[1:])
    voxels = math.prod(source.info.extent)
    memory, blocks, two = best.values()
    ratio, shared, busy = (
        blocks.seconds / memory.seconds,
        two.seconds / memory.seconds,
        blocks.processor_s / memory.processor_s,
    )
    part = blocks.peak_mb / (voxels * 4 / 2**20)
    print(
        f"{name:5} {voxels / 1e9:.3f} gigavoxel, connectivity {connectivity:2}: cc3d in memory {memory.seconds:.1f} s "
        f"({memory.peak_mb:.0f} MB); by blocks x{ratio:.2f} (processor time x{busy:.2f}), two processes x{shared:.2f}; "
        f"peak {blocks.peak_mb:.0f} MB, {100 * part:.1f} % of the ids; equal: {equal}",
        flush=True,
    )
    return {
        "volume": name,
        "shape": list(source.info.extent),
        "connectivity": connectivity,
        "seconds": {job: round(each.seconds, 2) for job, each in best.items()},
        "one_process_ratio": round(ratio, 3),
        "processor_time_ratio": round(busy, 3),
        "two_processes_ratio": round(shared, 3),
        "peak_mb": {"in_memory": round(memory.peak_mb), "by_blocks": round(blocks.peak_mb)},
        "share_of_volume": round(part, 4),
        "equal": equal,
    }


def against_dask(source: Store, folder: Path) -> dict[str, Any]:
    """The same small mask and blocks with dask-image, which is 6-connected; it gets them in memory."""
    import dask.array
    from dask_image.ndmeasure import label

    whole = source.read(Box.of_shape(source.info.extent))[0]
    began = time.perf_counter()
    numbered, _ = label(dask.array.from_array(whole, chunks=(64, 64, 64)))
    found = numbered.compute(scheduler="synchronous")
    theirs = time.perf_counter() - began
    place = folder / "against_dask"
    place.mkdir(parents=True)
    grid = BlockGrid(vec3(whole.shape), (64, 64, 64))
    small = create_store(place / "s.zarr", source.info, shard_shape=(64, 64, 64), attributes={})
    for block in grid:
        small.write(block.core, whole[None][(slice(None), *block.core.slices)])
    began = time.perf_counter()
    count = labelled(small, place / "work", BlockPlan((64, 64, 64), (64, 64, 64)), 6)
    ours = time.perf_counter() - began
    result = {"voxels": whole.size, "dask_image_s": round(theirs, 2), "ours_s": round(ours, 3), "objects": count}
    result["times_faster"] = round(theirs / ours, 1)
    print(
        f"dask-image, {whole.size / 1e6:.1f} megavoxel in blocks of 64: {theirs:.1f} s, ours {ours:.2f} s with reading "
        f"and writing: x{theirs / ours:.0f} faster; {int(found.max())} and {count} objects"
    )
    return result


def many_pairs(pairs: int, folder: Path) -> dict[str, Any]:
    """A chain of blocks with random pairs between neighbours, as many as stated."""
    blocks, generator = 64, np.random.default_rng(0)
    nodes = pairs // blocks
    place = folder / "pairs"
    place.mkdir()
    for block in range(blocks):
        rows = nothing(nodes)
        rows["first"] = block * 2**40 + np.arange(nodes)
        rows["voxels"], rows["value"] = 1, 1
        joints = np.arange(1, nodes + 1, dtype=np.uint32)
        pieces = Pieces(rows, np.zeros(0, np.uint8), np.zeros(0, np.uint8), joints, {})
        save(place / f"p{block}.members", **pieces.arrays())
        last = block == blocks - 1
        count = 0 if last else pairs // (blocks - 1)
        here, there = generator.integers(0, nodes, (2, count))
        save(place / f"j{block}.members", here=here, there=there, other=np.full(count, block + 1))
    spent = measured(merge_pairs, place, blocks)
    total = pairs // (blocks - 1) * (blocks - 1)
    print(f"merge of {total:,} face pairs of {nodes * blocks:,} pieces: {spent.seconds:.1f} s, {spent.peak_mb:.0f} MB")
    return {"pairs": total, "seconds": round(spent.seconds, 1), "peak_mb": round(spent.peak_mb)}


def merge_pairs(place: Path, blocks: int) -> None:
    """The merge alone."""
    tables = place / "tables"
    tables.mkdir()
    files = ([place / f"{kind}{i}.members" for i in range(blocks)] for kind in "pj")
    merge(BlockFiles(*files).cuts(), tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the volume, a tenth of the pairs, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the stores go; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    words = parser.parse_args()
    shape: Vec3 = (512, 512, 512) if words.quick else (1024, 1024, 1024)
    rounds = 1 if words.quick else words.rounds
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        folder = Path(name)
        mask = tiled(phantom_mask(), shape, folder / "mask.zarr")
        results: dict[str, Any] = {"cpus": os.cpu_count(), "labelling": [labelling("mask", mask, folder, 26, rounds)]}
        if repository_data().is_dir():
            real = tiled(real_labels(), shape, folder / "real.zarr")
            results["labelling"] += [labelling("real", real, folder, n, rounds) for n in (26, 6)]
        small = tiled(phantom_mask(), (256, 256, 256), folder / "small.zarr")
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as memory:
            results["dask_image"] = against_dask(small, Path(memory))  # which works in memory
        results["merge"] = many_pairs(10**6 if words.quick else 10**7, folder)
    if words.json:
        words.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
