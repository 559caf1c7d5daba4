"""Linking of sections against connected components of the same volume, in one run; the links of 10^7 overlapping pairs.

    python benchmarks/linking.py [--quick] [--folder FOLDER]

Both read one store of the phantom's mitochondria, tiled, as a mask, and write the same kind of store, by blocks with
ledgers, each in a process of its own, one after the other in --rounds; the best counts.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from decode import PLAN, Spent, measured, phantom_mask, tiled

from connectomics.core.geometry import BlockGrid, Vec3
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import COORDINATION, SINGLE_WRITER
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.task import Task
from connectomics.execution.worker import Worker
from connectomics.objects.arrays import save
from connectomics.objects.links import Linking, Sections, link
from connectomics.objects.mapped_tables import table
from connectomics.objects.merge import IDS, OBJECTS, OFFSETS
from connectomics.objects.overlaps import COLUMNS, OVERLAP, summed
from connectomics.objects.pieces import PIECE
from connectomics.objects.table import MeasurementUnits
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.stages.decode.context import DecodingState, StepContext
from connectomics.stages.decode.slice_linking import SliceLinking
from connectomics.stages.decode.step_contract import DecodingStep
from connectomics.volumes.store import open_store

STEPS: dict[str, DecodingStep] = {
    "26-connected": ConnectedComponents(),
    "linked": SliceLinking(),
    "linked over gaps of 2": SliceLinking(max_gap=2),
}
SECTIONS = 64


def by_blocks(source_path: Path, work: Path, name: str) -> None:
    """One step on a store."""
    source = open_store(source_path)
    grid = BlockGrid(source.info.extent, PLAN.block_shape)
    with Worker.of(work / COORDINATION) as worker:

        def run(task: Task, ledger: Ledger) -> BlocksDone:
            return run_blocks(task, ledger, SerialExecutor(), worker, lambda done, planned: None)

        context = StepContext(work, "step", PLAN, grid, "0" * 64, run, functools.partial(worker.alone, SINGLE_WRITER))
        STEPS[name].run(DecodingState(source, MeasurementUnits()), context)


def compare(shape: Vec3, rounds: int, folder: Path) -> None:
    """Print the time of each step as a ratio to connected components."""
    source = tiled(phantom_mask(), shape, folder / "mask.zarr")
    spent: dict[str, list[Spent]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, found in spent.items():
            found.append(measured(by_blocks, source.path, folder / "work", name))
            shutil.rmtree(folder / "work")
    best = {name: min(found, key=lambda each: each.seconds) for name, found in spent.items()}
    base = best["26-connected"]
    for name, each in best.items():
        print(
            f"{name:22} {np.prod(shape) / 1e9:.3f} gigavoxel: {each.seconds:.1f} s, x{each.seconds / base.seconds:.2f} "
            f"(processor time x{each.processor_s / base.processor_s:.2f}), peak {each.peak_mb:.0f} MB",
            flush=True,
        )


def many_pairs(pairs: int, folder: Path) -> None:
    """Two pairs for each object of one section with random objects of the next."""
    each, generator = pairs // 2 // (SECTIONS - 1), np.random.default_rng(0)
    count = each * SECTIONS
    rows, ids = table(folder / OBJECTS, count, PIECE), table(folder / IDS, count, np.uint64)
    for z in range(SECTIONS):
        part = slice(z * each, (z + 1) * each)
        rows["first"][part] = z * 2**40 + np.arange(each)
        rows["voxels"][part], rows["value"][part], ids[part] = 4, 1, 1 + np.arange(part.start, part.stop)
        rows["start"][part, 0], rows["stop"][part, 0] = z, z + 1
        found = np.zeros(0 if z == SECTIONS - 1 else 2 * each, OVERLAP)
        found["here"] = part.start + np.arange(len(found)) // 2
        found["there"] = part.stop + generator.integers(0, each, len(found))
        found["voxels"] = 2
        rows_of = summed(found)
        save(folder / f"{z}.members", **{name: rows_of[name] for name in COLUMNS})
    np.save(folder / OFFSETS, np.arange(SECTIONS + 1) * each)
    rows.flush()
    spent = measured(link_pairs, folder, count)
    print(f"links of {pairs:,} pairs of {count:,} objects: {spent.seconds:.1f} s, {spent.peak_mb:.0f} MB")


def link_pairs(folder: Path, count: int) -> None:
    """The linking alone."""
    (folder / "linked").mkdir()
    sections = Sections(
        folder, count, lambda rows: rows["value"], SECTIONS, lambda z: folder / f"{z}.members", SECTIONS
    )
    link(sections, Linking(), folder / "linked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the volume, a tenth of the pairs, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the stores go; default: the temporary folder")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        compare((256, 512, 512) if words.quick else (512, 1024, 1024), 1 if words.quick else words.rounds, Path(name))
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        many_pairs(10**6 if words.quick else 10**7, Path(name))


if __name__ == "__main__":
    main()
