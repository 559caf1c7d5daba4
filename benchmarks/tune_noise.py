"""How often ``connectomics tune`` would take one way for a faster one although both are the same.

The same backend is measured several times over, turn by turn, as tune does; each pair is one trial. Printed for several
numbers of passes: the share of pairs of which one seems to save 5 %, and of those that tune's own rule believes.

Measured on two cores (AVX512) that others used, load 3.2:
    passes  pairs   5 % faster  believed
         3   2400         0.39      0.05
         5   1500         0.36      0.01
         9    600         0.34      0.00
        15    300         0.32      0.00
        25    300         0.28      0.00
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from connectomics.assembly.engine.backends import trial_backends
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.engine.rules import make_window
from connectomics.assembly.settings import resolve
from connectomics.config.load import load_config
from connectomics.planning.profile import WORTH, Profile, Trial

MODEL = Path(__file__).parents[1] / "connectomics" / "example" / "phantom_mito_2d"
PASSES = (3, 5, 9, 15, 25)
COPIES = 6


def measured(rounds: int) -> list[np.ndarray]:
    """Of each round, seconds of a window [copy, pass] of the same backend, turn by turn."""
    stated = resolve(load_config(None, ["system.device=cpu", "system.num_cpus=1"]), MODEL)
    models = [model for _, model in load_models(stated.models)]
    patches = [make_window(stated.windows, None, model.spec).patch for model in models]
    trial = Trial("torch", "exact", 1, 1)
    copies = [trial_backends(stated.networks, models, patches, trial).backends[0][0] for _ in range(COPIES)]
    window = torch.rand((1, models[0].spec.input_channels, *patches[0]))
    found = []
    for _ in range(rounds):
        seconds = np.empty((COPIES, max(PASSES)))
        for turn, copy in itertools.product(range(max(PASSES)), range(COPIES)):
            began = time.perf_counter()
            copies[copy].forward(window)
            seconds[copy, turn] = time.perf_counter() - began
        found.append(seconds)
    return found


def trial_of(seconds: np.ndarray, batch: int) -> Trial:
    """What tune keeps of some passes."""
    quick, middle, slow = (float(s) for s in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return replace(Trial("torch", "exact", batch, 1, middle, 1.0, 0.0), quick_s=quick, slow_s=slow)


def shares(rounds: list[np.ndarray], passes: int) -> tuple[int, float, float]:
    """Pairs, and the shares that seem faster and that are believed to be."""
    seem, believed = [], []
    for seconds in rounds:
        for first in range(0, seconds.shape[1] - passes + 1, passes):
            for a, b in itertools.permutations(seconds[:, first : first + passes], 2):
                seem.append(np.median(a) <= (1 - WORTH) * np.median(b))
                (best, *_) = Profile((trial_of(a, 4), trial_of(b, 1))).fastest("exact", None, 1)
                believed.append(best.batch == 4)
    return len(seem), float(np.mean(seem)), float(np.mean(believed))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    words = parser.parse_args()
    rounds = measured(1 if words.quick else 10)
    table = {passes: shares(rounds, passes) for passes in PASSES}
    print(f"{'passes':>6} {'pairs':>6} {'5 % faster':>12} {'believed':>9}")
    for passes, (pairs, seem, believed) in table.items():
        print(f"{passes:6} {pairs:6} {seem:12.2f} {believed:9.2f}")
    if words.json is not None:
        named = {n: dict(zip(("pairs", "seem", "believed"), row, strict=True)) for n, row in table.items()}
        words.json.write_text(json.dumps(named, indent=1))


if __name__ == "__main__":
    main()
