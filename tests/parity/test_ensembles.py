"""Ensembles of several models: nnU-Net's own averaging of its own probabilities, and ours block by block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from connectomics.cli import main
from connectomics.core.errors import ConfigError, ModelError
from connectomics.core.geometry import BlockGrid, Box
from connectomics.inference.predictor import RollingPredictor
from connectomics.lightning.inference import InferenceManager

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, scene, some_of
from small_jobs import infer_words, write_h5

WORDS = ("system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true")
EXTENT = (9, 32, 37)
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    pixels: np.ndarray = (scene(1, EXTENT, 6)[0] * 255).astype(np.uint8)
    pixels[:, :, :3] = 0
    pixels[:, 2, :, :9] = 0
    return pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of other plans for the same labels: single images, 2D of volumes, 3D, 3D with its axes transposed."""
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, object]] = {
        "slices": {"dimensions": 2, "patch": (16, 24), "reader": "NaturalImage2DIO"},
        "2D": {"dimensions": 2, "patch": (24, 24), "reader": "SimpleITKIO", "folds": ("0", "1")},
        "3D": {
            "dimensions": 3,
            "patch": (8, 16, 16),
            "mirror_axes": (0,),
            "reader": "SimpleITKIO",
            "scheme": "RescaleTo01Normalization",
        },
        "turned": {
            "dimensions": 3,
            "patch": (16, 8, 8),
            "mirror_axes": (2,),
            "reader": "SimpleITKIO",
            "axis_order": (2, 0, 1),
        },
    }
    folder = tmp_path_factory.mktemp("ensembles")
    found = {n: make_model(folder / n, seed=7 + i, classes=3, **k) for i, (n, k) in enumerate(kinds.items())}  # type: ignore[arg-type]
    for name in ("2D", "3D"):
        found[f"{name} regions"] = make_model(
            folder / f"{name}r",
            seed=5,
            labels=REGIONS,
            regions_class_order=[1, 2],
            **kinds[name],  # type: ignore[arg-type]
        )
    return found


def manager_of(members: Sequence[Path], *more: str) -> InferenceManager:
    return InferenceManager.from_checkpoint(
        members[0], [*WORDS, f"model.ensemble={json.dumps([str(m) for m in members[1:]])}", *more]
    )


@pytest.mark.parametrize(
    "names",
    [("3D", "2D", "turned"), ("2D regions", "3D regions"), pytest.param(("slices", "3D"), marks=pytest.mark.long)],
    ids=lambda names: " + ".join(names),
)
def test_labels_are_those_of_nnunets_mean(models: dict[str, Path], image: np.ndarray, names: Sequence[str]) -> None:
    members = [models[name] for name in names]
    manager = manager_of(members)
    surveyed = manager.engine.segmenter.survey(ArrayVolume(image), "image")
    answers = []
    for path, cases, model in zip(members, surveyed, manager.engine.models, strict=True):
        predictor = oracle.make_predictor(path, model.spec.folds)
        zscore = model.spec.normalisations[0].scheme == "ZScoreNormalization"
        answers.append(oracle.predict_cases(predictor, image, cases, None, inject=zscore))
    labels, mean = oracle.ensembled(predictor.label_manager, answers)
    ours = manager.predict(image)
    assert ours.probabilities is not None and len(np.unique(ours.labels)) == 3
    np.testing.assert_array_equal(ours.labels, labels)
    assert np.abs(ours.probabilities - mean).max() <= 1e-5
    assert not manager.engine.identity.deviations
    singles = [InferenceManager.from_checkpoint(path, WORDS).predict(image).labels for path in members]
    assert all((single != ours.labels).any() for single in singles)


def test_weights_are_those_of_a_weighted_mean(models: dict[str, Path], image: np.ndarray) -> None:
    members = [models["slices"], models["3D"]]
    manager = manager_of(members, "model.ensemble_weights=[3,1]")
    ours = manager.predict(image)
    single = [InferenceManager.from_checkpoint(path, WORDS).predict(image).probabilities for path in members]
    mean = np.average(np.stack(single), axis=0, weights=[3, 1])
    assert ours.probabilities is not None
    np.testing.assert_allclose(ours.probabilities, mean, atol=1e-6)
    assert (ours.labels == mean.argmax(0)).all()
    assert manager.engine.identity.deviations == ("a weighted mean of probabilities",)


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=pytest.mark.long)], ids=["three blocks", "all blocks"])
def test_the_result_does_not_depend_on_the_cut(models: dict[str, Path], image: np.ndarray, count: int | None) -> None:
    manager = manager_of([models[name] for name in ("slices", "turned", "3D")])
    segmenter, reader = manager.engine.segmenter, ArrayVolume(image)
    surveyed = segmenter.survey(reader, "image")
    whole = segmenter.segment(reader.read, surveyed, Box.of_shape(EXTENT))
    for shape in ((1, 32, 37), (4, 13, 37), (9, 17, 9)):
        for block in some_of(BlockGrid(EXTENT, shape), count):
            part = segmenter.segment(reader.read, surveyed, block.core)
            for name, array in whole.items():
                assert part[name].tobytes() == array[(slice(None), *block.core.slices)].tobytes()


def test_the_command_continues_and_tells_of_every_model(
    models: dict[str, Path], image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = write_h5(tmp_path / "v.h5", image[0])
    more = [f"model.ensemble=['{models['3D']}']", "inference.block_shape=[4,32,37]"]
    assert main(infer_words(models["slices"], tmp_path / "once", volume, *more)) == 0
    predict, calls = RollingPredictor.predict, iter(range(100))

    def breaking(self: RollingPredictor, *arguments: object) -> object:
        if next(calls) == 3:  # the second model in the second block
            raise OSError(28, "No space left on device")
        return predict(self, *arguments)  # type: ignore[arg-type]

    again = infer_words(models["slices"], tmp_path / "twice", volume, *more)
    with monkeypatch.context() as broken:
        broken.setattr(RollingPredictor, "predict", breaking)
        assert main(again) == 3
    assert not (tmp_path / "twice" / "v_labels.h5").exists()
    assert main(again) == 0
    report = json.loads((tmp_path / "twice" / "v_labels.run" / "report.json").read_text())
    assert report["skipped"] >= 1
    once, twice = (h5py.File(tmp_path / name / "v_labels.h5")["main"][:] for name in ("once", "twice"))
    assert once.tobytes() == twice.tobytes()
    told = json.loads((tmp_path / "twice" / "v_labels.run" / "provenance.json").read_text())
    assert [m["configuration"] for m in told["models"]] == ["2d", "3d_fullres"]
    assert [m["weight"] for m in told["ensemble"]] == [1.0, 1.0]


def test_models_that_do_not_belong_together_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"its labels are .* those of .* must be trained on the same"):
        manager_of([models["2D"], models["2D regions"]])
    for words, finding in (
        (["model.ensemble_weights=[1]"], "must be 2 positive numbers"),
        (["model.ensemble_weights=[1,0]"], "must be 2 positive numbers"),
        ([f"model.sha256={'0' * 64}"], "model.ensemble names more models"),
        (["inference.sliding_window.engine=monai"], "model.ensemble needs nnunet"),
        (["inference.test_time_augmentation.act=none"], "there are no logits to keep"),
    ):
        with pytest.raises(ConfigError, match=finding):
            manager_of([models["2D"], models["3D"]], *words)
