"""Seconds and memory to load a large model: the checkpoint, its converted copy, its exported zip, and torch.load.

Makes a residual network of about 270 MB of weights with nnunetv2's own classes, or takes ``--model``. Every way runs in
a process of its own, in turn, ``--rounds`` times; prints medians. Memory is what the process grew by and what
stays, after importing and after loading a small model.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from connectomics.models.checkpoint import load_model  # noqa: E402
from connectomics.models.conversion import convert_model  # noqa: E402
from connectomics.models.locate import ModelRequest  # noqa: E402

EMBEDDED = REPOSITORY / "connectomics" / "example" / "phantom_mito_2d"
FEATURES = (32, 64, 128, 256, 512, 768, 768, 768)


def resident_bytes() -> int:
    """Memory of this process that no file backs."""
    return int(psutil.Process().memory_full_info().uss)


def load_once(path: Path, by_torch: bool) -> None:
    """Load and print seconds, what stays in memory, and the size of the weights."""
    load_model(ModelRequest(EMBEDDED))
    before, began, cpu_began = resident_bytes(), time.perf_counter(), time.process_time()
    if by_torch:
        kept = [torch.load(file, map_location="cpu", weights_only=False) for file in sorted(path.glob("*/*.pth"))]
        needed = 0
    else:
        loaded = load_model(ModelRequest(path))
        kept = list(loaded.networks)
        needed = sum(4 * p.numel() for network in loaded.networks for p in network.parameters())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    stays = resident_bytes() - before
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds, "stays_bytes": stays, "weights_bytes": needed}))
    del kept


def large_model(folder: Path) -> Path:
    """A residual network of nnunetv2's, as wide as those for large GPUs, with random weights."""
    from nnunet_models import make_model

    return make_model(
        folder,
        dimensions=2,
        patch=(128, 128),
        features=FEATURES,
        architecture="resenc",
        give_weights=lambda network: None,
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a training folder of one fold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--by-torch", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.once:
        load_once(words.once, words.by_torch)
        return
    with tempfile.TemporaryDirectory() as place:
        model = words.model or large_model(Path(place, "made"))
        copy = Path(place, "copy")
        copy.mkdir()
        convert_model(ModelRequest(model), copy)
        packed = Path(shutil.make_archive(str(Path(place, "packed")), "zip", model))
        ways = {"checkpoint": [model], "converted": [copy], "zip": [packed], "torch.load": [model, "--by-torch"]}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(words.rounds):
            for name, arguments in ways.items():
                command = [sys.executable, __file__, "--once", *map(str, arguments)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        size = sum(file.stat().st_size for file in model.glob("*/*.pth"))
    weights = found["checkpoint"][0]["weights_bytes"]
    print(
        f"{platform.platform()}, torch {torch.__version__}; {size / 1e6:.0f} MB on disk, "
        f"{weights / 1e6:.0f} MB of weights"
    )
    print(f"{'':12} {'seconds':>8} {'CPU seconds':>12} {'of the checkpoint':>18} {'MB that stay':>13}")
    base = statistics.median(run["seconds"] for run in found["checkpoint"])
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        stays = statistics.median(run["stays_bytes"] for run in runs) / 1e6
        cpu = statistics.median(run["cpu"] for run in runs)
        print(f"{name:12} {seconds:8.2f} {cpu:12.2f} {seconds / base:18.2f} {stays:13.0f}")


if __name__ == "__main__":
    main()
