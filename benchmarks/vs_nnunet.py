"""The network loop against nnU-Net's own predictor: same model, same image, same machine, turn by turn.

Each contender starts from the raw image in memory and ends with its labels: nnU-Net as it ships (half precision
accumulators), ours by PyTorch (``torch``), by OpenVINO in float32 (``exact``) and in bfloat16 (``fast``). Prints
seconds (min, median, max), the median of the ratios nnU-Net / ours round by round, and the share of labels that differ
from nnU-Net's and from PyTorch's in float32. Exits with 1 where a ratio is below what is asked for, or trained models
disagree more than ``--most``. Other programs on the machine slow every contender alike, but ratios then scatter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from nnunet_models import make_model  # noqa: E402
from parity_table import ArrayVolume  # noqa: E402

THEIRS = "nnU-Net"
REFERENCE = "torch"
VARIANTS = {
    REFERENCE: ("system.backend=torch",),
    "exact": ("system.backend=openvino",),
    "fast": ("system.backend=openvino", "inference.precision=fast"),
}
Run = Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Contest:
    """One model with or without mirroring on one image (c, z, y, x)."""

    model: Path
    fold: str
    mirror: bool
    image: np.ndarray
    trained: bool
    name: str

    @property
    def title(self) -> str:
        return f"{self.name}, {'mirrored' if self.mirror else 'not mirrored'}"


def trained_contests(data: Path, *, quick: bool) -> Iterator[Contest]:
    """The shared models on real EM; ``quick``: less than half of a section, 2D only."""
    raw = sections(data)
    section = raw[12][:640, :640] if quick else raw[12]
    for mirror in (False,) if quick else (False, True):
        yield Contest(data / "models" / "vnc_mito_2d", "0", mirror, section[None, None], True, "trained 2D, 2 classes")
    if quick:
        return
    yield Contest(data / "models" / "vnc_multi_2d", "all", False, section[None, None], True, "trained 2D, 5 classes")
    stack = raw[:, 512:1024, 768:1024].reshape(16, 256, 2, 128, 2).mean((2, 4)).astype(np.uint8)
    yield Contest(data / "models" / "vnc_mito_3d", "0", False, stack[None], True, "trained 3D, 2 classes")


def real_contests(data: Path, folder: Path) -> Iterator[Contest]:
    """Architectures as nnU-Net plans them, random weights, few windows of real EM: what is judged is time."""
    raw = sections(data)
    flat = make_model(
        folder / "2d", dimensions=2, patch=(384, 512), features=(32, 64, 128, 256, 512, 512, 512, 512), convolutions=2
    )
    for mirror in (False, True):
        yield Contest(flat, "0", mirror, raw[12][None, None, :384, :768], False, "real 2D architecture, 2 windows")
    deep = make_model(
        folder / "3d",
        dimensions=3,
        patch=(32, 128, 128),
        features=(32, 64, 128, 256, 320),
        convolutions=2,
        reader="Tiff3DIO",
    )
    stack = np.concatenate([raw, raw[::-1]])[None, :, :128, :128]
    yield Contest(deep, "0", False, stack, False, "real 3D architecture, 1 window")


def sections(data: Path) -> np.ndarray:
    """The shared sections, uint8 (z, y, x)."""
    return np.stack([np.asarray(Image.open(data / "em" / "vnc" / "raw" / f"{z:02d}.png")) for z in range(16)])


def ours(contest: Contest, threads: int, variant: tuple[str, ...]) -> Run:
    """Our loop: normalise, windows, network, blend; returns labels."""
    words = [
        "system.device=cpu",
        f"system.num_cpus={threads}",
        f"model.folds=[{contest.fold}]",
        f"inference.test_time_augmentation.enabled={str(contest.mirror).lower()}",
        *variant,
    ]
    segmenter = InferenceManager.from_checkpoint(contest.model, words).engine.segmenter
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


def theirs(contest: Contest, threads: int) -> Run:
    """nnU-Net's loop on the normalised image; returns labels."""
    predictor = oracle.make_predictor(contest.model, [contest.fold], mirror=contest.mirror)
    image = contest.image.astype(np.float32)
    image = (image - image.mean()) / image.std()

    def run() -> np.ndarray:
        torch.set_num_threads(threads)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
        return predictor.label_manager.convert_logits_to_segmentation(logits).numpy()

    return run


def measure(contest: Contest, variants: list[str], rounds: int, threads: int) -> dict[str, object]:
    """Run all in turn, one warm-up each; the labels of every round are those of the warm-up."""
    runs = {THEIRS: theirs(contest, threads)} | {v: ours(contest, threads, VARIANTS[v]) for v in variants}
    labels = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            found = run()
            seconds[name].append(time.perf_counter() - began)
            assert np.array_equal(found, labels[name]), f"{name} gave other labels the second time"

    def ratio(name: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[THEIRS], strict=True))

    def differ(other: str) -> dict[str, float]:
        return {name: float((labels[name] != labels[other]).mean()) for name in variants}

    return {
        "contest": contest.title,
        "trained": contest.trained,
        "seconds": seconds,
        "ratio": {name: ratio(name) for name in variants},
        "disagreement": differ(REFERENCE),
        "from nnU-Net": differ(THEIRS),
    }


def show(result: dict[str, object]) -> None:
    print(result["contest"])
    for name, values in result["seconds"].items():  # type: ignore[attr-defined]
        low, middle, high = min(values), statistics.median(values), max(values)
        line = f"  {name:8} min {low:7.2f} s  median {middle:7.2f} s  max {high:7.2f} s"
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
    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
        return 0
    variants = list(VARIANTS) if importlib.util.find_spec("openvino") else [REFERENCE]
    torch.set_num_threads(words.threads)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {words.threads} thread(s)"
    print(machine)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        contests = [] if words.real else list(trained_contests(data, quick=words.quick))
        if not words.quick:
            contests += real_contests(data, Path(folder))
        for contest in contests:
            results.append(measure(contest, variants, words.rounds, words.threads))
            show(results[-1])
    found = summary(results, variants)
    if words.json:
        words.json.write_text(json.dumps(found | {"machine": machine, "contests": results}, indent=1) + "\n")
    wrong = failures(words, found)
    print("; ".join(wrong) if wrong else "all ratios and labels are as asked for")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
