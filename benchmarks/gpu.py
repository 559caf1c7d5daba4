"""Slices a second on GPUs, of a 2D architecture as nnU-Net plans it (random weights), with and without mirroring.

A slice is counted from its raw voxels in memory to its labels in memory. Prints, for each size, precision and batch:
slices a second (median of the rounds), their arithmetic as a share of the matrix product measured in the same process,
and the peak of the device's memory; then ways of running one batch of windows (kernel by kernel or as a graph, channels
first or last), and how much N processes, one a GPU, do together beside N times one. Needs CUDA: exits with 2 without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

FEATURES = (32, 64, 128, 256, 512, 512, 512, 512)
PATCH = (384, 512)
SIZES = (512, 1024)
PRODUCT = 8192  # rows and columns of the matrices that peak is measured with
MIRRORINGS = 4  # passes a window with mirroring along y and x
ABSENT = 2


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """What is measured: edge of a slice, precision, mirroring, rows of a forward pass."""

    size: int
    precision: str
    mirror: bool
    batch: int


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    run: Callable[[], object], device: torch.device, rounds: int, warm: Callable[[], None] | None = None
) -> float:
    """Median seconds of a run, after one that is not counted and, if given, ``warm``."""
    run()
    wait_for(device)
    if warm is not None:
        warm()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_flops(device: torch.device, precision: str, edge: int = PRODUCT) -> float:
    """Operations a second of a matrix product in float16 (fast) or float32 without TF32 (exact)."""
    dtype = torch.float32 if precision == "exact" else torch.float16
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return float(2 * edge**3 / timed(lambda: a @ b, device, 7))


def slices_a_second(
    model: Path, terms: BackendRequest, device: str, slices: int, rounds: int, warm: Callable[[], None] | None = None
) -> dict[str, object]:
    """Label ``slices`` sections of noise, each a case of its own."""
    from connectomics.core.geometry import Box
    from connectomics.lightning.inference import InferenceManager

    from parity_table import ArrayVolume

    words = [f"system.device={device}", f"inference.precision={terms.precision}", "model.folds=[0]"]
    words += [f"inference.test_time_augmentation.enabled={str(terms.mirror).lower()}"]
    words += [f"inference.sliding_window.sw_batch_size={terms.batch}"]
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    engine = InferenceManager.from_checkpoint(model, words).engine
    image = np.random.default_rng(0).integers(1, 255, (1, slices, terms.size, terms.size), np.uint8)
    reader, whole = ArrayVolume(image), Box.of_shape((slices, terms.size, terms.size))
    surveyed = engine.segmenter.survey(reader, "noise")
    seconds = timed(lambda: engine.segmenter.segment(reader.read, surveyed, whole), where, rounds, warm)
    windows = engine.segmenter.windows(reader.read, surveyed, whole) * (MIRRORINGS if terms.mirror else 1)
    return asdict(terms) | {
        "class": dict(engine.settings.numeric_class),
        "notes": list(engine.identity.notes),
        "slices_a_second": slices / seconds,
        "windows_a_second": windows / seconds,
        "memory_gb": torch.cuda.max_memory_reserved(where) / 1e9 if where.type == "cuda" else None,
    }


def window_flops(model: Path) -> int:
    """Operations of one pass of one window, as PyTorch counts them."""
    network, patch = network_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        network.to("meta")(torch.zeros(1, 1, *patch))
    return int(counter.get_total_flops())


def network_of(model: Path) -> tuple[torch.nn.Module, tuple[int, ...]]:
    from connectomics.assembly.engine.models import load_models
    from connectomics.assembly.settings import model_settings
    from connectomics.config.schema import DataConfig, ModelConfig

    ((_, loaded),) = load_models(model_settings(ModelConfig(folds=["0"]), DataConfig(), model))
    return loaded.networks[0], loaded.spec.patch_shape


def ways(model: Path, device: str, batch: int, rounds: int) -> dict[str, float]:
    """Windows a second of one batch, by each way of running it."""
    from connectomics.models.backends.cuda import CudaBackend, Recorded
    from connectomics.models.backends.precisions import FAST
    from connectomics.models.backends.torch_eager import TorchBackend

    def unrecorded(run: Callable[[], torch.Tensor]) -> Recorded:
        raise RuntimeError("not recorded, to compare")

    network, patch = network_of(model)
    shape, where = (batch, 1, patch[0], patch[1], patch[2]), torch.device(device)
    windows = torch.randn(shape, device=where)
    found = {}
    plain = TorchBackend(network, device=device, batch=batch, threads=1, precision=FAST)
    found["autocast"] = batch / timed(lambda: plain.forward(windows), where, rounds)
    for last in (False, True):
        for graph in (False, True) if where.type == "cuda" else (False,):
            recorder = None if graph else unrecorded
            made = CudaBackend(network, device=device, shape=shape, threads=1, channels_last=last, recorder=recorder)
            name = f"channels {'last' if last else 'first'}, {'graph' if graph else 'kernel by kernel'}"
            found[name] = batch / timed(lambda made=made: made.forward(windows), where, rounds)
            made.close()
    return found


def scaling(model: Path, devices: Sequence[str], words: argparse.Namespace) -> dict[int, float]:
    """Slices a second of 1, 2, 4 … and all GPUs, a process each, which begin together."""
    counts = sorted({2**n for n in range(len(devices).bit_length()) if 2**n <= len(devices)} | {len(devices)})
    found = {}
    for count in counts:
        own = [sys.executable, __file__, "--worker", str(model), "--batch", str(max(words.batch))]
        own += ["--rounds", str(words.rounds), "--slices", str(words.slices)]
        workers = [
            subprocess.Popen([*own, "--device", d], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for d in devices[:count]
        ]
        for worker in workers:
            line = "-"
            while line not in ("ready\n", ""):
                line = pipe(worker.stdout).readline()
        for worker in workers:  # all are ready, and begin together
            pipe(worker.stdin).write("go\n")
            pipe(worker.stdin).flush()
        found[count] = sum(float(worker.communicate()[0]) for worker in workers)
    return found


def pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


def work(words: argparse.Namespace) -> int:
    """One process of ``scaling``."""

    def wait() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    terms = BackendRequest(SIZES[0], "fast", True, words.batch[0])
    found = slices_a_second(words.worker, terms, words.device, words.slices, words.rounds, wait)
    print(found["slices_a_second"])
    return 0


def measure(model: Path, devices: Sequence[str], words: argparse.Namespace) -> dict[str, object]:
    """Everything, printed as it comes."""
    device, flops = torch.device(devices[0]), window_flops(model)
    print(f"{flops / 1e9:.1f} GFLOP a window of {PATCH}, mirrored {MIRRORINGS} times as many")
    peaks = {precision: peak_flops(device, precision) for precision in words.precision}
    for precision, peak in peaks.items():
        print(f"peak of {precision}: {peak / 1e12:.1f} TFLOP/s")
    rows = []
    for precision in words.precision:
        for size in SIZES:
            for mirror in (False, True):
                for batch in words.batch:
                    terms = BackendRequest(size, precision, mirror, batch)
                    row = slices_a_second(model, terms, devices[0], words.slices, words.rounds)
                    row["share_of_peak"] = float(str(row["windows_a_second"])) * flops / peaks[precision]
                    rows.append(row)
                    print_row(row)
    found: dict[str, object] = {"gflop_a_window": flops / 1e9, "peak_flops": peaks, "slices": rows}
    found["windows_a_second"] = by_way = ways(model, devices[0], max(words.batch), words.rounds)
    for name, rate in by_way.items():
        print(f"{name:32} {rate:8.1f} windows a second, {rate / by_way['autocast']:5.2f} of autocast")
    found["scaling"] = together = scaling(model, devices, words)
    for count, rate in together.items():
        print(
            f"{count} GPU(s): {rate:8.1f} slices of {SIZES[0]}² a second, {rate / (count * together[1]):.2f} of linear"
        )
    return found


def print_row(row: dict[str, object]) -> None:
    """A line of the table."""
    memory = "" if row["memory_gb"] is None else f", {row['memory_gb']:5.1f} GB"
    print(
        f"{row['size']:5}² {row['precision']:5} {'mirrored' if row['mirror'] else 'plain':8} batch {row['batch']:2}: "
        f"{row['slices_a_second']:8.2f} slices a second, {row['share_of_peak']:6.1%} of peak{memory}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few slices and rounds, fast and one batch only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="rows of a forward pass")
    parser.add_argument("--precision", nargs="+", default=["fast", "exact"], choices=["fast", "exact"])
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda:0", help=argparse.SUPPRESS)
    words = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"error: this measures CUDA devices, and PyTorch {torch.__version__} finds none; run it on a machine with "
            "an NVIDIA GPU, its driver and a PyTorch built for CUDA. Nothing was measured.",
            file=sys.stderr,
        )
        return ABSENT
    if words.worker:
        return work(words)
    if words.quick:
        words.slices, words.rounds, words.batch, words.precision = 8, 2, [4], ["fast"]
    from nnunet_models import make_model

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    machine = f"{len(devices)} × {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(machine)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), dimensions=2, patch=PATCH, features=FEATURES, convolutions=2)
        found = measure(model, devices, words)
    if words.json:
        words.json.write_text(json.dumps({"machine": machine} | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
