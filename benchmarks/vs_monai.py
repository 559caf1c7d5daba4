"""Our network loop against MONAI's ``sliding_window_inference``: same model, same image, same machine, turn by turn.

MONAI is given the normalised image, nnU-Net's network, half overlapping windows and a Gaussian as wide as nnU-Net's,
one window at a time, which is its fastest way on the CPU (``--batch``). Ours starts from the raw image: by PyTorch
(``torch``), by OpenVINO in float32 (``exact``) and in bfloat16 (``fast``). Nobody mirrors, since MONAI does not. Prints
seconds, the median of the ratios MONAI / ours round by round, and for each the share of labels that differ from
nnU-Net's own. Sections are cut to a size that no grid favours: where a size less a window is a multiple of half the
window, MONAI's windows lie where nnU-Net's do. Exits with 1 where a ratio is below what is asked for, or more labels of
a trained model differ than by MONAI.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from contest import (
    REFERENCE,
    THEIRS,
    VARIANTS,
    Contest,
    Run,
    Turns,
    conclude,
    machine,
    normalised,
    ours,
    real_contests,
    shared_data,
    spread,
    take_turns,
    theirs,
    trained_contests,
    variants_here,
)
from monai.inferers import sliding_window_inference

import oracle

MONAI = "MONAI"
NNUNETS_SIGMA = 0.125  # of the window's size
ANY_SIZE = (slice(0, 900), slice(0, 1000))
QUICK_SIZE = (slice(0, 500), slice(0, 600))


def contests(data: Path, folder: Path, *, quick: bool) -> Iterator[Contest]:
    """Those of ``vs_nnunet.py`` without mirroring, sections cut to a size that no grid favours."""
    for contest in trained_contests(data, quick=quick):
        if not contest.mirror:
            flat = contest.image.shape[1] == 1
            cut = QUICK_SIZE if quick else ANY_SIZE
            yield replace(contest, image=contest.image[:, :, *cut]) if flat else contest
    if not quick:
        yield from (contest for contest in real_contests(data, folder) if not contest.mirror)


def monais(contest: Contest, threads: int, batch: int) -> Run:
    """MONAI's loop on the normalised image; returns labels."""
    predictor = oracle.make_predictor(contest.model, [contest.fold], mirror=False)
    network = predictor.network.eval()
    patch = predictor.configuration_manager.patch_size
    image = torch.from_numpy(normalised(contest.image))[None]
    flat = len(patch) == 2

    def run() -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            logits = sliding_window_inference(
                image[:, :, 0] if flat else image, patch, batch, network, 0.5, "gaussian", NNUNETS_SIGMA
            )[0]
        labels: np.ndarray = predictor.label_manager.convert_logits_to_segmentation(logits).numpy()
        return labels[None] if flat else labels

    return run


def measure(contest: Contest, words: argparse.Namespace, variants: list[str]) -> dict[str, object]:
    """All in turn; nnU-Net once, for its labels."""
    runs = {MONAI: monais(contest, words.threads, words.batch)}
    runs |= {v: ours(contest, words.threads, VARIANTS[v]) for v in variants}
    turns = take_turns(runs, words.rounds)
    turns = Turns(turns.seconds, turns.answers | {THEIRS: theirs(contest, words.threads)()})
    result = {
        "contest": contest.title,
        "trained": contest.trained,
        "seconds": turns.seconds,
        "ratio": {v: turns.ratio(v, MONAI) for v in variants},
        "disagreement": {name: turns.differ(name, THEIRS) for name in runs},
    }
    print(contest.title)
    for name, seconds in turns.seconds.items():
        differ = f"  labels that differ from nnU-Net {turns.differ(name, THEIRS):.1e}" if contest.trained else ""
        print(f"{spread(name, seconds)}  ratio {turns.ratio(name, MONAI):5.2f}{differ}", flush=True)
    return result


def summary(results: list[dict[str, object]], variants: list[str]) -> dict[str, dict[str, float]]:
    """The smallest ratio of all contests, and of trained models the largest disagreement."""
    trained = [r["disagreement"] for r in results if r["trained"]]
    return {
        "ratio": {v: min(r["ratio"][v] for r in results) for v in variants},  # type: ignore[index]
        "disagreement": {name: max(t[name] for t in trained) for name in (MONAI, *variants)},  # type: ignore[index]
    }


def failures(words: argparse.Namespace, found: dict[str, dict[str, float]]) -> list[str]:
    asked = {REFERENCE: words.at_least, "exact": words.exact_at_least, "fast": words.fast_at_least}
    slow = [f"{v} is {r:.2f} < {asked[v]}" for v, r in found["ratio"].items() if r < asked[v]]
    differ = found["disagreement"]
    most = differ[MONAI]
    return slow + [f"{v} differs in {differ[v]:.1e} > {most:.1e}" for v in found["ratio"] if differ[v] > most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small section, for CI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="windows that MONAI computes at a time")
    parser.add_argument("--at-least", type=float, default=0.9, help="smallest ratio MONAI / ours by torch that passes")
    parser.add_argument("--exact-at-least", type=float, default=0.0, help="the same by OpenVINO in float32")
    parser.add_argument("--fast-at-least", type=float, default=0.0, help="the same in bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    data = shared_data()
    if data is None:
        return 0
    host, variants = machine(words.threads), variants_here()
    print(host)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(c, words, variants) for c in contests(data, Path(folder), quick=words.quick)]
    found = summary(results, variants)
    return conclude(failures(words, found), found | {"machine": host, "contests": results}, words.json)


if __name__ == "__main__":
    sys.exit(main())
