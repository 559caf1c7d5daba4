"""Memory and time against the size of a volume: the whole pipeline with a network that costs next to nothing.

    python benchmarks/scale.py            # 1, 8 and 64 GB; a slice of 100,000²; 1 TB planned, recorded and sampled
    python benchmarks/scale.py --quick    # 0.5, 1 and 2 GB; a slice of 20,000²; 10 GB

Each step is a process of its own: a Zarr volume of uint8 sections, whose chunks are hard links to a few files, goes
through survey, blocks under a ledger and export to Zarr, and sampled labels are compared with numpy's threshold.
Exit code 1 if a step's peak memory or its time a gigabyte differs from the first one's by more than is tolerated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.overlapping import OverlappingExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.stage import LABELS
from connectomics.execution.task import BlockRecord
from connectomics.inference.head import LabelRule
from connectomics.inference.predictor import RollingPredictor, SlidingWindow
from connectomics.inference.section_cases import SectionCases
from connectomics.models.backends.contract import NumericClass
from connectomics.models.spec import ChannelNormalisation
from connectomics.planning.blocks import plan_blocks
from connectomics.planning.memory import Budget, NetworkWork, Work, share_freed_memory
from connectomics.runs.job import JobRecord, Labeller, RunSettings, VolumeJob
from connectomics.runs.volume import run_volume
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter
from connectomics.stages.predict.task import PredictTask
from connectomics.stages.survey.survey import load_survey, save_survey, survey, survey_bytes
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import create_store
from connectomics.volumes.stored import reading_bytes
from connectomics.volumes.volume import VolumeInfo, VolumeReader

CHUNK = 2048
SECTION = 8192  # voxels along y and x
BUDGET_BYTES = 2_000_000_000
WINDOW = SlidingWindow((1, 512, 512), step=1.0)
PATTERNS = 4  # different chunks, in turn
SAMPLED = 1000
MOST_LINKS = 60_000  # of one file


class Threshold:
    """The network: class 1 where the normalised intensity is above 0, which is where a voxel is above its mean."""

    device = torch.device("cpu")
    numeric_class = NumericClass("threshold", "exact", 1, 1, "cpu")

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits [n, 2, z, y, x]."""
        return torch.cat([torch.zeros_like(batch), batch], dim=1)

    def close(self) -> None:
        """Nothing to close."""


def segmenter() -> Segmenter:
    """Each section a case, as for models trained on images."""
    predictor = RollingPredictor((Threshold(),), WINDOW, 2)
    member = EnsembleMember(predictor, (ChannelNormalisation("ZScoreNormalization"),), by_slice=True)
    return Segmenter((member,), 2, LabelRule(np.dtype(np.uint8)), None)


def pattern(number: int) -> np.ndarray:
    """A chunk of dark blobs on a bright noisy ground."""
    generator = np.random.default_rng(number)
    coarse = generator.random((CHUNK // 64, CHUNK // 64)) < 0.3
    ground = np.where(coarse.repeat(64, 0).repeat(64, 1), 60, 180)
    return (ground + generator.integers(-25, 26, (CHUNK, CHUNK))).astype(np.uint8)


def make_volume(folder: Path, extent: Vec3) -> Path:
    """A Zarr v3 array of ``extent`` whose chunks are hard links to few files."""
    path = folder / "input.zarr"
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(extent),
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, CHUNK, CHUNK]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes"}],
        "fill_value": 0,
        "dimension_names": ["z", "y", "x"],
    }
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps(metadata))
    kept: dict[tuple[int, int], Path] = {}
    for i, block in enumerate(BlockGrid(extent, (1, CHUNK, CHUNK))):
        z, y, x = block.index
        key = (pattern_at(block.index), i // (MOST_LINKS * PATTERNS))
        if key not in kept:
            kept[key] = folder / f"chunk_{key[0]}_{key[1]}"
            kept[key].write_bytes(pattern(key[0]).tobytes())
        target = path / "c" / str(z) / str(y) / str(x)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(kept[key], target)
    return path


def pattern_at(index: Vec3) -> int:
    """Number of the pattern of the chunk at ``index``."""
    return sum(index) % PATTERNS


class Repeated:
    """A computed volume of the patterns, for more voxels than files can be linked to."""

    def __init__(self, extent: Vec3) -> None:
        self.info = VolumeInfo((1, *extent), np.dtype(np.uint8), (1, CHUNK, CHUNK))
        self.identity: dict[str, object] = {"extent": list(extent)}
        self._patterns = [pattern(i) for i in range(PATTERNS)]

    def read(self, box: Box) -> np.ndarray:
        """Voxels (1, z, y, x) of a box."""
        result = np.empty((1, *box.shape), np.uint8)
        for block in chunks_of(box):
            part = block.core.intersect(box)
            values = self._patterns[pattern_at(block.index)][part.relative_to(block.core).slices[1:]]
            result[(0, *part.relative_to(box).slices)] = values
        return result

    def close(self) -> None:
        """Nothing to close."""


def chunks_of(box: Box):
    """The chunks that a box touches."""
    unit = (1, CHUNK, CHUNK)
    grid = BlockGrid(tuple(-(-n // c) * c for n, c in zip(box.stop, unit, strict=True)), unit)
    spans = [range(a // c, -(-b // c)) for a, b, c in zip(box.start, box.stop, unit, strict=True)]
    return (grid.block((z, y, x)) for z in spans[0] for y in spans[1] for x in spans[2])


def plan_for(info: VolumeInfo, base_bytes: int) -> BlockPlan:
    """What the program plans for such a model within the budget."""
    budget = Budget(BUDGET_BYTES, base_bytes + reading_bytes(info), survey_bytes(info, 1))
    return plan_blocks(info.extent, [Work(NetworkWork(WINDOW.patch, 2, 1, 1), 1, 1)], budget)


def settings_in(folder: Path) -> RunSettings:
    """As the command line makes them."""
    return RunSettings(folder, "benchmark", BUDGET_BYTES, Threshold.numeric_class.as_dict())


def require_labels(reader: VolumeReader, labels: VolumeReader, boxes: list[Box], mean: float) -> None:
    """Compare boxes of the output with numpy's threshold of the input."""
    for box in boxes:
        if not np.array_equal(labels.read(box)[0], reader.read(box)[0] > mean):
            raise SystemExit(f"other labels than numpy's in {box}")


def process(extent: Vec3, folder: Path) -> dict[str, float]:
    """Bring one volume to its labels; give seconds and memory."""
    base = psutil.Process().memory_info().rss
    reader = open_volume(str(make_volume(folder, extent)))
    plan = plan_for(reader.info, base)
    output = FinalOutput(LABELS, "volume", "key", ("zarr",))
    job = VolumeJob(
        "volume",
        folder / "volume.run",
        reader,
        Labeller(segmenter(), BinaryFilters()),
        (output,),
        plan,
        JobRecord({}, ()),
    )
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    report = run_volume(job, settings_in(folder), OverlappingExecutor(), lambda done, planned: None)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    peak = peak_bytes()
    boxes = [Box((z, y, 0), (z + 1, y + 64, extent[2])) for z in {0, extent[0] - 1} for y in (0, 5000, extent[1] - 64)]
    mean = section_mean(extent)
    require_labels(reader, open_volume(str(folder / "volume.zarr")), boxes, mean)
    return {
        "gb": report.voxels / 1e9,
        "peak_rss_mb": round(peak / 1e6, 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "base_rss_mb": round(base / 1e6, 1),
        "blocks": report.planned,
        "block_shape": list(plan.block_shape),
    }


def section_mean(extent: Vec3) -> float:
    """Mean of a section by numpy; all have the same patterns, in another order, and none is near it."""
    return float(np.mean([pattern(i).mean() for i in range(PATTERNS)]))


def peak_bytes() -> int:
    """The most memory this process had at once."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def logical(terabytes: float, folder: Path) -> dict[str, float]:
    """Plan, survey, record and sample a volume that is too large to process here."""
    base = psutil.Process().memory_info().rss
    extent = (round(terabytes * 1e12 / SECTION**2), SECTION, SECTION)
    reader, began = Repeated(extent), time.perf_counter()
    natural = plan_for(reader.info, base)
    sample = survey(Repeated((4, *extent[1:])), "sample", segmenter().members[0].schemes, by_slice=True)
    cases = SectionCases.of((sample[z % 4] for z in range(extent[0])), extent[0], 1)
    save_survey([cases], folder / "survey.json")
    surveyed = load_survey(folder / "survey.json")
    assert surveyed == (cases,)
    surveyed_s, began = time.perf_counter() - began, time.perf_counter()
    plan = BlockPlan((1, 1024, 1024), (1, 512, 512))  # a million blocks a terabyte
    grid = BlockGrid(extent, plan.block_shape)
    recorded_s = record_all(grid, plan)
    began = time.perf_counter()
    store = create_store(
        folder / "labels.zarr",
        VolumeInfo(reader.info.shape, np.dtype(np.uint8), plan.chunk_shape),
        shard_shape=plan.block_shape,
        attributes={},
    )
    task = PredictTask(grid, segmenter(), surveyed, reader.read, {LABELS: store})
    sampled = list(grid.shard(0, max(1, len(grid) // SAMPLED)))
    for block in sampled:
        task.process(block)
    require_labels(reader, store, [block.core for block in sampled[::50]], section_mean(extent))
    return {
        "gb": grid.volume[0] * SECTION**2 / 1e9,
        "peak_rss_mb": round(peak_bytes() / 1e6, 1),
        "natural_block": list(natural.block_shape),
        "blocks": len(grid),
        "survey_seconds": round(surveyed_s, 2),
        "ledger_seconds": round(recorded_s, 2),
        "sampled_blocks": len(sampled),
        "sampled_seconds": round(time.perf_counter() - began, 2),
    }


def record_all(grid: BlockGrid, plan: BlockPlan) -> float:
    """Write every block into a ledger (in memory where the machine offers that: a million fsyncs), open it again."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="scale_", dir=memory if os.access(memory, os.W_OK) else None))
    began = time.perf_counter()
    try:
        ledger = Ledger(folder / "ledger", "key", {"threads": 1}, plan, grid.volume)
        for block in grid:
            ledger.append(BlockRecord(block.key, {LABELS: "0" * 64}, 9, 0.1))
        ledger.close()
        again = Ledger.existing(folder / "ledger")
        assert again.finished == len(grid) and all(again.is_done(block) for block in grid)
        again.close()
    finally:
        shutil.rmtree(folder)
    return time.perf_counter() - began


def in_own_process(kind: str, size: float, folder: Path) -> dict[str, float]:
    """One measurement in a fresh process; what it leaves on the disk is removed."""
    with tempfile.TemporaryDirectory(prefix="scale_", dir=folder) as work:
        command = [sys.executable, __file__, "--step", kind, str(size), "--folder", work]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ) | threads)
    if ended.returncode:
        raise SystemExit(f"{kind} {size} failed:\n{ended.stdout}{ended.stderr}")
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def step(kind: str, size: float, folder: Path) -> dict[str, float]:
    """What ``--step`` runs."""
    share_freed_memory()  # as build_engine does
    torch.set_num_threads(1)
    if kind == "volume":
        return process((max(1, round(size * 1e9 / SECTION**2)), SECTION, SECTION), folder)
    if kind == "slice":
        return process((1, int(size), int(size)), folder)
    return logical(size, folder)


def judged(steps: list[dict[str, float]], memory: float, pace: float) -> list[str]:
    """What departs from the first step by more than is tolerated."""
    found = []
    for later in steps[1:]:
        for what, tolerated, ours, theirs in (
            ("peak memory", memory, later["peak_rss_mb"], steps[0]["peak_rss_mb"]),
            ("CPU time a GB", pace, *(s["cpu_seconds"] / s["gb"] for s in (later, steps[0]))),
        ):
            if ours > theirs * (1 + tolerated):
                found.append(f"{what} at {later['gb']:.1f} GB is {ours / theirs:.3f} of the first step's")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.5, 1 and 2 GB, the rest smaller")
    parser.add_argument("--steps", type=float, nargs="+", metavar="GB", help="sizes instead; nothing else is run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for volumes and results")
    parser.add_argument("--memory", type=float, default=0.1, help="tolerated growth of peak memory")
    parser.add_argument("--pace", type=float, default=0.1, help="tolerated growth of the CPU time a gigabyte")
    parser.add_argument("--step", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.step:
        print(json.dumps(step(words.step[0], float(words.step[1]), words.folder)))
        return 0
    sizes = words.steps or ([0.5, 1, 2] if words.quick else [1, 8, 64])
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, budget {BUDGET_BYTES / 1e9:g} GB")
    print(f"{'GB':>8} {'blocks':>8} {'peak MB':>9} {'seconds':>9} {'CPU s':>9} {'CPU s/GB':>9}")
    steps: list[dict[str, float]] = []
    found: dict[str, object] = {"budget_mb": BUDGET_BYTES / 1e6, "steps": steps}

    def keep() -> None:
        if words.json:
            words.json.write_text(json.dumps(found, indent=1) + "\n")

    for size in sizes:
        steps.append(in_own_process("volume", size, words.folder))
        print_row(steps[-1])
        keep()
    if not words.steps:
        found["slice"] = measured = in_own_process("slice", 20_000 if words.quick else 100_000, words.folder)
        print_row(measured, "one slice")
        keep()
        found["logical"] = in_own_process("logical", 0.01 if words.quick else 1, words.folder)
        print("logical:", json.dumps(found["logical"]))
        keep()
    problems = judged(steps, words.memory, words.pace)
    print("\n".join(problems) or "flat and linear within what is tolerated")
    return 1 if problems else 0


def print_row(measured: dict[str, float], note: str = "") -> None:
    """A line of the table."""
    pace = measured["cpu_seconds"] / measured["gb"]
    print(
        f"{measured['gb']:8.2f} {measured['blocks']:8} {measured['peak_rss_mb']:9.0f} {measured['seconds']:9.1f} "
        f"{measured['cpu_seconds']:9.1f} {pace:9.2f} {note}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
