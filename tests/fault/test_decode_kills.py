"""Decoding is killed anywhere, run again, and gives the bytes of an undisturbed run; finished blocks are not redone."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fork_server import ForkServer
from scipy import ndimage

from small_jobs import final_names, finals, quick_folder, write_h5

STEPS = (
    "decoding=[{name: connected_components, connectivity: 26, threshold: 0.5}, "
    "{name: filters, min_voxels: 3, fill_holes: 3d}]"
)
NAMES = {"v_instances.h5", "v_instances.zarr", "v_instances.parquet"}
CUT, JOIN, PAINTED = "components.cut", "components.join", "components.zarr"
STAGES = (CUT, JOIN, "tables", PAINTED, ".filled.", ".h5", ".parquet", "jsonl", "/coordination", "/checksums")
WATERSHED = (
    *("components.cut", "seeds.join", "contests", "flood", "windows.basins", "windows.bridges", "windows.trees"),
    *("windows.refined", "objects.tables", "objects.zarr"),
)


@dataclass(frozen=True)
class Storm:
    """One decoding and its undisturbed result."""

    server: ForkServer
    folder: Path
    volume: Path
    reference: dict[str, bytes]
    touched: tuple[str, ...]
    steps: str = STEPS

    def words(self, output: Path) -> list[str]:
        given = ["inference.output.formats=[h5,zarr]", "inference.block_shape=[4,16,24]"]
        return ["decode", str(self.volume), f"inference.data.output_path='{output}'", self.steps, *given]

    def require_resumed(self, output: Path) -> None:
        """Run to the end: the undisturbed bytes, and nothing is left."""
        left = finals(output)
        assert all(self.reference[path] == content for path, content in left.items()), "a partial final output"
        ended = self.server.run(self.words(output))
        assert ended.code == 0, ended.stderr + ended.stdout
        assert finals(output) == self.reference
        assert {p.name for p in output.iterdir()} == NAMES | {"v_instances.run"}
        (work,) = (path.parent for path in (output / "v_instances.run").glob("*/ledgers.json"))
        left_there = {path.name for path in work.iterdir() if not path.name.startswith("ledger_")}
        assert left_there == {"ledgers.json"}, "unfinished work is left"


@pytest.fixture(scope="module")
def storm() -> Iterator[Storm]:
    with quick_folder() as folder:
        likely = ndimage.gaussian_filter(np.random.default_rng(0).random((8, 32, 48)), 0.8).astype(np.float32)
        volume = write_h5(folder / "v.h5", likely)
        with ForkServer(folder) as server:
            output = folder / "undisturbed"
            begun = Storm(server, folder, volume, {}, ())
            ended = server.run(begun.words(output), watched=output)
            assert ended.code == 0, ended.stderr + ended.stdout
            assert final_names(output) == NAMES
            yield Storm(server, folder, volume, finals(output), ended.touched)


def killed(storm: Storm, output: Path, text: str, moment: float) -> None:
    """Kill before one of the file operations on a path that contains ``text``."""
    number = 1 + int(moment * sum(text in path for path in storm.touched))
    ended = storm.server.run(storm.words(output), watched=output, kill_at=(text, number))
    assert ended.code == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_each_stage(stage: str, storm: Storm) -> None:
    output = storm.folder / stage.replace("/", "").strip(".")
    killed(storm, output, stage, random.Random(stage).random())
    storm.require_resumed(output)


def test_killed_several_times_and_finished_blocks_are_kept(storm: Storm) -> None:
    output = storm.folder / "row"
    log = output / "v_instances.run" / "run.log"
    for stage, moment in ((CUT, 0.3), (JOIN, 0.2), (PAINTED, 0.15), (".filled.", 0.3)):
        killed(storm, output, stage, moment)
    storm.require_resumed(output)
    done = re.findall(r": (\S+), block (\S+):", log.read_text())
    stages = {stage for stage, _ in done}
    assert len(stages) == 6, stages  # cut, join, paint of the components and of the holes
    every = {(stage, f"{z}-{y}-{x}") for stage in stages for z, y, x in np.ndindex(2, 2, 2)}
    assert len(done) == len(set(done)) and set(done) <= every
    assert len(every) - len(done) <= 4, "a kill leaves one block at most that is recorded and not yet logged"


def test_a_watershed_is_killed_in_each_of_its_stages(storm: Storm) -> None:
    """One after the other, of components that are flooded whole and of one that is flooded in windows."""
    step = "{name: watershed, threshold: 0.56, seed_threshold: 0.62, max_component_voxels: 4096}"
    divided = replace(storm, steps=f"decoding=[{step}]")
    undisturbed, output = storm.folder / "divided", storm.folder / "divided_row"
    ended = storm.server.run(divided.words(undisturbed), watched=undisturbed)
    assert ended.code == 0, ended.stderr + ended.stdout
    counts = json.loads((undisturbed / "v_instances.run" / "provenance.json").read_text())["1_watershed"]
    assert counts["cut"] == 1 and counts["flooded"] > 1
    divided = replace(divided, reference=finals(undisturbed), touched=ended.touched)
    for stage in WATERSHED:
        ended = storm.server.run(divided.words(output), watched=output, kill_at=(f"_watershed.{stage}", 2))
        assert ended.code == -signal.SIGKILL, (stage, ended.stderr)
    divided.require_resumed(output)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_two_hundred_file_operations(storm: Storm) -> None:
    generator = random.Random(2)
    for i in range(200):
        output = storm.folder / f"long_{i}"
        killed(storm, output, "", (i + generator.random()) / 200)
        storm.require_resumed(output)
