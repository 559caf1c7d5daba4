"""How much of what this machine can multiply the network gets: the real 2D architecture by each backend, turn by turn.

The peak of a round is the fastest of large matrix products by PyTorch and by OpenVINO, in float32 for ``exact`` and in
bfloat16 for ``fast``. The network is one window of 384 x 512 of the architecture nnU-Net plans for the mitochondria,
random weights; its operations are those of its convolutions, counted by PyTorch's counter, so whatever else it does
(normalisation, skips) counts as time lost. Prints GFLOP/s (median) and the median of the shares round by round, which other
programs on the machine disturb least. Exits with 1 where OpenVINO's share is below what is asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from contest import REAL_PATCH, conclude, machine, real_2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import Networks, Terms, choose
from connectomics.models.checkpoint import load_model
from connectomics.models.locate import ModelRequest

SHAPE = (1, 1, 1, *REAL_PATCH)
ROWS, INNER, COLUMNS = 2048, 4096, 2048
TYPES = {"exact": torch.float32, "fast": torch.bfloat16}
PRODUCT, NETWORK = "product", "network"
Forward = Callable[[], torch.Tensor]


def forward(network: nn.Module, shape: tuple[int, ...], by: str, precision: str, threads: int) -> Forward:
    """One batch (n, c, z, y, x) through a network by a backend."""
    networks = Networks((network,), f"{by} {precision}", shape[1], (shape[2], shape[3], shape[4]))
    chosen = choose(by, Terms("cpu", precision, shape[0], threads), [networks], Artefacts(None))
    batch = torch.randn(shape)
    return lambda: chosen.backends[0][0].forward(batch)


def product(precision: str) -> Forward:
    """A large product of matrices by PyTorch."""
    a = torch.randn(ROWS, INNER).to(TYPES[precision])
    b = torch.randn(INNER, COLUMNS).to(TYPES[precision])
    return lambda: a @ b


def contenders(network: nn.Module, backends: list[str], threads: int) -> dict[str, Forward]:
    """Products and the network, each by name: what, by whom, how precise."""
    runs: dict[str, Forward] = {}
    for precision in TYPES:
        layer = nn.Linear(INNER, COLUMNS, bias=False)
        runs[f"{PRODUCT} torch {precision}"] = product(precision)
        if "openvino" in backends:
            runs[f"{PRODUCT} openvino {precision}"] = forward(
                layer, (1, 1, 1, ROWS, INNER), "openvino", precision, threads
            )
        for by in backends:
            runs[f"{NETWORK} {by} {precision}"] = forward(network, SHAPE, by, precision, threads)
    return runs


def operations(network: nn.Module) -> int:
    """Floating point operations of the network's convolutions for one window."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(SHAPE))
    return int(counter.get_total_flops())


def shares(rates: dict[str, list[float]], precision: str, by: str) -> float:
    """Of the peak, the median round by round."""
    peaks = [r for name, r in rates.items() if name.startswith(PRODUCT) and name.endswith(precision)]
    network = rates[f"{NETWORK} {by} {precision}"]
    return statistics.median(mine / max(best) for mine, *best in zip(network, *peaks, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of OpenVINO alone, for CI")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["torch", "openvino"], help="of torch, openvino, compile")
    parser.add_argument("--exact-at-least", type=float, default=0.0, help="smallest share by OpenVINO that passes")
    parser.add_argument("--fast-at-least", type=float, default=0.0, help="the same in bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    host = machine(words.threads)
    backends = ["openvino"] if words.quick else words.backends
    with tempfile.TemporaryDirectory() as folder:
        (network,) = load_model(ModelRequest(real_2d(Path(folder)))).networks
        flops = operations(network)
        runs = contenders(network, backends, words.threads)
        turns = take_turns(runs, 3 if words.quick else words.rounds, torch.equal)
    work = {name: flops if name.startswith(NETWORK) else 2 * ROWS * INNER * COLUMNS for name in runs}
    rates = {name: [work[name] / s / 1e9 for s in seconds] for name, seconds in turns.seconds.items()}
    print(f"{host}; {flops / 1e9:.1f} GFLOP a window")
    for name, found in rates.items():
        what, by, precision = name.split()
        share = f"  {shares(rates, precision, by):4.0%} of the peak" if what == NETWORK else ""
        print(
            f"  {name:24} min {min(found):6.1f}  median {statistics.median(found):6.1f}  max {max(found):6.1f} GFLOP/s{share}"
        )
    share = {by: {precision: shares(rates, precision, by) for precision in TYPES} for by in backends}
    best = share[backends[-1] if "openvino" not in backends else "openvino"]
    asked = {"exact": words.exact_at_least, "fast": words.fast_at_least}
    wrong = [f"{p} gets {best[p]:.0%} < {asked[p]:.0%} of the peak" for p in TYPES if best[p] < asked[p]]
    figures = {"share": best, "share by backend": share, "gflop": flops / 1e9, "rates": rates, "machine": host}
    return conclude(wrong, figures, words.json)


if __name__ == "__main__":
    sys.exit(main())
