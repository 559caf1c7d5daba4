"""Resampling to the plan's spacing and back is nnU-Net's, for whole volumes and for any cut."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from connectomics.cli import main
from connectomics.core.errors import ConfigError, ConnectomicsError, ModelError, VolumeError
from connectomics.core.geometry import BlockGrid, Vec3
from connectomics.inference.interpolation import AxisResampling
from connectomics.inference.resample import Resampling
from connectomics.lightning.inference import InferenceManager
from connectomics.models.spec import DEFAULT_RESAMPLING, NO_RESAMPLING, TORCH_RESAMPLING, ResamplingRule
from connectomics.stages.survey.survey import survey

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, scene, some_of

SHARE = 1e-5  # labels that may differ after resampling; every case below gives 0
LARGE = "inference.allow_large_resampling=true"
WORDS = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan's spacing, an image's spacing and extent, and how it is bordered by zeros."""

    dimensions: int
    plan: tuple[float, ...]
    image: tuple[float, float, float]
    extent: tuple[int, int, int]
    border: int = 0
    channels: int = 1
    rules: tuple[tuple[str, object], ...] = ()
    axis_order: tuple[int, int, int] = (0, 1, 2)


def rules(function: str, data: dict[str, object], probabilities: dict[str, object]) -> tuple[tuple[str, object], ...]:
    """The configuration's keys for a resampling function, its arguments for images and for logits."""
    names = {f"resampling_fn_{what}": function for what in ("data", "seg", "probabilities")}
    arguments = {"data": data, "seg": data, "probabilities": probabilities}
    return tuple((names | {f"resampling_fn_{what}_kwargs": given for what, given in arguments.items()}).items())


def default(order: int = 3, back: int = 1, **stated: object) -> tuple[tuple[str, object], ...]:
    arguments = {"is_seg": False, "order_z": 0, "force_separate_z": None, **stated}
    return rules(DEFAULT_RESAMPLING, {**arguments, "order": order}, {**arguments, "order": back, "order_z": 0})


def with_torch(**stated: object) -> tuple[tuple[str, object], ...]:
    arguments = {"is_seg": False, "memefficient_seg_resampling": False, **stated}
    return rules(TORCH_RESAMPLING, arguments, arguments)


TRIALS = {
    "3D finer and coarser": Trial(3, (1.0, 1.0, 1.0), (0.7, 1.3, 0.9), (24, 22, 31)),
    "3D border, two channels": Trial(3, (2.0, 1.0, 1.0), (1.6, 1.2, 0.8), (21, 26, 29), border=3, channels=2),
    "3D thick sections, z kept": Trial(3, (5.0, 1.0, 1.0), (5.0, 1.7, 0.6), (11, 21, 33), border=2),
    "3D thick sections, z changed": Trial(3, (4.0, 1.0, 1.0), (5.3, 1.4, 1.4), (9, 23, 19)),
    "3D larger than a tile": Trial(3, (1.0, 1.0, 1.0), (1.1, 1.0, 1.0), (14, 20, 150)),
    "2D of a volume": Trial(2, (1.0, 1.0), (2.0, 1.3, 0.8), (4, 37, 41), border=2),
    "2D of thick sections": Trial(2, (1.0, 1.0), (9.0, 0.8, 1.3), (3, 37, 41)),
    "smaller than the patch": Trial(3, (1.0, 1.0, 1.0), (1.4, 0.8, 0.9), (5, 9, 7)),
    "order 0": Trial(3, (1.0, 1.0, 1.0), (0.75, 1.5, 0.9), (20, 16, 21), rules=default(0, back=0)),
    "order 1": Trial(3, (1.0, 1.0, 1.0), (0.7, 1.3, 0.9), (20, 16, 21), rules=default(1)),
    "order 2": Trial(3, (1.0, 1.0, 1.0), (0.7, 1.3, 0.9), (20, 16, 21), border=2, rules=default(2)),
    "thick sections of order 0": Trial(3, (4.0, 1.0, 1.0), (5.3, 1.4, 0.7), (9, 23, 19), rules=default(0, back=0)),
    "linear across sections": Trial(3, (4.0, 1.0, 1.0), (5.3, 1.4, 0.7), (9, 23, 19), rules=default(order_z=1)),
    "cubic across sections": Trial(3, (1.0, 4.0, 1.0), (1.4, 5.3, 0.7), (19, 11, 21), rules=default(order_z=3)),
    "linear, cubic across": Trial(3, (1.0, 1.0, 4.0), (1.4, 0.7, 5.3), (19, 21, 11), rules=default(1, order_z=3)),
    "another threshold": Trial(
        3, (2.0, 1.0, 1.0), (2.6, 1.4, 1.2), (11, 23, 19), rules=default(separate_z_anisotropy_threshold=1.5)
    ),
    "thick sections, transposed": Trial(
        3, (1.0, 4.0, 1.0), (5.3, 1.4, 0.7), (9, 23, 19), border=2, channels=2, axis_order=(2, 0, 1)
    ),
    "2D of thick sections, transposed": Trial(
        2, (1.0, 1.0), (0.8, 9.0, 1.3), (37, 3, 41), rules=with_torch(), axis_order=(1, 0, 2)
    ),
    "torch of thick columns": Trial(3, (1.0, 1.0, 4.0), (1.4, 0.7, 5.3), (19, 21, 11), rules=with_torch()),
    "thick along one axis, then another": Trial(3, (4.0, 1.0, 1.0), (1.2, 1.3, 4.0), (26, 22, 9)),
    "torch, other modes": Trial(
        3,
        (4.0, 1.0, 1.0),
        (5.3, 1.4, 0.7),
        (9, 23, 19),
        rules=with_torch(mode="nearest-exact", aniso_axis_mode="linear"),
    ),
    "torch without thick sections ignores its mode": Trial(
        3, (1.0, 1.0, 1.0), (0.7, 1.3, 0.9), (20, 16, 21), channels=2, rules=with_torch(mode="nearest-exact")
    ),
    "not resampled": Trial(3, (1.0, 1.0, 1.0), (0.7, 1.3, 0.9), (20, 16, 21), rules=rules(NO_RESAMPLING, {}, {})),
    "not resampled, 2D, transposed": Trial(
        2, (1.0, 1.0), (0.7, 1.3, 0.9), (20, 16, 21), rules=rules(NO_RESAMPLING, {}, {}), axis_order=(2, 0, 1)
    ),
    "images not resampled": Trial(
        3,
        (1.0, 1.0, 1.0),
        (0.7, 1.3, 0.9),
        (20, 16, 21),
        rules=(*default(), ("resampling_fn_data", NO_RESAMPLING), ("resampling_fn_data_kwargs", {})),
    ),
}
FACTORS: dict[str, tuple[object, ...]] = {
    "dimensions": (2, 3),
    "function": ("default", "torch"),
    "force": (None, True, False),
    "long": ("none", "z", "y", "x"),  # axis of the volume
    "axis_order": ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)),
    "border": (0, 2),
}


def pairwise() -> dict[str, Trial]:
    """Every pair of values of two factors occurs in some trial: a greedy covering."""

    def pairs(values: tuple[object, ...]) -> set[tuple[object, ...]]:
        return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}

    candidates = {values: pairs(values) for values in itertools.product(*FACTORS.values())}
    missing = set().union(*candidates.values())
    chosen = {}
    while missing:
        values = max(candidates, key=lambda v: len(candidates[v] & missing))
        missing -= candidates[values]
        chosen["{}D {} force {} long {} axes {} border {}".format(*values)] = trial_of(*values)
    return chosen


def trial_of(dimensions: int, function: str, force: bool | None, long: str, order: Vec3, border: int) -> Trial:
    image, planned = [1.3, 0.8, 1.2], [1.0, 1.0, 1.0]
    extent = [13, 19, 17]
    if long != "none":
        axis = "zyx".index(long)
        image[axis], planned[axis], extent[axis] = 4.6, 4.0, 9
    turned = [planned[axis] for axis in order][3 - dimensions :]
    stated = (default if function == "default" else with_torch)(force_separate_z=force)
    return Trial(dimensions, tuple(turned), tuple(image), tuple(extent), border, 1 + border // 2, stated, order)


TRIALS |= pairwise()


def model_of(trial: Trial, folder: Path) -> Path:
    return make_model(
        folder,
        dimensions=trial.dimensions,
        channels=trial.channels,
        classes=3,
        patch=(16, 24) if trial.dimensions == 2 else (8, 16, 16),
        reader="SimpleITKIO",
        spacing=trial.plan,
        mirror_axes=(0,),
        seed=4,
        axis_order=trial.axis_order,
        resampling=dict(trial.rules),
    )


def image_of(trial: Trial) -> np.ndarray:
    image = (scene(trial.channels, trial.extent, 8)[0] * 250).astype(np.uint8)
    if trial.border:
        image[:, :, : trial.border] = 0
        image[..., -trial.border :] = 0
        image[:, 0] = 0
    return image


def manager_of(trial: Trial, folder: Path) -> InferenceManager:
    spacing = ",".join(map(str, trial.image))
    words = [*WORDS, "inference.resample=plan", f"inference.spacing=[{spacing}]", LARGE]
    return InferenceManager.from_checkpoint(model_of(trial, folder), words)


@pytest.mark.parametrize("name", TRIALS)
def test_resampled_labels_equal_the_oracle(name: str, tmp_path: Path) -> None:
    trial = TRIALS[name]
    torch.set_num_threads(1)
    manager, image = manager_of(trial, tmp_path), image_of(trial)
    ours = manager.predict(image)
    (case,) = survey(ArrayVolume(image), "image", manager.engine.segmenter.members[0].schemes, by_slice=False)
    predictor = oracle.make_predictor(next(tmp_path.iterdir()), ["0"])
    theirs, probabilities = oracle.predict(
        predictor, image, summaries=case.channels, probabilities=True, spacing=trial.image
    )
    assert len(np.unique(theirs)) > 1
    assert (ours.labels != theirs).sum() <= SHARE * theirs.size
    assert ours.probabilities is not None
    np.testing.assert_allclose(ours.probabilities, probabilities, atol=1e-5)


CUT = (
    "3D border, two channels",
    "3D thick sections, z changed",
    "2D of a volume",
    "thick along one axis, then another",
    "thick sections, transposed",
    "2D of thick sections, transposed",
    "order 0",
    "linear, cubic across",
    "torch without thick sections ignores its mode",
    "torch of thick columns",
    "images not resampled",
)


def require_the_same_bytes(trial: Trial, folder: Path, count: int | None) -> None:
    manager, image = manager_of(trial, folder), image_of(trial)
    reader = ArrayVolume(image)
    whole = manager.predict(image)
    segmenter = manager.segmenter()
    cases = segmenter.survey(reader, "image")
    for shape in ((1, 26, 41), (5, 7, 41), (4, 16, 16), (9, 11, 9)):
        for block in some_of(BlockGrid(trial.extent, shape), count):
            part = segmenter.segment(reader.read, cases, block.core)
            assert part["labels"][0].tobytes() == whole.labels[block.core.slices].tobytes()
            assert whole.probabilities is not None
            expected = whole.probabilities[(slice(None), *block.core.slices)]
            assert part["probabilities"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", CUT)
def test_any_cut_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    require_the_same_bytes(TRIALS[name], tmp_path, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", CUT)
def test_all_blocks_of_any_cut_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    require_the_same_bytes(TRIALS[name], tmp_path, None)


@pytest.mark.parametrize(("old", "new"), [(20_000, 13_333), (777, 1000), (50, 33), (33, 50), (64, 32), (1, 3)])
def test_one_axis_is_torchs_wherever_it_is_cut(old: int, new: int) -> None:
    values = torch.rand(2, old, generator=torch.Generator().manual_seed(old))
    for order, mode in ((0, "nearest-exact"), (1, "linear")):
        expected = torch.nn.functional.interpolate(values[None], (new,), mode=mode)[0]
        axis = AxisResampling(old, new, order, single=True)
        for start in range(0, new, 4096):
            stop = min(new, start + 4096)
            first, last = axis.reach(start, stop)
            ours = axis.interpolate(values[:, None, None, first:last], 2, start, stop, first)[:, 0, 0]
            torch.testing.assert_close(ours, expected[:, start:stop], rtol=0, atol=2e-7 * order)


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.long)], ids=["files", "and oracle"])
def test_the_shared_3d_model_reproduces_nnunets_files(shared_data: Path, exact: bool) -> None:
    folder = shared_data / "reference" / "vnc_mito_3d" / "crop_z00-15_y512-1023_x768-1023"
    stack = [np.asarray(Image.open(shared_data / "em" / "vnc" / "raw" / f"{z:02d}.png")) for z in range(16)]
    image = np.stack(stack)[:, 512:1024, 768:1024]
    words = [
        "inference.test_time_augmentation.enabled=false",
        "inference.resample=plan",
        "inference.spacing=[45,4.6,4.6]",
    ]
    manager = InferenceManager.from_checkpoint(shared_data / "models" / "vnc_mito_3d", [*WORDS, *words])
    ours = manager.predict(image)
    if exact:
        (case,) = survey(ArrayVolume(image[None]), "image", manager.segmenter().members[0].schemes, by_slice=False)
        predictor = oracle.make_predictor(shared_data / "models" / "vnc_mito_3d", ["0"], mirror=False)
        found = oracle.predict(predictor, image[None], summaries=case.channels, spacing=(45, 4.6, 4.6))
        assert (ours.labels != found).sum() == 0
    theirs = tifffile.imread(folder / "seg_nomirror.tif")
    assert (ours.labels != theirs).sum() <= SHARE * theirs.size
    with np.load(folder / "prob_mito_nomirror_z06-09.npz") as stored:
        (probability,) = stored.values()
    assert ours.probabilities is not None
    assert np.abs(ours.probabilities[1, 6:10] - probability.astype(np.float32)).max() < 5e-3  # they stored float16 sums


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["inference.resample=plan"], VolumeError, "needs the spacing"),
        (["inference.resample=plan", "inference.spacing=[9,1,1]"], VolumeError, "same unit"),
        (["inference.resample=plan", "inference.spacing=[1,1,1]", "inference.case=slice"], ConfigError, "2D images"),
        (["inference.resample=plan", "inference.spacing=[0.04,1,1]", LARGE], VolumeError, "at least 1 along each axis"),
    ],
)
def test_what_cannot_be_resampled_is_refused(
    words: list[str], error: type[ConnectomicsError], text: str, tmp_path: Path
) -> None:
    folder = make_model(
        tmp_path, dimensions=3, patch=(8, 16, 16), reader="SimpleITKIO", spacing=(1.0, 1.0, 1.0), seed=5
    )
    with pytest.raises(error, match=text):
        InferenceManager.from_checkpoint(folder, [*WORDS, *words]).predict(np.ones((9, 20, 20), np.uint8))


def test_a_large_ratio_can_be_confirmed_and_images_may_state_their_own_spacing(tmp_path: Path) -> None:
    folder = make_model(
        tmp_path, dimensions=3, patch=(8, 16, 16), reader="SimpleITKIO", spacing=(1.0, 1.0, 1.0), seed=5
    )
    words = [*WORDS, "inference.resample=plan", LARGE]
    manager = InferenceManager.from_checkpoint(folder, words)
    image = (scene(1, (4, 20, 20), 8)[0][0] * 250).astype(np.uint8)
    resampling = manager.segmenter((9.0, 1.0, 1.0)).members[0].resampling
    assert resampling == Resampling((9.0, 1.0, 1.0), (1.0, 1.0, 1.0), RULE, LINEAR)
    stated = InferenceManager.from_checkpoint(folder, [*words, "inference.spacing=[9,1,1]"])
    own = manager.predict(image, (9.0, 1.0, 1.0)).probabilities
    np.testing.assert_array_equal(own, stated.predict(image).probabilities)


def test_a_volume_is_resampled_by_the_spacing_beside_it(tmp_path: Path) -> None:
    trial = TRIALS["3D thick sections, z changed"]
    model, image = model_of(trial, tmp_path / "model"), image_of(trial)
    tifffile.imwrite(tmp_path / "v.tif", image[0])
    (tmp_path / "v.json").write_text(json.dumps({"spacing": list(trial.image)}))
    words = [f"inference.volume_mode.file_list=['{tmp_path}/v.tif']", f"inference.data.output_path={tmp_path}"]
    assert main(["infer-volume", "--checkpoint", str(model), "inference.resample=plan", *WORDS[:2], *words]) == 0
    with h5py.File(tmp_path / "v_labels.h5") as file:
        labels = file["main"][:]
    np.testing.assert_array_equal(labels, manager_of(trial, tmp_path / "again").predict(image).labels)


RULE = ResamplingRule("resample_data_or_seg_to_shape", 3, 0, None)
LINEAR = ResamplingRule("resample_data_or_seg_to_shape", 1, 0, None)


REFUSED = {
    "another function": (rules("resample_torch_simple", {}, {}), "resample_torch_simple, expected"),
    "order 4": (default(4), "images with .* of order 4 .* up to 3"),
    "cubic logits": (default(3, back=3), "logits with .* of order 3 .* up to 1"),
    "bicubic": (with_torch(mode="bicubic"), "images with resample_torch_fornnunet and mode='bicubic', which"),
    "as labels": (default(is_seg=True), "is_seg=True, which"),
    "strange argument": (rules(NO_RESAMPLING, {"order": 3}, {}), "order=3, which"),
    "logits left": (
        (*default(), ("resampling_fn_probabilities", NO_RESAMPLING), ("resampling_fn_probabilities_kwargs", {})),
        "and logits with no_resampling_hack",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_plans_want_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    stated, text = REFUSED[name]
    trial = Trial(3, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (9, 20, 20), rules=stated)
    with pytest.raises(ModelError, match=text):
        manager_of(trial, tmp_path)
    loaded = InferenceManager.from_checkpoint(next(tmp_path.iterdir()), WORDS).engine.spec
    with pytest.raises(ModelError, match=text):
        Resampling(trial.image, trial.image, loaded.resampling_data, loaded.resampling_probabilities)
