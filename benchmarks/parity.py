"""Print the parity table of docs/fidelity.md: our labels against nnunetv2's, model by model.

``oracle``: nnunetv2 with float32 accumulators and our exact statistics; ``stock``: nnunetv2 as it ships.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from parity_table import all_cases, compare, pairwise_cases  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every combination instead of a pairwise choice")
    words = parser.parse_args()
    print("| model and image | voxels | differ from oracle | differ from stock | max probability error |")
    print("| --- | ---: | ---: | ---: | ---: |")
    pooled: dict[int, list[int]] = {2: [0, 0, 0], 3: [0, 0, 0]}
    for case in all_cases() if words.all else pairwise_cases():
        with tempfile.TemporaryDirectory() as folder:
            r = compare(case, Path(folder) / "model")
        print(f"| {case.title} | {r.voxels} | {r.differ} | {r.differ_stock} | {r.probability_error:.1e} |", flush=True)
        for i, n in enumerate((r.voxels, r.differ, r.differ_stock)):
            pooled[case.dimensions][i] += n
    for dimensions, (voxels, differ, stock) in pooled.items():
        print(f"| **all {dimensions}D** | {voxels} | {differ} | {stock} ({stock / voxels:.1e}) | |")
    return 1 if any(differ for _, differ, _ in pooled.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
