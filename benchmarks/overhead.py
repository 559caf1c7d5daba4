"""Where the time of a run goes beside the network: ``connectomics infer-volume`` with a clock around forward passes.

Each run is a process of its own: sections of real EM on the local disk, a TIFF in, HDF5 out, no mirroring (so that the
share beside the network is at its largest) but in the last comparison. For the architecture that nnU-Net plans for
large sections (random weights) and the small trained model it prints the share of the clock, and of CPU time, that is
not spent in forward passes

* from the first voxel read to the last byte written (``beside``), and
* of the whole process, with Python, PyTorch and the model loaded (``whole``),

and how long the first window takes to come. Then it compares what a pass of the small model costs, mirrored, all
included but starting, in volumes of 64 and of 1,024 windows (``growth``). Exits with 1 where the share of CPU time
beside the small model exceeds ``--most``. CPU time is that of the whole process, on one thread; the clock also counts
what other programs take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

REAL = (32, 64, 128, 256, 512, 512, 512, 512)


def child(words: Sequence[str], figures: Path) -> int:
    """Run the command with clocks around forward passes and around the volume; write what they say."""
    started = psutil.Process().create_time()
    from connectomics.assembly.engine import rules
    from connectomics.cli import main as command
    from connectomics.lightning import inference

    spent = {"network": 0.0, "network_cpu": 0.0, "windows": 0}
    first: list[float] = []

    class Clocked:
        def __init__(self, backend: Any) -> None:
            self._backend = backend
            self.device, self.numeric_class, self.close = backend.device, backend.numeric_class, backend.close

        def forward(self, batch: Any) -> Any:
            first.append(time.time() - started) if not first else None
            began, cpu = time.perf_counter(), time.process_time()
            logits = self._backend.forward(batch)
            spent["network"] += time.perf_counter() - began
            spent["network_cpu"] += time.process_time() - cpu
            spent["windows"] += batch.shape[0]
            return logits

    predictor, run_volume = rules.RollingPredictor, inference.run_any_volume

    def clocked(folds: Any, *rest: Any) -> Any:
        return predictor(tuple(Clocked(backend) for backend in folds), *rest)

    def volume(*arguments: Any, **named: Any) -> Any:
        spent["windows"], before = 0, dict(spent)  # those that a long run is timed by beforehand belong to the whole
        began, cpu = time.perf_counter(), time.process_time()
        try:
            return run_volume(*arguments, **named)
        finally:
            spent["volume"] = time.perf_counter() - began
            spent["volume_cpu"] = time.process_time() - cpu
            for name in ("network", "network_cpu"):
                spent[f"volume_{name}"] = spent[name] - before[name]

    rules.RollingPredictor, inference.run_any_volume = clocked, volume  # type: ignore[misc, assignment]
    code = command(words)
    spent |= {"whole": time.time() - started, "whole_cpu": time.process_time(), "first": first[0]}
    figures.write_text(json.dumps(spent))
    return code


def measured(model: Path, image: Path, place: Path, words: Sequence[str]) -> dict[str, float]:
    """One run; figures of ``child`` and the shares beside the network."""
    figures = place / "figures.json"
    output = tempfile.mkdtemp(dir=place)
    command = [sys.executable, __file__, "--child", str(figures), "infer-volume", "--checkpoint", str(model)]
    command += [f"inference.volume_mode.file_pattern={image}", f"inference.data.output_path={output}"]
    command += ["system.device=cpu", "system.num_cpus=1", f"system.cache_dir={place / 'cache'}"]
    command += ["inference.case=slice", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(figures.read_text())
    for part, network in (("volume", "volume_network"), ("whole", "network")):
        found[f"beside_{part}"] = 1 - found[network] / found[part]
        found[f"beside_{part}_cpu"] = 1 - found[f"{network}_cpu"] / found[f"{part}_cpu"]
    found["per_window"] = found["volume"] / found["windows"]
    found["per_window_cpu"] = found["volume_cpu"] / found["windows"]
    return found


def median(runs: Sequence[dict[str, float]], name: str) -> float:
    """Of one figure."""
    return statistics.median(run[name] for run in runs)


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sections, 64 windows against 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="system.backend")
    parser.add_argument("--most", type=float, help="largest share of CPU time beside the network that passes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    from conftest import shared_data_folder
    from nnunet_models import make_model

    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
        return 0
    print(f"{platform.platform()}, Python {platform.python_version()}, backend {words.backend}, one thread")
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        raw = np.stack(
            [
                tifffile.imread(f) if f.suffix == ".tif" else _png(f)
                for f in sorted((data / "em" / "vnc" / "raw").glob("*.png"))[:16]
            ]
        )
        real = make_model(place / "real", dimensions=2, patch=(384, 512), features=REAL, convolutions=2)
        small = data / "models" / "vnc_mito_2d"
        many = 16 if words.quick else 64
        images = {
            "real": (real, raw[: 1 if words.quick else 4, :768, :1024], False),
            "small": (small, raw[: 4 if words.quick else 16], False),
            "64 windows": (small, raw[:4, :640, :640], True),
            f"{16 * many} windows": (small, np.concatenate([raw[:, :640, :640]] * 4)[:many], True),
        }
        for name, (_, image, _) in images.items():
            tifffile.imwrite(place / f"{name}.tif", image, photometric="minisblack")
        options = [f"system.backend={words.backend}", "model.folds=[0]"]

        def one(name: str) -> dict[str, float]:
            model, _, mirrored = images[name]
            mirror = f"inference.test_time_augmentation.enabled={str(mirrored).lower()}"
            return measured(model, place / f"{name}.tif", place, [*options, mirror])

        one("real"), one("64 windows")  # what is compiled is kept
        for _ in range(words.rounds):
            for name in images:
                runs.setdefault(name, []).append(one(name))
    for name, found in runs.items():
        print(f"{name}: {median(found, 'windows'):.0f} passes, the first after {median(found, 'first'):.1f} s")
        for part in ("volume", "whole"):
            clock, cpu = median(found, f"beside_{part}"), median(found, f"beside_{part}_cpu")
            print(f"  beside the network, {part}: {clock:.1%} of the clock, {cpu:.1%} of CPU time")
        clock, cpu = 1e3 * median(found, "per_window"), 1e3 * median(found, "per_window_cpu")
        print(f"  a pass: {clock:.1f} ms, {cpu:.1f} ms of CPU time")
    few, lots = list(runs.values())[2:]
    growth = {kind: median(lots, kind) / median(few, kind) - 1 for kind in ("per_window", "per_window_cpu")}
    print(f"a pass costs {growth['per_window']:+.1%} of the clock, {growth['per_window_cpu']:+.1%} of CPU time more")
    if words.json:
        words.json.write_text(json.dumps({"runs": runs, "growth": growth}, indent=1))
    return 1 if words.most is not None and median(runs["small"], "beside_volume_cpu") > words.most else 0


def _png(path: Path) -> np.ndarray:
    import imageio.v3 as iio

    return np.asarray(iio.imread(path))


if __name__ == "__main__":
    sys.exit(main())
