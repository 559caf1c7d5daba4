"""What bfloat16 can reach: labels that change where only some of a network's convolutions are rounded.

Rounds what goes into convolutions (and, as libraries store it, what comes out) to bfloat16 while PyTorch computes in
float32: a library that multiplies numbers of bfloat16 has to round these too, however it adds them up. Prints for each
shared trained model, on real EM without mirroring, the share of labels that differ from float32's. The last columns are
for the 2D architecture that nnU-Net plans for the mitochondria: the share of its operations that stays in float32, and
how many times as fast as float32 it can be at most, if bfloat16 alone is ``--gain`` times as fast (``roofline.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contest import REAL_PATCH, REFERENCE, VARIANTS, machine, ours, real_2d, shared_data, trained_contests
from torch.overrides import TorchFunctionMode

from connectomics.models.checkpoint import load_model
from connectomics.models.locate import ModelRequest

PLAIN = (torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose2d, torch.conv_transpose3d)


@dataclass(frozen=True, slots=True)
class Way:
    """What is rounded, and what stays in float32: the last convolution, the outermost stages of the network."""

    name: str
    values: bool = True
    weights: bool = True
    results: bool = False
    head: bool = False
    stages: int = 0


WAYS = (
    Way("all, as libraries do", results=True),
    Way("values and weights"),
    Way("weights alone", values=False),
    Way("values alone", weights=False),
    Way("values and weights, but not the last convolution", head=True),
    *(Way(f"the same, nor the {n} outermost stage(s)", head=True, stages=n) for n in (1, 2, 3)),
)


class Rounding(TorchFunctionMode):
    """Rounds to bfloat16 what a way wants; counts the operations of convolutions by whether they were rounded."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.full = way, 0
        self.operations = {True: 0, False: 0}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Convolutions otherwise, all else as it is."""
        if func not in PLAIN + TRANSPOSED:
            return func(*args, **(kwargs or {}))
        values, weights, *rest = args
        stride = rest[1][-1]
        width = values.shape[-1] * stride if func in TRANSPOSED else values.shape[-1] // stride
        self.full = max(self.full, width)
        outer = self.way.stages > 0 and width >= self.full >> (self.way.stages - 1)
        rounded = not outer and not (self.way.head and weights[0, 0].numel() == 1)
        if rounded:
            values = values.bfloat16().float() if self.way.values else values
            weights = weights.bfloat16().float() if self.way.weights else weights
        found = func(values, weights, *rest, **(kwargs or {}))
        self.operations[rounded] += 2 * (values if func in TRANSPOSED else found).numel() * weights[0].numel()
        return found.bfloat16().float() if rounded and self.way.results else found


def kept_share(network: torch.nn.Module, way: Way) -> float:
    """The share of the real architecture's operations that a way leaves in float32; computes nothing."""
    with Rounding(way) as rounding:
        network(torch.zeros(1, 1, 1, *REAL_PATCH, device="meta"))
    return rounding.operations[False] / sum(rounding.operations.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small section of one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gain", type=float, default=2.0, help="of bfloat16 over float32, in speed")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    data = shared_data()
    if data is None:
        return 0
    print(machine(words.threads))
    contests = [c for c in trained_contests(data, quick=words.quick) if not c.mirror]
    runs = {c.name: ours(c, words.threads, VARIANTS[REFERENCE]) for c in contests}
    exact = {name: run() for name, run in runs.items()}
    with tempfile.TemporaryDirectory() as folder:
        network = load_model(ModelRequest(real_2d(Path(folder)))).networks[0].to("meta")
    print(f"{'rounded to bfloat16':49}", *(f"{name:>21}" for name in runs), "  float32  speed")
    figures = {}
    for way in WAYS:
        differ = {}
        for name, run in runs.items():
            with Rounding(way):
                differ[name] = float((run() != exact[name]).mean())
        kept = kept_share(network, way)
        speed = 1 / (kept + (1 - kept) / words.gain)
        figures[way.name] = {"disagreement": differ, "float32": kept, "speed": speed}
        print(
            f"{way.name:49}", *(f"{share:21.1e}" for share in differ.values()), f"{kept:9.0%} {speed:6.2f}", flush=True
        )
    if words.json:
        words.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
