"""The network loop against nnU-Net's own predictor: same model, same image, same machine, turn by turn.

Each contender starts from the raw image in memory and ends with its labels: nnU-Net as it ships (half precision
accumulators), ours by PyTorch (``torch``), by OpenVINO in float32 (``exact``) and in bfloat16 (``fast``). Prints
seconds (min, median, max), the median of the ratios nnU-Net / ours round by round, and the share of labels that differ
from nnU-Net's and from PyTorch's in float32. Exits with 1 where a ratio is below what is asked for, or trained models
disagree more than ``--most``. Other programs on the machine slow every contender alike, but ratios then scatter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from contest import (
    REFERENCE,
    THEIRS,
    VARIANTS,
    Contest,
    conclude,
    machine,
    ours,
    real_contests,
    shared_data,
    spread,
    take_turns,
    theirs,
    trained_contests,
    variants_here,
)


def measure(contest: Contest, variants: list[str], rounds: int, threads: int) -> dict[str, object]:
    """All contenders in turn on one image."""
    runs = {THEIRS: theirs(contest, threads)} | {v: ours(contest, threads, VARIANTS[v]) for v in variants}
    turns = take_turns(runs, rounds)
    return {
        "contest": contest.title,
        "trained": contest.trained,
        "seconds": turns.seconds,
        "ratio": {name: turns.ratio(name, THEIRS) for name in variants},
        "disagreement": {name: turns.differ(name, REFERENCE) for name in variants},
        "from nnU-Net": {name: turns.differ(name, THEIRS) for name in variants},
    }


def show(result: dict[str, object]) -> None:
    print(result["contest"])
    for name, values in result["seconds"].items():  # type: ignore[attr-defined]
        line = spread(name, values)
        if name != THEIRS:
            ratio, other, stock = (result[k][name] for k in ("ratio", "disagreement", "from nnU-Net"))  # type: ignore[index]
            line += f"  ratio {ratio:5.2f}  labels that differ from torch {other:.1e}, from nnU-Net {stock:.1e}"
        print(line, flush=True)


def summary(results: list[dict[str, object]], variants: list[str]) -> dict[str, dict[str, float]]:
    """The smallest ratio of all contests and the largest disagreement of trained models, by variant."""
    ratios = {v: min(r["ratio"][v] for r in results) for v in variants}  # type: ignore[index]
    trained = [r["disagreement"] for r in results if r["trained"]]
    return {"ratio": ratios, "disagreement": {v: max((t[v] for t in trained), default=0.0) for v in variants}}  # type: ignore[index]


def failures(words: argparse.Namespace, found: dict[str, dict[str, float]]) -> list[str]:
    asked = {REFERENCE: words.at_least, "exact": words.exact_at_least, "fast": words.fast_at_least}
    slow = [f"{v} is {r:.2f} < {asked[v]}" for v, r in found["ratio"].items() if r < asked[v]]
    most = {REFERENCE: 0.0, "exact": 1e-5, "fast": words.most}
    return slow + [f"{v} disagrees in {d:.1e} > {most[v]:.0e}" for v, d in found["disagreement"].items() if d > most[v]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short form for CI")
    parser.add_argument("--real", action="store_true", help="real architectures only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--at-least", type=float, default=0.95, help="smallest ratio nnU-Net / ours by torch that passes"
    )
    parser.add_argument("--exact-at-least", type=float, default=0.0, help="the same by OpenVINO in float32")
    parser.add_argument("--fast-at-least", type=float, default=0.0, help="the same in bfloat16")
    parser.add_argument("--most", type=float, default=1e-3, help="largest share of labels that fast may change")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    data = shared_data()
    if data is None:
        return 0
    variants = variants_here()
    host = machine(words.threads)
    print(host)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        contests = [] if words.real else list(trained_contests(data, quick=words.quick))
        if not words.quick:
            contests += real_contests(data, Path(folder))
        for contest in contests:
            results.append(measure(contest, variants, words.rounds, words.threads))
            show(results[-1])
    found = summary(results, variants)
    figures = found | {"machine": host, "contests": results}
    return conclude(failures(words, found), figures, words.json)


if __name__ == "__main__":
    sys.exit(main())
