"""From labels or probabilities to objects: steps one after the other, then the final volume and its table.

``lightning.decode`` calls ``run_decode`` for each volume. A step is a frozen value with a name and a ``run`` from one
scene to the next; whatever it leaves on disk is whole or absent, so that a rerun continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from connectomics.decode.objects import Frame, write_table
from connectomics.fingerprint import key_of
from connectomics.geometry import BlockGrid, Box, vec3
from connectomics.io.atomic import discard, write_text
from connectomics.io.store import Store
from connectomics.io.volume import VolumeReader
from connectomics.pipeline.contracts import Executor, RunReport
from connectomics.pipeline.finish import Output, export_output
from connectomics.pipeline.pieces import Read
from connectomics.pipeline.planning import BlockPlan
from connectomics.pipeline.workshop import OnBlock, Scene, Step, Workshop


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One volume and what is wanted of it.

    Parameters
    ----------
    run_folder
        RUN.
    volume
        Labels, ids or probabilities.
    steps
        In order.
    output
        The final volume.
    table
        Final name of the table of objects, or None.
    plan
        How the volume is cut.
    program
        Name and version, part of the run key.
    provenance
        What is stamped on the output.
    probabilities, probability_units
        Probabilities (z, y, x) of a box for the table, and how they are summed; None without.
    """

    run_folder: Path
    volume: VolumeReader
    steps: tuple[Step, ...]
    output: Output
    table: Path | None
    plan: BlockPlan
    program: str
    provenance: Mapping[str, object]
    probabilities: Read | None = None
    probability_units: tuple[float, float] | None = None

    @property
    def work(self) -> Path:
        """Folder of unfinished work."""
        return self.run_folder / key_of({self.output.name: self.output.result_key, "program": self.program})[:16]


def run_decode(job: DecodeJob, folder: Path, executor: Executor, on_block: OnBlock) -> RunReport:
    """Bring one volume to its objects, continuing whatever an earlier run of the same result left.

    Parameters
    ----------
    job
        The volume.
    folder
        Where final outputs go.
    executor
        Runs the blocks.
    on_block
        Called with (finished, planned) blocks of each task.

    Raises
    ------
    ConnectomicsError
        If it cannot be finished; finished blocks are kept and a rerun continues.
    """
    began = time.perf_counter()
    plan = _kept_plan(job)
    grid = BlockGrid(job.volume.info.extent, plan.block_shape)
    run_key = key_of({"result": job.output.result_key, "grid": list(grid.block_shape), "program": job.program})
    info = job.volume.info
    scene = Scene(job.volume, Frame(info.voxel_size_nm, info.origin_nm, job.probability_units), job.probabilities)
    for number, step in enumerate(job.steps, 1):
        shop = Workshop(job.work / f"{number}_{step.name}", plan, grid, run_key, executor, on_block)
        scene = step.run(scene, shop)
    assert isinstance(scene.volume, Store), "every step leaves a store"
    stamp = dict(job.provenance) | {"run_key": run_key, "objects": scene.count}
    if job.table is not None and scene.tables is not None:
        write_table(scene.tables, scene.count, job.table, scene.frame, job.output.result_key)
    export_output(scene.volume, job.output, folder, stamp)
    scene.volume.close()
    write_text(job.run_folder / "provenance.json", json.dumps(stamp, indent=1) + "\n")
    seconds = round(time.perf_counter() - began, 3)
    report = RunReport(len(grid), 0, len(grid), 0, Box.of_shape(grid.volume).voxels, seconds)
    write_text(job.run_folder / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    discard(job.work)
    return report


def _kept_plan(job: DecodeJob) -> BlockPlan:
    """The plan that the work was begun with, or the job's own, which is kept."""
    path = job.work / "plan.json"
    if path.exists():
        kept: dict[str, list[int]] = json.loads(path.read_text())
        return BlockPlan(vec3(kept["block_shape"]), vec3(kept["chunk_shape"]))
    job.work.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(job.plan)))
    return job.plan
