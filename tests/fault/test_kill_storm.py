"""SIGKILL in every stage: what is left is whole, and running again gives the undisturbed bytes.

Later work adds a stage to ``STAGES``, one kill each at most in the suite that always runs.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer

from nnunet_models import make_model
from small_jobs import em_like, final_names, finals, infer_words, ledger_lines, quick_folder, write_h5

BLOCKS = 8
SHARD = "s.zarr/0/c/"  # in the path of a shard of labels, probabilities or components, which is opened for its checksum
STAGES = {  # text in the paths of a stage's file operations, and how many kills are spread over them
    "survey": ("survey.json", 1),
    "mask": ("mask", 1),
    "ledger": ("ledger", 1),
    "leases": ("/coordination", 1),
    "claims": ("/.claims", 1),
    "staging": ("/staging.", 1),
    "stores": (".zarr.", 1),
    "blocks": (SHARD, 1),
    "filter": ("filter", 1),
    "pieces": ("_components.cut", 1),
    "joins": ("_components.join", 1),
    "tables of objects": ("_components.tables", 1),
    "objects": ("_components.zarr", 1),
    "linking": ("_linking.", 1),
    "watershed": ("_watershed.", 1),
    "table": (".parquet", 1),
    "h5": (".h5", 1),
    "tiff": (".tif", 1),
    "png": ("png", 1),
    "zarr": ("zarr.json", 1),
    "arrays": (".zarr/", 1),
    "shards": (".final.zarr/0/c/", 1),
    "zarr in place": (".final.zarr", 1),
    "levels": (".n5.0/", 1),
    "zarr2": (".zarr2", 1),
    "zarr2 in place": (".v2.zarr", 1),
    "n5": (".n5", 1),
    "precomputed": (".precomputed", 1),
    "checksums": ("/checksums", 1),
    "provenance": ("provenance.json", 1),
    "report": ("report", 1),
}
ELSEWHERE = {  # stages like another one, or those that test_decode_kills.py kills a smaller job in
    *("pieces", "joins", "tables of objects", "objects", "table", "watershed"),
    *("zarr2 in place", "levels", "provenance"),
    *("leases", "checksums", "h5", "arrays", "zarr2", "ledger", "png", "zarr", "precomputed"),
}
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
    "decoding=[{name: connected_components, connectivity: 26}, {name: watershed, seed_distance_nm: 5}, "
    "{name: slice_linking, max_gap: 1}]",
)
ENDINGS = (".h5", ".zarr", ".tif", "_png", ".v2.zarr", ".n5", ".precomputed")
OBJECTS = {f"v_labels_instances{ending}" for ending in (*ENDINGS, ".parquet") if ending != "_png"}
FINAL_NAMES = {f"v_labels{kind}{ending}" for kind in ("", "_probabilities") for ending in ENDINGS} | OBJECTS
RUNS = {"v_labels.run", "v_labels_instances.run"}


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
        model = make_model(
            folder / "model", dimensions=2, patch=(16, 16), features=(4, 8), reader="SimpleITKIO", masked=(True,)
        )
        image = em_like((2, 48, 64))
        image[1, 20:26, 30:38] = 0  # a hole in the mask that is normalised within
        volume = write_h5(folder / "v.h5", image)
        with ForkServer(folder) as server:
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


def require_resumed(storm: Storm, output: Path) -> None:
    """Run to the end: the undisturbed bytes, and only the blocks that were not recorded are computed."""
    run = output / "v_labels.run"
    recorded = {line["block"] for line in ledger_lines(run)}
    complete = final_names(output) >= FINAL_NAMES - OBJECTS
    log = run / "run.log"
    logged = log.stat().st_size if log.exists() else 0
    ended = storm.server.run(storm.words(output))
    assert ended.code == 0, ended.stderr
    assert finals(output) == storm.reference
    assert {p.name for p in output.iterdir()} == FINAL_NAMES | RUNS
    lines = ledger_lines(run)
    assert sorted(line["block"] for line in lines) == sorted(storm.windows)
    assert {line["block"]: line["windows"] for line in lines} == storm.windows
    computed = re.findall(r"predict, block (\S+): (\d+) windows", log.read_text()[logged:])
    missing = {key: windows for key, windows in storm.windows.items() if key not in recorded}
    assert dict(computed) == {key: str(windows) for key, windows in missing.items()}
    assert len(computed) == len(missing)
    assert not list(output.glob("*.run/*/*.zarr")), "working stores are left"
    assert not list(output.glob("*.run/*/coordination")), "leases are left"
    if complete:
        assert "Skipped 1/1" in ended.stderr
        return
    report = json.loads((run / "report.json").read_text())
    assert (report["planned"], report["skipped"]) == (BLOCKS, len(recorded))
    assert (report["done"], report["windows"]) == (len(missing), sum(missing.values()))


def kill_at_operation(storm: Storm, output: Path, number: int, text: str = "") -> None:
    """Kill a run before its n-th file operation on a path that contains ``text``."""
    ended = storm.server.run(storm.words(output), watched=output, kill_at=(text, number))
    assert ended.code == -signal.SIGKILL, ended.stderr
    require_whole(output, storm.reference)


def spread(count: int, seed: int) -> list[float]:
    """Random moments, one in each of ``count`` equal parts of the run."""
    generator = random.Random(seed)
    return [(i + generator.random()) / count for i in range(count)]


def storm_of_operations(storm: Storm, stage: str, count: int, seed: int) -> None:
    """Kills spread over the file operations of one stage; all of a stage that has no more than ``count``."""
    text = STAGES[stage][0]
    operations = sum(text in path for path in storm.touched)
    assert operations, f"no file operation of {stage} has {text} in its path"
    numbers = sorted({1 + int(moment * operations) for moment in spread(count, seed)})
    for number in numbers:
        output = storm.folder / f"{stage}_{seed}_{number}"
        kill_at_operation(storm, output, number, text)
        require_resumed(storm, output)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.long) if stage in ELSEWHERE else stage for stage in STAGES]
)
def test_killed_in_a_stage(storm: Storm, stage: str) -> None:
    storm_of_operations(storm, stage, STAGES[stage][1], seed=1)


def test_every_file_operation_belongs_to_a_stage(storm: Storm) -> None:
    """Or is one on the folders and working stores as wholes: a stage that is added later stands in the table too."""
    wholes = {storm.folder / "undisturbed"}
    for run in (storm.folder / "undisturbed" / name for name in RUNS):
        (work,) = (path for path in run.iterdir() if path.is_dir() and path.name != "checksums")
        stores = (work / name for name in ("labels.zarr", "probabilities.zarr"))
        wholes |= {run, run / "run.log", work, *stores}
    wholes |= {path / "connectomics.json" for path in (storm.folder / "undisturbed").glob("*_png")}  # is asked for
    others = {path for path in storm.touched if not any(text in path for text, _ in STAGES.values())}
    assert others <= set(map(str, wholes))


def test_killed_several_times_in_a_row(storm: Storm) -> None:
    """Each run looks at the shards of finished blocks again, two a block, and gets two blocks further."""
    output = storm.folder / "row"
    for recorded in (0, 2, 4, 6):
        assert len(ledger_lines(output / "v_labels.run")) == recorded
        kill_at_operation(storm, output, 2 * recorded + 5, text=SHARD)
    require_resumed(storm, output)


def kill_the_true_command(storm: Storm, output: Path, blocks: int, after_s: float = 0.0) -> None:
    """Without any fork: some time after so many blocks are recorded, the process is killed."""
    command = [sys.executable, "-m", "connectomics.cli", *storm.words(output)]
    run = output / "v_labels.run"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (run.exists() and len(ledger_lines(run)) >= blocks):
            time.sleep(0.001)
        time.sleep(after_s)
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0)
    require_whole(output, storm.reference)


@pytest.mark.parametrize("blocks", [pytest.param(0, marks=pytest.mark.long), 5])
def test_the_true_command_line_is_killed(storm: Storm, blocks: int) -> None:
    output = storm.folder / f"true_{blocks}"
    kill_the_true_command(storm, output, blocks)
    require_resumed(storm, output)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_by_the_clock(storm: Storm) -> None:
    for i, moment in enumerate(spread(100, seed=4)):
        output = storm.folder / f"time_{i}"
        ended = storm.server.run(storm.words(output), after_s=moment * storm.seconds)
        assert ended.code in (-signal.SIGKILL, 0), ended.stderr
        require_whole(output, storm.reference)
        require_resumed(storm, output)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_a_hundred_and_more_kills_by_stage(storm: Storm, stage: str) -> None:
    storm_of_operations(storm, stage, 16, seed=5)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_true_command_line_is_killed_at_random_moments(storm: Storm) -> None:
    for i, moment in enumerate(spread(30, seed=6)):
        output = storm.folder / f"true_random_{i}"
        kill_the_true_command(storm, output, 0, moment * storm.seconds)
        require_resumed(storm, output)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_at_every_single_file_operation(storm: Storm) -> None:
    for number in range(1, len(storm.touched) + 1):
        output = storm.folder / f"every_{number}"
        kill_at_operation(storm, output, number)
        require_resumed(storm, output)
