"""How much of what this machine can multiply the network gets: the real 2D architecture by each backend, turn by turn.

The peak is that of the fastest of some matrix products by PyTorch and by OpenVINO, found first and then repeated in
each round, in float32 for ``exact`` and in bfloat16 for ``fast``. The network is one window of 384 x 512 of the
architecture nnU-Net plans for the mitochondria, random weights; its operations are those of its convolutions, counted
by PyTorch's counter, so whatever else it does (normalisation, skips) is time lost. Prints GFLOP/s of all threads
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
from torch.utils.flop_counter import FlopCounterMode

from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import Networks, Terms, choose
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
    networks = Networks((network,), f"{by} {precision}", shape[1], (shape[2], shape[3], shape[4]))
    chosen = choose(by, Terms("cpu", precision, shape[0], threads), [networks], Artefacts(None))
    batch = torch.randn(shape)
    return lambda: chosen.backends[0][0].forward(batch)


def products(precision: str, threads: int) -> Iterator[tuple[float, Forward]]:
    """Operations and a run of each kind of product."""
    for rows, inner, columns in SIZES:
        a = torch.randn(rows, inner).to(TYPES[precision])
        b = torch.randn(inner, columns).to(TYPES[precision])
        layer = nn.Linear(inner, columns, bias=False)
        runs = (partial(torch.mm, a, b), forward(layer, (1, 1, 1, rows, inner), BEST, precision, threads))
        times = math.ceil(REPEATED / (2 * rows * inner * columns))
        for run in runs:
            yield 2 * rows * inner * columns * times, partial(repeated, run, times)


def repeated(run: Forward, times: int) -> torch.Tensor:
    """The last answer of several runs."""
    return [run() for _ in range(times)][-1]


def fastest_product(precision: str, threads: int, clock: Clock) -> tuple[float, Forward]:
    """That of the highest rate, by the better of two runs."""

    def rate(candidate: tuple[float, Forward]) -> float:
        work, run = candidate
        return work / min(take_turns({PRODUCT: run}, 2, torch.equal, clock).seconds[PRODUCT])

    return max(products(precision, threads), key=rate)


def operations(network: nn.Module) -> int:
    """Floating point operations of the network's convolutions for one window."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(SHAPE))
    return int(counter.get_total_flops())


def measure(backends: list[str], rounds: int, threads: int, clock: Clock) -> tuple[float, dict[str, list[float]]]:
    """GFLOP of the network, and GFLOP/s by round of "what by precision"."""
    runs: dict[str, Forward] = {}
    work: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (network,) = load_model(ModelRequest(real_2d(Path(folder)))).networks
        flops = operations(network)
        for precision in TYPES:
            name = f"{PRODUCT} best {precision}"
            work[name], runs[name] = fastest_product(precision, threads, clock)
            for by in backends:
                name = f"{NETWORK} {by} {precision}"
                work[name], runs[name] = flops, forward(network, SHAPE, by, precision, threads)
        seconds = take_turns(runs, rounds, torch.equal, clock).seconds
    cores = threads if clock is time.process_time else 1
    rates = {name: [cores * work[name] / s / 1e9 for s in found] for name, found in seconds.items()}
    return flops / 1e9, rates


def shares(rates: dict[str, list[float]], by: str) -> dict[str, float]:
    """What a backend's network gets of the peak in each precision, the median round by round."""
    return {
        p: statistics.median(
            a / b for a, b in zip(rates[f"{NETWORK} {by} {p}"], rates[f"{PRODUCT} best {p}"], strict=True)
        )
        for p in TYPES
    }


def show(rates: dict[str, list[float]], share: dict[str, dict[str, float]]) -> None:
    """A line for each contender: its lowest, median and highest rate."""
    for name, found in rates.items():
        what, by, precision = name.split()
        line = f"  {name:24} GFLOP/s {min(found):6.1f} {statistics.median(found):6.1f} {max(found):6.1f}"
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
