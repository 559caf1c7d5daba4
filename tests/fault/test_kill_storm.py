"""SIGKILL at random moments of every stage: what is left is whole, and running again gives the undisturbed bytes."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, write_h5

BLOCKS = 12
SHARD = ".zarr/0/c/"  # in the path of a working store's shard, which is opened for its checksum
SETTINGS = (
    "inference.block_shape=[1,24,32]",
    "inference.output.formats=[h5,zarr,tiff,png,zarr2,n5,precomputed]",
    "inference.voxel_size_nm=[40,4,4]",
    "inference.output.save_probabilities=true",
    "inference.test_time_augmentation.select_channel=[1]",
    "inference.test_time_augmentation.flip_axes=[1]",
    "inference.postprocessing.intensity_scale=255",
    "inference.postprocessing.intensity_dtype=uint8",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
)
ENDINGS = (".h5", ".zarr", ".tif", "_png", ".v2.zarr", ".n5", ".precomputed")
FINAL_NAMES = {f"v_labels{kind}{ending}" for kind in ("", "_probabilities") for ending in ENDINGS}


@dataclass(frozen=True)
class Storm:
    """One job, its undisturbed result, and what it cost."""

    server: ForkServer
    folder: Path
    model: Path
    volume: Path
    reference: dict[str, bytes]
    windows: dict[str, int]
    seconds: float
    touched: tuple[str, ...]

    def words(self, output: Path) -> list[str]:
        return infer_words(self.model, output, self.volume, *SETTINGS)


@pytest.fixture(scope="module")
def storm() -> Iterator[Storm]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        volume = write_h5(folder / "v.h5", em_like((3, 48, 64)))
        with ForkServer(model, folder) as server:
            output = folder / "undisturbed"
            ended = server.run(infer_words(model, output, volume, *SETTINGS), watched=output)
            assert (ended.code, ended.stderr.count("error")) == (0, 0), ended.stderr
            reference = finals(output)
            assert final_names(output) == FINAL_NAMES
            lines = ledger_lines(output / "v_labels.run")
            windows = {line["block"]: line["windows"] for line in lines}
            assert len(lines) == len(windows) == BLOCKS
            yield Storm(server, folder, model, volume, reference, windows, ended.seconds, ended.touched)


def require_whole(output: Path, reference: dict[str, bytes]) -> None:
    """Whatever stands under a final name is all of it."""
    left = finals(output)
    for name in final_names(output):
        expected = {path for path in reference if path.partition("/")[0] == name}
        assert {path for path in left if path.partition("/")[0] == name} == expected, name
    assert all(reference[path] == content for path, content in left.items())


def stage(output: Path) -> str:
    """How far a killed run had come."""
    run, names = output / "v_labels.run", final_names(output)
    recorded = len(ledger_lines(run))
    if names:
        return "finished" if names == FINAL_NAMES else "export"
    if list(run.glob("*/*filtered.zarr*")):
        return "filter"
    if recorded == BLOCKS:
        return "before the filter"
    if recorded:
        return "blocks"
    return "survey" if list(run.glob("*/survey.json")) else "start"


def require_resumed(storm: Storm, output: Path) -> None:
    """Run to the end: the undisturbed bytes, and only the blocks that were not recorded are computed."""
    run = output / "v_labels.run"
    recorded = {line["block"] for line in ledger_lines(run)}
    complete = final_names(output) == FINAL_NAMES
    log = run / "run.log"
    logged = log.stat().st_size if log.exists() else 0
    ended = storm.server.run(storm.words(output))
    assert ended.code == 0, ended.stderr
    assert finals(output) == storm.reference
    assert {p.name for p in output.iterdir()} == FINAL_NAMES | {"v_labels.run"}
    lines = ledger_lines(run)
    assert sorted(line["block"] for line in lines) == sorted(storm.windows)
    assert {line["block"]: line["windows"] for line in lines} == storm.windows
    computed = re.findall(r"block (\S+): (\d+) windows", log.read_text()[logged:])
    missing = {key: windows for key, windows in storm.windows.items() if key not in recorded}
    assert dict(computed) == {key: str(windows) for key, windows in missing.items()}
    assert len(computed) == len(missing)
    assert not [p for p in run.glob("*/*") if p.is_dir()], "working stores are left"
    if complete:
        assert "Skipped 1/1" in ended.stderr
        return
    report = json.loads((run / "report.json").read_text())
    assert (report["planned"], report["skipped"]) == (BLOCKS, len(recorded))
    assert (report["done"], report["windows"]) == (len(missing), sum(missing.values()))


def kill_at_operation(storm: Storm, output: Path, number: int, text: str = "") -> str:
    """Kill a run before its n-th file operation on a path that contains ``text``; the stage it was in."""
    ended = storm.server.run(storm.words(output), watched=output, kill_at=(text, number))
    assert ended.code == -signal.SIGKILL, ended.stderr
    require_whole(output, storm.reference)
    return stage(output)


def kill_at_time(storm: Storm, output: Path, moment: float) -> str:
    """Kill a run after ``moment`` (0 to 1) of the time that the undisturbed one took; the stage it was in."""
    ended = storm.server.run(storm.words(output), after_s=moment * storm.seconds)
    assert ended.code in (-signal.SIGKILL, 0), ended.stderr
    require_whole(output, storm.reference)
    return stage(output)


def spread(count: int, seed: int) -> list[float]:
    """Random moments, one in each of ``count`` equal parts of the run."""
    generator = random.Random(seed)
    return [(i + generator.random()) / count for i in range(count)]


def storm_of_operations(storm: Storm, count: int, seed: int, text: str = "") -> Counter[str]:
    stages: Counter[str] = Counter()
    candidates = sum(text in path for path in storm.touched)
    for i, moment in enumerate(spread(count, seed)):
        output = storm.folder / f"operation_{seed}_{i}"
        stages[kill_at_operation(storm, output, 1 + int(moment * candidates), text)] += 1
        require_resumed(storm, output)
    return stages


def storm_of_times(storm: Storm, count: int, seed: int) -> None:
    for i, moment in enumerate(spread(count, seed)):
        output = storm.folder / f"time_{seed}_{i}"
        kill_at_time(storm, output, moment)
        require_resumed(storm, output)


def test_killed_at_random_file_operations(storm: Storm) -> None:
    stages = storm_of_operations(storm, 5, seed=1)
    stages += storm_of_operations(storm, 2, seed=6, text="filtered")  # few of a run's operations
    assert {"filter", "export"} <= set(stages), stages


def test_killed_at_random_blocks(storm: Storm) -> None:
    stages = storm_of_operations(storm, 3, seed=2, text=SHARD)
    assert stages["blocks"] > 1, stages


def test_killed_at_random_levels_of_pyramids(storm: Storm) -> None:
    stages = storm_of_operations(storm, 3, seed=7, text="/levels/")
    assert stages["export"] > 1, stages


def test_killed_at_random_times(storm: Storm) -> None:
    storm_of_times(storm, 5, seed=3)


def test_killed_several_times_in_a_row(storm: Storm) -> None:
    """Each run looks at the shards of finished blocks again, two a block, and gets two blocks further."""
    output = storm.folder / "row"
    for recorded in (0, 2, 4, 6):
        assert len(ledger_lines(output / "v_labels.run")) == recorded
        kill_at_operation(storm, output, 2 * recorded + 5, text=SHARD)
    require_resumed(storm, output)


@pytest.mark.parametrize("blocks", [0, 5])
def test_the_true_command_line_is_killed(storm: Storm, blocks: int) -> None:
    """Without any fork: when so many blocks are recorded, the process is killed."""
    output = storm.folder / f"true_{blocks}"
    command = [sys.executable, "-m", "connectomics.cli", *storm.words(output)]
    run = output / "v_labels.run"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (run.exists() and len(ledger_lines(run)) >= blocks):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    require_whole(output, storm.reference)
    require_resumed(storm, output)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_kills(storm: Storm) -> None:
    storm_of_times(storm, 100, seed=4)
    stages = storm_of_operations(storm, 100, seed=5)
    assert {"start", "survey", "blocks", "filter", "export", "finished"} <= set(stages), stages


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_at_every_single_file_operation(storm: Storm) -> None:
    for number in range(1, len(storm.touched) + 1):
        output = storm.folder / f"every_{number}"
        kill_at_operation(storm, output, number)
        require_resumed(storm, output)
