"""The network loop against nnU-Net's own predictor: same model, same section, same machine, turn by turn.

Both start from the raw section in memory and end with its logits (nnU-Net: half precision accumulators, as it ships).
Prints seconds (min, median, max) and the ratio nnU-Net / ours pair by pair; exits with 1 below ``--at-least``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from connectomics.geometry import Box  # noqa: E402
from connectomics.inference.case import CaseInput  # noqa: E402
from connectomics.lightning.inference import InferenceManager  # noqa: E402
from connectomics.pipeline.survey import survey  # noqa: E402

import oracle  # noqa: E402
from conftest import shared_data_folder  # noqa: E402
from parity_table import ArrayVolume  # noqa: E402


@dataclass(frozen=True, slots=True)
class Contest:
    """One model with and without mirroring on one image (c, z, y, x)."""

    model: str
    fold: str
    mirror: bool
    image: np.ndarray

    @property
    def title(self) -> str:
        return f"{self.model} fold {self.fold}, {'mirrored' if self.mirror else 'not mirrored'}"


def contests(data: Path, *, quick: bool) -> list[Contest]:
    """The shared models on real EM; ``quick``: one quarter of a section, 2D only."""
    raw = [np.asarray(Image.open(data / "em" / "vnc" / "raw" / f"{z:02d}.png")) for z in range(16)]
    section = raw[12][:640, :640] if quick else raw[12]
    mirrorings = (False,) if quick else (False, True)
    found = [Contest("vnc_mito_2d", "0", mirror, section[None, None]) for mirror in mirrorings]
    if not quick:
        found.append(Contest("vnc_multi_2d", "all", False, section[None, None]))
        stack = np.stack(raw)[:, 512:1024, 768:1024].reshape(16, 256, 2, 128, 2).mean((2, 4)).astype(np.uint8)
        found.append(Contest("vnc_mito_3d", "0", False, stack[None]))
    return found


def ours(contest: Contest, folder: Path, threads: int) -> Callable[[], np.ndarray]:
    """Our loop: normalise, windows, network, blend; returns labels."""
    words = [
        "system.device=cpu",
        f"system.num_cpus={threads}",
        f"model.folds=[{contest.fold}]",
        f"inference.test_time_augmentation.enabled={str(contest.mirror).lower()}",
    ]
    segmenter = InferenceManager.from_checkpoint(folder, words).engine.segmenter
    reader = ArrayVolume(contest.image)
    (member,) = segmenter.members
    (case,) = survey(reader, "image", member.schemes, by_slice=False)
    source = CaseInput(case, member.schemes, reader.read)

    def run() -> np.ndarray:
        labels = np.zeros(reader.info.extent, np.uint8)
        for box, logits in member.predictor.predict(source, Box.of_shape(reader.info.extent)):
            labels[box.slices] = segmenter.labels.apply(logits)
        return labels

    return run


def theirs(contest: Contest, folder: Path) -> Callable[[], np.ndarray]:
    """nnU-Net's loop on the normalised image; returns labels."""
    predictor = oracle.make_predictor(folder, [contest.fold], mirror=contest.mirror)
    image = contest.image.astype(np.float32)
    image = (image - image.mean()) / image.std()

    def run() -> np.ndarray:
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
        return predictor.label_manager.convert_logits_to_segmentation(logits).numpy()

    return run


def measure(contest: Contest, folder: Path, rounds: int, threads: int) -> dict[str, object]:
    """Run both in turn, one warm-up each."""
    runs = {"ours": ours(contest, folder, threads), "nnU-Net": theirs(contest, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    labels = {name: run() for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["nnU-Net"], strict=True)]
    return {
        "contest": contest.title,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "disagreement": float((labels["ours"] != labels["nnU-Net"]).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short form for CI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-least", type=float, default=0.95, help="smallest ratio nnU-Net / ours that passes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    words = parser.parse_args()
    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
        return 0
    torch.set_num_threads(words.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {words.threads} thread(s)")
    results = []
    for contest in contests(data, quick=words.quick):
        result = measure(contest, data / "models" / contest.model, words.rounds, words.threads)
        results.append(result)
        print(result["contest"])
        for name, values in result["seconds"].items():  # type: ignore[attr-defined]
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"  {name:8} min {low:7.2f} s  median {middle:7.2f} s  max {high:7.2f} s")
        print(f"  nnU-Net / ours {result['ratio']:.2f}, labels that differ {result['disagreement']:.1e}")
    if words.json:
        words.json.write_text(json.dumps({"results": results, "ratio": {r["contest"]: r["ratio"] for r in results}}))
    slow = [r["contest"] for r in results if r["ratio"] < words.at_least]  # type: ignore[operator]
    print(f"slower than {words.at_least}: {', '.join(map(str, slow))}" if slow else f"all ratios ≥ {words.at_least}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
