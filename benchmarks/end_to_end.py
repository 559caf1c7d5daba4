"""Whole runs against nnU-Net's own: our command and ``nnUNetv2_predict_from_modelfolder``, same files, turn by turn.

``volume``: one 3D TIFF of 32 x 512 x 512 with the architecture nnU-Net plans for large sections (8 stages, up to 512
features, patch 384 x 512; random weights). ``sections``: 100 PNG files of 512 x 512 with the small trained model.
Each contender is a process from its start to its end, and reads and writes the same names. Ours are ``torch`` (what
runs unless something is stated), ``exact`` (``system.backend=auto``) and ``fast`` (``inference.precision=fast``).

Prints seconds (min, median, max), the median of the ratios nnU-Net / ours round by round, the same of CPU seconds, the
largest memory (PSS, summed over the processes of a contender) and the share of labels that differ from nnU-Net's. Each
contender labels one section first, so that files and compiled networks are where they are in the second of two runs.
Threads that wait sleep (OMP_WAIT_POLICY=passive) in every contender: nnU-Net, which leaves them spinning, gains most by
it on a busy machine.

nnU-Net looks for its trainers in all of its modules, some of which need timm and torchvision; where torchvision is not
installed, an empty timm stands in for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import psutil
import tifffile
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from contest import variants_here  # noqa: E402

from conftest import shared_data_folder  # noqa: E402
from nnunet_models import make_model  # noqa: E402

THEIRS = "nnU-Net"
COMMAND = "nnUNetv2_predict_from_modelfolder"
VARIANTS = {
    "torch": ("system.backend=torch",),
    "exact": ("system.backend=auto",),
    "fast": ("system.backend=auto", "inference.precision=fast", "inference.max_disagreement=1"),
}
REAL = (32, 64, 128, 256, 512, 512, 512, 512)
LOOK_S = 0.5  # between two looks at memory, which hold up what is looked at
STAND_IN = """
import importlib.abc, importlib.machinery, importlib.util, sys, types

class Empty(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "timm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Empty(spec.name)
    def exec_module(self, module):
        pass

if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True, slots=True)
class Contest:
    """One folder of images and a model; ``first`` holds a section alone."""

    name: str
    model: Path
    images: Path
    first: Path
    mirror: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: wall seconds, CPU seconds of all its processes, and the most memory they took together."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int


def sections(data: Path) -> np.ndarray:
    """The shared sections, uint8 (z, y, x)."""
    return np.stack([np.asarray(iio.imread(data / "em" / "vnc" / "raw" / f"{z:02d}.png")) for z in range(16)])


def corners(raw: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Different parts of the sections, 512 x 512 each."""
    for i in range(count):
        y, x = 67 * (i // 16) % 512, 131 * (i // 16) % 512
        yield raw[i % 16, y : y + 512, x : x + 512]


def contests(data: Path, folder: Path, wanted: Sequence[str], *, quick: bool, mirror: bool) -> Iterator[Contest]:
    """Write the images, make the model of the real architecture."""
    raw = sections(data)
    if "sections" in wanted:
        images, first = folder / "png", folder / "png_first"
        images.mkdir(), first.mkdir()
        for i, part in enumerate(corners(raw, 8 if quick else 100)):
            iio.imwrite(images / f"section_{i:03d}_0000.png", part)
        shutil.copy(images / "section_000_0000.png", first)
        yield Contest("sections", data / "models" / "vnc_mito_2d", images, first, mirror=True)
    if "volume" in wanted:
        model = make_model(
            folder / "real", dimensions=2, patch=(384, 512), features=REAL, convolutions=2, reader="Tiff3DIO"
        )
        images, first = folder / "tif", folder / "tif_first"
        images.mkdir(), first.mkdir()
        tifffile.imwrite(
            images / "volume_0000.tif", np.stack([*corners(raw, 2 if quick else 32)]), photometric="minisblack"
        )
        tifffile.imwrite(first / "volume_0000.tif", raw[:1, :384, :512], photometric="minisblack")
        for place in (images, first):  # the spacing of the plan, so that nothing is resampled
            (place / "volume.json").write_text(json.dumps({"spacing": [999.0, 1.0, 1.0]}))
        yield Contest("volume", model, images, first, mirror=mirror)


def command(contender: str, contest: Contest, images: Path, output: Path, threads: int) -> list[str]:
    """The words of a contender's command."""
    fold = next(contest.model.glob("fold_*")).name.removeprefix("fold_")
    words = ["-i", images, "-o", output, "-m", contest.model, "-f", fold, "-device", "cpu", "--disable_progress_bar"]
    if not contest.mirror:
        words.append("--disable_tta")
    if contender == THEIRS:
        return [shutil.which(COMMAND, path=str(Path(sys.executable).parent)) or COMMAND, *map(str, words)]
    ours = [sys.executable, "-c", "from connectomics.cli.program import run_program; run_program()", "from-nnunet"]
    return [*ours, *map(str, words), f"system.num_cpus={threads}", *VARIANTS[contender]]


def run(words: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Run a command to its end, looking at its memory meanwhile."""
    began = time.perf_counter()
    before = os.times()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    most = 0
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(LOOK_S):
            most = max(most, pss_bytes(process.pid))

    looking = threading.Thread(target=look)
    looking.start()
    said, _ = process.communicate()
    seconds = time.perf_counter() - began
    done.set()
    looking.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{said[-3000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(seconds, cpu, most)


def pss_bytes(pid: int) -> int:
    """Proportional set sizes of a process and all below it, added up; those that end meanwhile count nothing."""
    total = 0
    try:
        found = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for one in found:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except (OSError, ValueError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    """The labels in an output folder, by file name."""
    files = sorted([*folder.glob("*.png"), *folder.glob("*.tif")])
    return {f.name: tifffile.imread(f) if f.suffix == ".tif" else np.asarray(iio.imread(f)) for f in files}


def disagreement(ours: Path, theirs: Path) -> float:
    """Share of voxels whose labels differ; both folders must hold the same names."""
    mine, other = labels_of(ours), labels_of(theirs)
    if not mine or mine.keys() != other.keys():
        raise SystemExit(f"{ours} holds {sorted(mine)}, {theirs} holds {sorted(other)}")
    differing = sum(int((mine[name] != other[name]).sum()) for name in mine)
    return differing / sum(labels.size for labels in mine.values())


def measure(contest: Contest, contenders: Sequence[str], place: Path, rounds: int, threads: int) -> dict[str, object]:
    """All contenders in turn, round by round, after a section each."""
    (place / "stand_in").mkdir(exist_ok=True)
    (place / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
    common = dict(os.environ) | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
    common |= {"XDG_CACHE_HOME": str(place / "cache")}
    common |= {name: str(place) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    ours = common | {"PYTHONPATH": str(REPOSITORY)}
    theirs = common | {"PYTHONPATH": str(place / "stand_in")}
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name in contenders:
            output = place / f"{contest.name}_{name}"
            shutil.rmtree(output, ignore_errors=True)
            images = contest.images if number >= 0 else contest.first
            words = command(name, contest, images, output, threads)
            measured = run(words, theirs if name == THEIRS else ours)
            print(f"{contest.name}, round {number + 1}: {name} {measured.seconds:.1f} s", file=sys.stderr, flush=True)
            if number >= 0:
                found[name].append(measured)
    reference = place / f"{contest.name}_{THEIRS}"
    others = [name for name in contenders if name != THEIRS]
    result: dict[str, object] = {
        name: [{"seconds": m.seconds, "cpu_seconds": m.cpu_seconds, "memory_bytes": m.memory_bytes} for m in runs]
        for name, runs in found.items()
    }
    nnunet = found[THEIRS]
    return {
        "runs": result,
        "ratio": {
            n: statistics.median(b.seconds / a.seconds for a, b in zip(found[n], nnunet, strict=True)) for n in others
        },
        "cpu_ratio": {
            n: statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in zip(found[n], nnunet, strict=True))
            for n in others
        },
        "memory_ratio": max(m.memory_bytes for n in others for m in found[n]) / min(m.memory_bytes for m in nnunet),
        "disagreement": {n: disagreement(place / f"{contest.name}_{n}", reference) for n in others},
    }


def shown(name: str, found: dict[str, object]) -> str:
    """A contest's figures as lines."""
    lines = [name]
    for contender, runs in found["runs"].items():  # type: ignore[attr-defined]
        seconds = [r["seconds"] for r in runs]
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        line = f"  {contender:8} min {low:7.1f} s  median {middle:7.1f} s  max {high:7.1f} s"
        line += f"  CPU {statistics.median(r['cpu_seconds'] for r in runs):7.1f} s"
        line += f"  memory {max(r['memory_bytes'] for r in runs) / 1e9:5.2f} GB"
        if contender != THEIRS:
            ratio, cpu = found["ratio"][contender], found["cpu_ratio"][contender]  # type: ignore[index]
            line += f"  nnU-Net / ours {ratio:5.2f} (CPU {cpu:5.2f})"
            line += f"  labels that differ {found['disagreement'][contender]:.1e}"  # type: ignore[index]
        lines.append(line)
    return "\n".join([*lines, f"  most memory of ours / least of nnU-Net's: {found['memory_ratio']:.2f}"])


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 sections instead of 100; a volume of 2 sections")
    parser.add_argument("--contests", nargs="+", default=["sections", "volume"], choices=["sections", "volume"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--mirror", action="store_true", help="also in the contest 'volume', which then takes 4 times as long"
    )
    parser.add_argument("--at-least", type=float, default=0.0, help="smallest ratio nnU-Net / ours that passes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
        return 0
    print(f"{platform.platform()}, torch {torch.__version__}, {words.threads} thread(s), {words.rounds} round(s)")
    possible = variants_here()
    words.variants = [name for name in words.variants if name != "fast" or name in possible]
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for contest in contests(data, place, words.contests, quick=words.quick, mirror=words.mirror):
            found = measure(contest, [THEIRS, *words.variants], place, words.rounds, words.threads)
            results[contest.name] = found
            print(shown(contest.name, found), flush=True)
    ratios = {v: min(r["ratio"][v] for r in results.values()) for v in words.variants}  # type: ignore[index]
    if words.json:
        summary = {
            "ratio": ratios,
            "memory_ratio": max(r["memory_ratio"] for r in results.values()),  # type: ignore[type-var]
            "disagreement": {v: max(r["disagreement"][v] for r in results.values()) for v in words.variants},  # type: ignore[index]
            "contests": results,
        }
        words.json.write_text(json.dumps(summary, indent=1))
    return 1 if min(ratios.values()) < words.at_least else 0


if __name__ == "__main__":
    sys.exit(main())
