"""How much of what this machine can multiply the network gets: the real 2D architecture by each backend, turn by turn.

The peak of a round is the fastest of several matrix products by PyTorch and by OpenVINO, in float32 for ``exact`` and
in bfloat16 for ``fast``. The network is one window of 384 x 512 of the architecture nnU-Net plans for the mitochondria,
random weights; its operations are those of its convolutions without what falls on padding, so whatever else it does
(normalisation, skips) is time lost. A convolution may use caches better than any of the products, so 100 % is no wall.
Prints GFLOP/s of all threads
together and the median of the shares round by round. Seconds are the CPU's (``--clock cpu``), which other programs on
the machine disturb least, but a thread that sleeps costs none: for several threads on a quiet machine there is
``--clock wall``. Exits with 1 where OpenVINO's share is below what is asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from contest import REAL_PATCH, conclude, machine, real_2d, take_turns
from torch import nn
from torch.nn.functional import conv2d

from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import choose
from connectomics.models.backends.contract import BackendRequest, ModelNetworks
from connectomics.models.backends.precisions import precision_named
from connectomics.models.checkpoint import load_model
from connectomics.models.locate import ModelRequest

SHAPE = (1, 1, 1, *REAL_PATCH)
SIZES = ((512, 512, 512), (4096, 576, 64), (2048, 2048, 2048))  # of products: rows, inner, columns
REPEATED = 5e9  # operations of the products in a round, at least
TYPES = {"exact": torch.float32, "fast": torch.bfloat16}
PRODUCT, NETWORK = "product", "network"
BEST = "openvino"
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
Forward = Callable[[], torch.Tensor]
Clock = Callable[[], float]


def forward(network: nn.Module, shape: tuple[int, ...], by: str, precision: str, threads: int) -> Forward:
    """One batch (n, c, z, y, x) through a network by a backend."""
    networks = ModelNetworks((network,), f"{by} {precision}", shape[1], (shape[2], shape[3], shape[4]))
    request = BackendRequest("cpu", precision_named(precision), shape[0], threads)
    chosen = choose(by, request, [networks], Artefacts(None))
    batch = torch.randn(shape)
    return lambda: chosen.backends[0][0].forward(batch)


def products(precision: str, threads: int) -> Iterator[tuple[str, int, Forward]]:
    """Library and size, operations and run of each product."""
    for rows, inner, columns in SIZES:
        a = torch.randn(rows, inner).to(TYPES[precision])
        b = torch.randn(inner, columns).to(TYPES[precision])
        layer = nn.Linear(inner, columns, bias=False)
        times = math.ceil(REPEATED / (2 * rows * inner * columns))
        runs = {"torch": partial(torch.mm, a, b)}
        runs[BEST] = forward(layer, (1, 1, 1, rows, inner), BEST, precision, threads)
        for by, run in runs.items():
            yield f"{by}:{rows}x{inner}x{columns}", 2 * rows * inner * columns * times, partial(repeated, run, times)


def repeated(run: Forward, times: int) -> torch.Tensor:
    """The last answer of several runs."""
    return [run() for _ in range(times)][-1]


def operations(network: nn.Module) -> int:
    """Multiplications and additions of the network's convolutions for one window, those with padding left out."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], result: torch.Tensor) -> None:
        nonlocal total
        (image,) = inputs
        weights = module.weight
        if isinstance(module, nn.ConvTranspose2d):  # its kernel is its stride: each value meets each weight
            total += 2 * image.numel() * weights[0].numel()
        else:
            inside, kernel = torch.ones(1, 1, *image.shape[2:]), torch.ones(1, 1, *weights.shape[2:])
            met = conv2d(inside, kernel, stride=module.stride, padding=module.padding)
            total += 2 * int(met.sum(dtype=torch.float64)) * weights.shape[0] * weights.shape[1]

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    with torch.inference_mode():
        network(torch.zeros(SHAPE))
    for hook in hooks:
        hook.remove()
    return total


def measure(backends: list[str], rounds: int, threads: int, clock: Clock) -> tuple[float, dict[str, list[float]]]:
    """GFLOP of the network, and GFLOP/s by round of "what by precision"."""
    runs: dict[str, Forward] = {}
    work: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        (network,) = load_model(ModelRequest(real_2d(Path(folder)))).networks
        flops = operations(network)
        for precision in TYPES:
            for by, flop, run in products(precision, threads):
                name = f"{PRODUCT} {by} {precision}"
                work[name], runs[name] = flop, run
            for by in backends:
                name = f"{NETWORK} {by} {precision}"
                work[name], runs[name] = flops, forward(network, SHAPE, by, precision, threads)
        seconds = take_turns(runs, rounds, torch.equal, clock).seconds
    cores = threads if clock is time.process_time else 1
    rates = {name: [cores * work[name] / s / 1e9 for s in found] for name, found in seconds.items()}
    return flops / 1e9, rates


def shares(rates: dict[str, list[float]], by: str) -> dict[str, float]:
    """What a backend's network gets of the peak in each precision, the median round by round."""
    found = {}
    for precision in TYPES:
        peaks = [r for name, r in rates.items() if name.startswith(PRODUCT) and name.endswith(precision)]
        network = rates[f"{NETWORK} {by} {precision}"]
        found[precision] = statistics.median(n / max(peak) for n, *peak in zip(network, *peaks, strict=True))
    return found


def show(rates: dict[str, list[float]], share: dict[str, dict[str, float]]) -> None:
    """A line for each contender: its lowest, median and highest rate."""
    for name, found in rates.items():
        what, by, precision = name.split()
        line = f"  {name:37} GFLOP/s {min(found):6.1f} {statistics.median(found):6.1f} {max(found):6.1f}"
        print(line + (f"  {share[by][precision]:4.0%} of the peak" if what == NETWORK else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="OpenVINO alone, 3 rounds, for CI")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["torch", BEST], choices=["torch", "compile", BEST])
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help="which seconds count")
    parser.add_argument("--exact-at-least", type=float, default=0.0, help="smallest share by OpenVINO that passes")
    parser.add_argument("--fast-at-least", type=float, default=0.0, help="the same in bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    if importlib.util.find_spec(BEST) is None:
        print("OpenVINO is not installed; nothing measured")
        return 0
    host = f"{machine(words.threads)}, {words.clock} seconds"
    backends = [BEST] if words.quick else sorted({*words.backends, BEST})
    gflop, rates = measure(backends, 3 if words.quick else words.rounds, words.threads, CLOCKS[words.clock])
    share = {by: shares(rates, by) for by in backends}
    print(f"{host}; {gflop:.1f} GFLOP a window")
    show(rates, share)
    asked = {"exact": words.exact_at_least, "fast": words.fast_at_least}
    best = share[BEST]
    wrong = [f"{p} gets {best[p]:.0%} < {asked[p]:.0%} of the peak" for p in TYPES if best[p] < asked[p]]
    figures = {"share": best, "share by backend": share, "gflop": gflop, "rates": rates, "machine": host}
    return conclude(wrong, figures, words.json)


if __name__ == "__main__":
    sys.exit(main())
