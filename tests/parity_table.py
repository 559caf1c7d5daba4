"""The parity table: pairwise-chosen models and images, each labelled by us and by nnunetv2 itself.

Used by tests/parity and by benchmarks/parity.py, which prints it.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from connectomics.core.geometry import AxisOrder, Block, BlockGrid, Vec3
from connectomics.lightning.inference import InferenceManager
from connectomics.volumes.in_memory import ArrayVolume

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
    "labels": ("plain", "regions"),
    "turned": (False, True),
    "spacing": ("planned", "even", "thick", "torch even", "torch thick", "no resampling"),
    "masked": (False, True),
    "stage": ("alone", "ensemble", "cascade"),
}
SHORT = 16  # of the pairwise cases, those of the short form
COMMON = 7  # the first factors, all combinations of which are run by themselves; the rest are run with each other


TOP = {"uint8": 255.0, "uint16": 4000.0, "float32": 3.0}  # brightest intensity
CT = (20.0, 230.0, 120.0, 40.0)  # lower, upper, mean, std in the plans that make_model writes
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
ORDER = {2: (0, 2, 1), 3: (2, 0, 1)}
SPACINGS = {"even": ((1.0, 1.0, 1.0), (1.0, 1.2, 0.9)), "thick": ((4.0, 1.0, 1.0), (5.0, 1.2, 0.9))}  # plan, image
TORCH = {f"resampling_fn_{what}": "resample_torch_fornnunet" for what in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{what}_kwargs": {
        "is_seg": what == "seg",
        "force_separate_z": None,
        "memefficient_seg_resampling": False,
    }
    for what in ("data", "seg", "probabilities")
}
NONE = {f"resampling_fn_{what}": "no_resampling_hack" for what in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{what}_kwargs": {} for what in ("data", "seg", "probabilities")
}


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
    labels: str = "plain"
    turned: bool = False
    spacing: str = "planned"
    masked: bool = False
    stage: str = "alone"

    @property
    def title(self) -> str:
        """Short name for a test id or a table."""
        scheme = self.scheme.removesuffix("Normalization")
        unit = "slice" if self.by_slice else "volume"
        title = (
            f"{self.dimensions}D {self.architecture} {self.channels}ch {self.situation} {unit} {scheme} {self.dtype}"
        )
        special = [
            word for word in (self.labels, self.spacing, self.stage) if word not in ("plain", "planned", "alone")
        ]
        return " ".join([title, *special, *["turned"] * self.turned, *["masked"] * self.masked])

    @property
    def exists(self) -> bool:
        """Single images are a 2D matter and are not resampled; only z-scores know a mask."""
        flat = self.dimensions == 2 and self.spacing == "planned"
        maskable = self.scheme == "ZScoreNormalization" and not (self.by_slice and self.stage == "cascade")
        return (flat or not self.by_slice) and (maskable or not self.masked)

    @property
    def top(self) -> float:
        """Brightest intensity; the CT constants of the plans ask for 8 bit values."""
        return TOP["uint8"] if self.scheme == "CTNormalization" else TOP[self.dtype]

    @property
    def axis_order(self) -> Vec3:
        """The model's order of axes."""
        return ORDER[self.dimensions] if self.turned else (0, 1, 2)

    @property
    def spacings(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Of the plan, in the model's axes, and of the image, in its own; None where nothing is resampled."""
        if self.spacing == "planned":
            return None
        planned, own = SPACINGS[self.spacing.rpartition(" ")[2] if self.spacing != "no resampling" else "even"]
        order = AxisOrder(self.axis_order).inverse.axes
        return planned[3 - self.dimensions :], [own[axis] for axis in order]


def all_cases() -> list[ParityCase]:
    """Every combination of the common factors, and every combination of the special ones, on changing common ones."""
    values = list(FACTORS.values())
    common = [ParityCase(*c) for c in itertools.product(*values[:COMMON])]  # type: ignore[arg-type]
    common = [case for case in common if case.exists]
    special, random = [], np.random.default_rng(1)
    for kinds in itertools.product(*values[COMMON:]):
        fitting = (
            replace(common[i], **dict(zip(list(FACTORS)[COMMON:], kinds, strict=True)))  # type: ignore[arg-type]
            for i in random.permutation(len(common))
        )
        special += [next(case for case in fitting if case.exists and case.dimensions == n) for n in (2, 3)]
    return list(dict.fromkeys([*common, *special]))


@functools.cache
def pairs_of(case: ParityCase) -> frozenset[tuple[object, ...]]:
    """The pairs of values of two factors that occur in a case."""
    values = [getattr(case, name) for name in FACTORS]
    return frozenset((i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2))


@functools.cache
def pairwise_cases() -> list[ParityCase]:
    """A greedy covering: every pair of values of two factors that occurs at all occurs in some case."""
    random = np.random.default_rng(0)

    def drawn(count: int) -> list[ParityCase]:
        cases = (ParityCase(*(v[random.integers(len(v))] for v in FACTORS.values())) for _ in range(count))  # type: ignore[arg-type]
        return [case for case in cases if case.exists]

    open_pairs = set().union(*map(pairs_of, drawn(5_000)))
    chosen = []
    while open_pairs:
        best = max(drawn(300), key=lambda case: len(pairs_of(case) & open_pairs))
        if pairs_of(best) & open_pairs:
            chosen.append(best)
            open_pairs -= pairs_of(best)
    return chosen


def short_cases() -> list[ParityCase]:
    """The first of the pairwise cases, which are the ones that cover most: at least seven pairs of eight."""
    return pairwise_cases()[:SHORT]


def patch_of(case: ParityCase) -> tuple[int, ...]:
    return (32, 48) if case.dimensions == 2 else (16, 24, 16)


MIRRORED = {  # mirror axes of the model; all three take eight times as long as none
    "whole": lambda dimensions: tuple(range(dimensions)),
    "small": lambda dimensions: tuple(range(dimensions)),
    "border": lambda dimensions: (0,),
    "folds": lambda dimensions: (dimensions - 1,),
    "no mirroring": lambda dimensions: tuple(range(dimensions)),
}
LEVELS = (0.15, 0.5, 0.9)  # mean intensity of the three classes, as a share of the range
TRAINING_STEPS = 160  # with 80, twice as many voxels are so undecided that half precision turns them
FEWER_STEPS = 80  # where nothing is computed in half precision


def scene(channels: int, extent: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of three brightnesses with noise, (c, z, y, x) in 0 to 1, and their classes (z, y, x)."""
    random = np.random.default_rng(seed)
    sigma = [0.0 if n < 5 else 4.0 for n in extent]
    field = gaussian_filter(random.standard_normal(extent), sigma)
    classes = np.digitize(field, np.quantile(field, (0.5, 0.8)))
    noise = 0.03 * random.standard_normal((channels, *extent))
    return np.clip(np.asarray(LEVELS)[classes] + noise, 0.02, 1.0), classes


def extent_of(case: ParityCase, *, quick: bool = False) -> tuple[int, ...]:
    if case.situation == "small":
        return (2, 19, 61) if case.dimensions == 2 else (9, 31, 11)
    if case.dimensions == 2:
        return (2, 52, 70) if quick and not asks_stock(case) else (3, 75, 101)
    return (20, 30, 27) if quick else (27, 40, 37)


def previous_of(case: ParityCase, *, seed: int = 0, quick: bool = False) -> np.ndarray | None:
    """What the first stage of a cascade may have found: the classes (z, y, x), displaced."""
    return displaced(scene(case.channels, extent_of(case, quick=quick), seed)[1]) if case.stage == "cascade" else None


def displaced(classes: np.ndarray) -> np.ndarray:
    return np.roll(classes, (1, -2), (-2, -1))


def image_of(case: ParityCase, *, seed: int = 0, quick: bool = False) -> np.ndarray:
    """An image (c, z, y, x) whose extents and zeros fit the situation."""
    extent = extent_of(case, quick=quick)
    image, _ = scene(case.channels, extent, seed)
    image = (image * case.top).astype(case.dtype)
    if case.situation == "border":
        image[:, :, :5] = 0
        image[:, :, :, -9:] = 0
        image[:, 0] = 0
        image[:, 1, :, :4] = 0
    if case.masked:
        z, y, x = np.indices(extent)
        image[:, y + x < 12] = 0  # a corner, outside of the mask
        image[:, (y - extent[1] // 2) ** 2 + (x - extent[2] // 2) ** 2 + (2 * z - extent[0]) ** 2 < 9] = 0  # a hole
    return image


def train(network: torch.nn.Module, case: ParityCase, steps: int = TRAINING_STEPS, *, quick: bool = True) -> None:
    """Teach nnU-Net's network the scene's classes, so that its logits are as decided as a trained model's.

    ``quick`` shows it pieces of half the patch along each axis.
    """
    torch.set_num_threads(1)
    patch = tuple(n // 2 for n in patch_of(case)) if quick else patch_of(case)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        pairs = [scene(case.channels, (1,) * (3 - len(patch)) + patch, 1000 + 2 * step + i) for i in range(2)]
        image = np.stack([seen(case, *pair) for pair in pairs]).astype(np.float32)
        classes = torch.from_numpy(np.stack([classes for _, classes in pairs]))
        batch = torch.from_numpy(image)
        if case.dimensions == 2:
            batch, classes = batch[:, :, 0], classes[:, 0]
        loss = _loss(case.labels == "regions", network(batch)[0], classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def train_second_stage(network: torch.nn.Module, *, regions: bool = False, steps: int = 20) -> None:
    """Teach a second stage classes that are the sum of what the image shows and of what the first stage found."""
    first = next(network.parameters())
    dimensions, channels = first.ndim - 2, first.shape[1] - 2
    patch = (16, 24) if dimensions == 2 else (8, 16, 16)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        image, own = scene(channels, (1,) * (3 - dimensions) + patch, 3000 + step)
        found = np.roll(own, (step % 5, 2), (1, 2))
        image = (image - image.mean((1, 2, 3), keepdims=True)) / image.std((1, 2, 3), keepdims=True)
        stacked = np.concatenate([image, [found == 1, found == 2]]).astype(np.float32)
        batch, classes = torch.from_numpy(stacked)[None], torch.from_numpy((own + found) // 2)[None]
        if dimensions == 2:
            batch, classes = batch[:, :, 0], classes[:, 0]
        loss = _loss(regions, network(batch)[0], classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _loss(regions: bool, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    if not regions:
        return torch.nn.functional.cross_entropy(logits, classes)
    inside = torch.stack([classes > 0, classes > 1], dim=1).float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, inside)


def seen(case: ParityCase, image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A training scene's input channels: the normalised image, in a cascade also displaced labels one by one."""
    image = normalised(case, image)
    if case.stage != "cascade":
        return image
    return np.concatenate([image, [displaced(classes) == label for label in (1, 2)]])


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


def model_of(case: ParityCase, folder: Path, steps: int = TRAINING_STEPS, *, quick: bool = False) -> Path:
    """A trained model; ``quick`` takes a network of two stages instead of three, and shows it smaller pieces."""
    planned = None if case.spacings is None else case.spacings[0]
    functions = {"torch even": TORCH, "torch thick": TORCH, "no resampling": NONE}
    return make_model(
        folder,
        dimensions=case.dimensions,
        architecture=case.architecture,
        channels=case.channels,
        classes=3,
        patch=patch_of(case),
        folds=("0", "1") if case.situation == "folds" else ("0",),
        mirror_axes=MIRRORED[case.situation](case.dimensions),
        reader="NaturalImage2DIO" if case.by_slice else "SimpleITKIO",
        scheme=case.scheme,
        seed=3,
        features=(4, 8) if quick else (4, 8, 12),
        give_weights=functools.partial(train, case=case, steps=steps, quick=quick),
        labels=REGIONS if case.labels == "regions" else None,
        regions_class_order=[1, 2] if case.labels == "regions" else None,
        spacing=planned,
        axis_order=case.axis_order,
        resampling=functions.get(case.spacing),
        masked=[case.masked] * case.channels,
        previous_stage="3d_lowres" if case.stage == "cascade" else None,
    )


def partner_of(case: ParityCase) -> ParityCase:
    """The second model of an ensemble: of the other dimension, other plans and other normalisation."""
    other = "NoNormalization" if case.scheme == "RescaleTo01Normalization" else "RescaleTo01Normalization"
    return replace(
        case,
        dimensions=5 - case.dimensions,
        architecture="plain",
        situation="no mirroring" if case.situation == "no mirroring" else "border",
        by_slice=False,
        scheme=other,
        turned=False,
        spacing="planned" if case.spacing == "planned" else "even",
        masked=False,
        stage="alone",
    )


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Voxels, those that differ from the oracle, from stock nnU-Net (if asked) and when cut into blocks, labels that
    occur, probability error."""

    voxels: int
    differ: int
    differ_stock: int | None
    differ_cut: int
    labels: int
    probability_error: float


def asks_stock(case: ParityCase) -> bool:
    """Whether the short form compares with stock nnU-Net too, for which a network must be trained for longer."""
    return case.dimensions == 2 and case.stage == "alone"


def compare(case: ParityCase, folder: Path, *, quick: bool = False) -> ParityResult:
    """Label one image with both and count what differs.

    ``quick`` takes smaller networks, a smaller image in 3D, asks stock nnU-Net of single models in 2D only, and
    computes two of the blocks that the image is cut into, others in each case.
    """
    stock = not quick or asks_stock(case)
    torch.set_num_threads(1)
    image = image_of(case, quick=quick)
    members = [case, partner_of(case)] if case.stage == "ensemble" else [case]
    previous = previous_of(case, quick=quick)
    steps = TRAINING_STEPS if stock else FEWER_STEPS
    models = [model_of(member, folder / str(i), steps, quick=quick) for i, member in enumerate(members)]
    mirror = case.situation != "no mirroring"
    words = [
        "system.device=cpu",
        "system.num_cpus=1",
        f"inference.test_time_augmentation.enabled={str(mirror).lower()}",
        "inference.output.save_probabilities=true",
        "inference.allow_large_resampling=true",
        f"inference.resample={'off' if case.spacings is None else 'plan'}",
        f"model.ensemble={json.dumps([str(m) for m in models[1:]]) if models[1:] else 'null'}",
    ]
    manager = InferenceManager.from_checkpoint(models[0], words)
    spacing = None if case.spacings is None else case.spacings[1]
    ours = manager.predict(image, spacing, previous)  # type: ignore[arg-type]
    assert ours.probabilities is not None
    read = None if previous is None else ArrayVolume(previous[None]).read
    segmenter, reader = manager.segmenter(spacing, read), ArrayVolume(image)  # type: ignore[arg-type]
    surveyed = segmenter.survey(reader, "image")
    exact, halves = [], []
    for model, member, cases, engine_model in zip(models, members, surveyed, manager.engine.models, strict=True):
        predictor = oracle.make_predictor(model, engine_model.spec.folds, mirror=mirror)
        zscore = member.scheme == "ZScoreNormalization"
        exact.append(oracle.predict_cases(predictor, image, cases, spacing, inject=zscore, previous=previous))
        if stock:
            halves.append(oracle.predict_cases(predictor, image, cases, spacing, exact=False, previous=previous))
    label_manager = predictor.label_manager
    labels, probabilities = oracle.ensembled(label_manager, exact)
    differ_cut = 0
    grid = list(BlockGrid(image.shape[1:], (2, 17, 40) if case.dimensions == 2 else (11, 40, 19)))  # type: ignore[arg-type]
    for block in random.Random(case.title).sample(grid, min(len(grid), 2) if quick else len(grid)):
        part = segmenter.segment(reader.read, surveyed, block.core)
        whole = ours.probabilities[(slice(None), *block.core.slices)], ours.labels[block.core.slices]
        differ_cut += int((part["probabilities"] != whole[0]).any(0).sum() + (part["labels"][0] != whole[1]).sum())
    return ParityResult(
        ours.labels.size,
        int((labels != ours.labels).sum()),
        int((oracle.ensembled(label_manager, halves)[0] != ours.labels).sum()) if stock else None,
        differ_cut,
        len(np.unique(ours.labels)),
        float(np.abs(probabilities - ours.probabilities).max()),
    )


def some_of(grid: BlockGrid, count: int | None, seed: int = 0) -> list[Block]:
    """The first and the last block and ``count`` others, or all blocks, in any order."""
    blocks, generator = list(grid), random.Random(seed)
    if count is not None and len(blocks) > count + 2:
        blocks = [blocks[0], blocks[-1], *generator.sample(blocks[1:-1], count)]
    generator.shuffle(blocks)
    return blocks
