"""The parity table: pairwise-chosen models and images, each labelled by us and by nnunetv2 itself.

Used by tests/parity and by benchmarks/parity.py, which prints it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from connectomics.geometry import Box
from connectomics.io.volume import VolumeInfo
from connectomics.lightning.inference import InferenceManager
from connectomics.pipeline.survey import survey

import oracle
from nnunet_models import make_model

FACTORS: dict[str, tuple[object, ...]] = {
    "dimensions": (2, 3),
    "architecture": ("plain", "resenc"),
    "channels": (1, 2),
    "situation": ("whole", "small", "border", "folds", "no mirroring"),
    "by_slice": (True, False),
    "scheme": ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization"),
    "dtype": ("uint8", "uint16", "float32"),
}


TOP = {"uint8": 255.0, "uint16": 4000.0, "float32": 3.0}  # brightest intensity
CT = (20.0, 230.0, 120.0, 40.0)  # lower, upper, mean, std in the plans that make_model writes


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One row of the table; ``by_slice`` says whether each section is a case (2D image reader)."""

    dimensions: int
    architecture: str
    channels: int
    situation: str
    by_slice: bool
    scheme: str
    dtype: str

    @property
    def title(self) -> str:
        """Short name for a test id or a table."""
        scheme = self.scheme.removesuffix("Normalization")
        unit = "slice" if self.by_slice else "volume"
        return f"{self.dimensions}D {self.architecture} {self.channels}ch {self.situation} {unit} {scheme} {self.dtype}"

    @property
    def top(self) -> float:
        """Brightest intensity; the CT constants of the plans ask for 8 bit values."""
        return TOP["uint8"] if self.scheme == "CTNormalization" else TOP[self.dtype]


def all_cases() -> list[ParityCase]:
    """Every combination that exists: single 2D images are a 2D matter."""
    combinations = (ParityCase(*values) for values in itertools.product(*FACTORS.values()))  # type: ignore[arg-type]
    return [c for c in combinations if not (c.by_slice and c.dimensions == 3)]


def pairwise_cases() -> list[ParityCase]:
    """A greedy covering: every pair of values of two factors that occurs at all occurs in some case."""

    def pairs(case: ParityCase) -> set[tuple[object, ...]]:
        values = astuple(case)
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}

    candidates = {case: pairs(case) for case in all_cases()}
    open_pairs = set().union(*candidates.values())
    chosen = []
    while open_pairs:
        best = max(candidates, key=lambda case: len(candidates[case] & open_pairs))
        chosen.append(best)
        open_pairs -= candidates[best]
    return chosen


def patch_of(case: ParityCase) -> tuple[int, ...]:
    return (32, 48) if case.dimensions == 2 else (16, 24, 16)


LEVELS = (0.15, 0.5, 0.9)  # mean intensity of the three classes, as a share of the range
TRAINING_STEPS = 80


def scene(channels: int, extent: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of three brightnesses with noise, (c, z, y, x) in 0 to 1, and their classes (z, y, x)."""
    random = np.random.default_rng(seed)
    sigma = [0.0 if n < 5 else 4.0 for n in extent]
    field = gaussian_filter(random.standard_normal(extent), sigma)
    classes = np.digitize(field, np.quantile(field, (0.5, 0.8)))
    noise = 0.03 * random.standard_normal((channels, *extent))
    return np.clip(np.asarray(LEVELS)[classes] + noise, 0.02, 1.0), classes


def image_of(case: ParityCase, seed: int = 0) -> np.ndarray:
    """An image (c, z, y, x) whose extents and zeros fit the situation."""
    extent: tuple[int, ...] = (3, 75, 101) if case.dimensions == 2 else (27, 40, 37)
    if case.situation == "small":
        extent = (2, 19, 61) if case.dimensions == 2 else (9, 31, 11)
    image, _ = scene(case.channels, extent, seed)
    image = (image * case.top).astype(case.dtype)
    if case.situation == "border":
        image[:, :, :5] = 0
        image[:, :, :, -9:] = 0
        image[:, 0] = 0
        image[:, 1, :, :4] = 0
    return image


def train(network: torch.nn.Module, case: ParityCase) -> None:
    """Teach nnU-Net's network the scene's classes, so that its logits are as decided as a trained model's."""
    torch.set_num_threads(1)
    patch = patch_of(case)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(TRAINING_STEPS):
        pairs = [scene(case.channels, (1,) * (3 - len(patch)) + patch, 1000 + 2 * step + i) for i in range(2)]
        image = np.stack([normalised(case, image) for image, _ in pairs]).astype(np.float32)
        classes = torch.from_numpy(np.stack([classes for _, classes in pairs]))
        batch = torch.from_numpy(image)
        if case.dimensions == 2:
            batch, classes = batch[:, :, 0], classes[:, 0]
        loss = torch.nn.functional.cross_entropy(network(batch)[0], classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def normalised(case: ParityCase, image: np.ndarray) -> np.ndarray:
    """A training scene as the model will see it: in the range its normalisation gives."""
    scaled = image * case.top
    if case.scheme == "ZScoreNormalization":
        axes = tuple(range(1, scaled.ndim))
        return (scaled - scaled.mean(axes, keepdims=True)) / scaled.std(axes, keepdims=True)
    if case.scheme == "CTNormalization":
        lower, upper, mean, std = CT
        return (np.clip(scaled, lower, upper) - mean) / std
    return image if case.scheme == "RescaleTo01Normalization" else scaled


def model_of(case: ParityCase, folder: Path) -> Path:
    return make_model(
        folder,
        dimensions=case.dimensions,
        architecture=case.architecture,
        channels=case.channels,
        classes=3,
        patch=patch_of(case),
        folds=("0", "1") if case.situation == "folds" else ("0",),
        mirror_axes=tuple(range(case.dimensions)),
        reader="NaturalImage2DIO" if case.by_slice else "SimpleITKIO",
        scheme=case.scheme,
        seed=3,
        give_weights=functools.partial(train, case=case),
    )


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Voxels, those that differ from the oracle and from stock nnU-Net, labels that occur, probability error."""

    voxels: int
    differ: int
    differ_stock: int
    labels: int
    probability_error: float


def compare(case: ParityCase, folder: Path) -> ParityResult:
    """Label one image with both and count what differs."""
    torch.set_num_threads(1)
    model, image = model_of(case, folder), image_of(case)
    mirror = case.situation != "no mirroring"
    words = [
        "system.device=cpu",
        "system.num_cpus=1",
        f"inference.test_time_augmentation.enabled={str(mirror).lower()}",
        "inference.output.save_probabilities=true",
    ]
    manager = InferenceManager.from_checkpoint(model, words)
    ours = manager.predict(image)
    folds = manager.engine.spec.folds
    predictor = oracle.make_predictor(model, folds, mirror=mirror)
    reader = ArrayVolume(image)
    cases = survey(reader, "image", manager.engine.segmenter.members[0].schemes, by_slice=case.by_slice)
    differ, stock, error = 0, 0, 0.0
    for c in cases:
        part = image[(slice(None), *c.region.slices)]
        summaries = c.channels if case.scheme == "ZScoreNormalization" else None
        labels = oracle.predict(predictor, part, summaries=summaries)
        _, probabilities = oracle.predict(predictor, part, summaries=summaries, probabilities=True)
        mine = ours.labels[c.region.slices]
        differ += int((labels != mine).sum())
        stock += int((oracle.predict(predictor, part, exact=False) != mine).sum())
        assert ours.probabilities is not None
        gap = np.abs(probabilities - ours.probabilities[(slice(None), *c.region.slices)])
        error = max(error, float(gap.max()))
    return ParityResult(ours.labels.size, differ, stock, len(np.unique(ours.labels)), error)


class ArrayVolume:
    """A VolumeReader over an array (c, z, y, x)."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.info = VolumeInfo(image.shape, image.dtype, (1, *image.shape[2:]))  # type: ignore[arg-type]
        self.identity: dict[str, object] = {}

    def read(self, box: Box) -> np.ndarray:
        return self.image[(slice(None), *box.slices)]

    def close(self) -> None: ...
