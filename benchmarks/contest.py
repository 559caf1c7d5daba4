"""What the benchmarks against others share: models and images, our loop and nnU-Net's, and how they take turns."""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from connectomics.core.geometry import Box  # noqa: E402
from connectomics.execution.stage import LABELS  # noqa: E402
from connectomics.lightning.inference import InferenceManager  # noqa: E402
from connectomics.stages.survey.survey import survey  # noqa: E402

import oracle  # noqa: E402
from conftest import shared_data_folder  # noqa: E402
from nnunet_models import make_model  # noqa: E402
from parity_table import ArrayVolume  # noqa: E402

THEIRS = "nnU-Net"
REFERENCE = "torch"
REAL_PATCH = (384, 512)
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


def real_2d(folder: Path) -> Path:
    """A model of the 2D architecture that nnU-Net plans for the mitochondria (46 M parameters), random weights."""
    features = (32, 64, 128, 256, 512, 512, 512, 512)
    return make_model(folder, dimensions=2, patch=REAL_PATCH, features=features, convolutions=2)


def real_contests(data: Path, folder: Path) -> Iterator[Contest]:
    """Architectures as nnU-Net plans them, random weights, few windows of real EM: what is judged is time."""
    raw = sections(data)
    flat = real_2d(folder / "2d")
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


def shared_data() -> Path | None:
    """The folder of the shared models and sections; says so where there is none."""
    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
    return data


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
    whole = Box.of_shape(reader.info.extent)
    return lambda: segmenter.segment(reader.read, [[case]], whole)[LABELS][0]


def normalised(image: np.ndarray) -> np.ndarray:
    """As nnU-Net's z-score does it."""
    image = image.astype(np.float32)
    return (image - image.mean()) / image.std()


def theirs(contest: Contest, threads: int) -> Run:
    """nnU-Net's loop on the normalised image; returns labels."""
    predictor = oracle.make_predictor(contest.model, [contest.fold], mirror=contest.mirror)
    image = torch.from_numpy(normalised(contest.image))

    def run() -> np.ndarray:
        torch.set_num_threads(threads)
        logits = predictor.predict_logits_from_preprocessed_data(image)
        return predictor.label_manager.convert_logits_to_segmentation(logits).numpy()

    return run


def variants_here() -> list[str]:
    """Those of ``VARIANTS`` whose backend is installed and whose numbers the processor has; says what is left out."""
    if not importlib.util.find_spec("openvino"):
        print("OpenVINO is not installed: by PyTorch only")
        return [REFERENCE]
    import openvino

    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return list(VARIANTS)
    print("fast is left out: this processor has no bfloat16")
    return [name for name in VARIANTS if name != "fast"]


def machine(threads: int) -> str:
    """What the figures were taken on; sets PyTorch's threads."""
    torch.set_num_threads(threads)
    return f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {threads} thread(s)"


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each round by contender, and the answer (labels) that each gave every time."""

    seconds: dict[str, list[float]]
    answers: dict[str, Any]

    def ratio(self, name: str, to: str) -> float:
        """The median, round by round, of the seconds of ``to`` over those of ``name``."""
        return statistics.median(b / a for a, b in zip(self.seconds[name], self.seconds[to], strict=True))

    def differ(self, name: str, other: str) -> float:
        """The share of labels in which the two differ."""
        return float((self.answers[name] != self.answers[other]).mean())


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    same: Callable[[Any, Any], bool] = np.array_equal,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Run all in turn, after one warm-up each; the answers of every round are the ``same`` as those of the warm-up."""
    answers = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            found = run()
            seconds[name].append(clock() - began)
            assert same(found, answers[name]), f"{name} gave another answer the second time"
    return Turns(seconds, answers)


def spread(name: str, values: list[float]) -> str:
    """A line's beginning: the seconds of a contender."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"  {name:8} min {low:7.2f} s  median {middle:7.2f} s  max {high:7.2f} s"


def conclude(wrong: list[str], figures: Mapping[str, object], file: Path | None) -> int:
    """Write the figures where asked to, say what is not as asked for; the exit code."""
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")
    print("; ".join(wrong) if wrong else "all as asked for")
    return 1 if wrong else 0
