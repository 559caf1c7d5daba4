"""Regions, ignore label, hundreds of labels, values with gaps: labels and probabilities are nnU-Net's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.core.errors import ConfigError
from connectomics.lightning.inference import InferenceManager, Prediction
from connectomics.stages.survey.survey import survey

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, scene

Labels = dict[str, int | list[int]]
WORDS = ("system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true")
REGIONS: Labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 3}
PLAIN: Labels = {"background": 0, "a": 1, "b": 2}
EXTENT = {2: (3, 50, 61), 3: (21, 30, 29)}


def model_of(folder: Path, dimensions: int, labels: Labels, order: list[int] | None, *, by_slice: bool = False) -> Path:
    return make_model(
        folder,
        dimensions=dimensions,
        patch=(16, 24) if dimensions == 2 else (8, 16, 8),
        folds=("0", "1"),
        mirror_axes=(0,),
        reader="NaturalImage2DIO" if by_slice else "SimpleITKIO",
        labels=labels,
        regions_class_order=order,
        seed=4 if dimensions == 3 and order is None else 5,
    )


def bordered(dimensions: int) -> np.ndarray:
    """An image (c, z, y, x) with zeros around, and one section of zeros."""
    image: np.ndarray = (scene(1, EXTENT[dimensions], 6)[0] * 255).astype(np.uint8)
    image[:, 0] = 0
    image[:, :, :5] = 0
    image[..., -4:] = 0
    return image


def both(model: Path, image: np.ndarray, *, by_slice: bool = False) -> tuple[Prediction, np.ndarray, np.ndarray]:
    """Our prediction, and the oracle's labels and probabilities."""
    torch.set_num_threads(1)
    engine = (manager := InferenceManager.from_checkpoint(model, WORDS)).engine
    predictor = oracle.make_predictor(model, engine.spec.folds)
    cases = survey(ArrayVolume(image), "image", engine.segmenter.members[0].schemes, by_slice=by_slice)
    labels, probabilities = oracle.predict_cases(predictor, image, cases, None, inject=True)
    return manager.predict(image), labels, probabilities


@pytest.mark.parametrize(
    ("dimensions", "labels", "order", "by_slice", "found"),
    [
        pytest.param(2, REGIONS, [1, 2, 3], False, {0, 1, 2, 3}, id="2D regions"),
        pytest.param(2, REGIONS, [3, 1, 200], True, {0, 1, 3, 200}, id="2D regions by slice, another order"),
        pytest.param(3, REGIONS, [1, 2, 3], False, {0, 1, 2, 3}, id="3D regions", marks=pytest.mark.long),
        pytest.param(3, REGIONS | {"ignore": 4}, [2, 1, 3], False, {0, 1, 2, 3}, id="3D regions, ignore label"),
        pytest.param(2, {"background": 0, "both": [1, 2]}, [7], False, {0, 7}, id="one region"),
        pytest.param(2, PLAIN | {"ignore": 3}, None, True, {0, 1, 2}, id="2D ignore label"),
        pytest.param(3, PLAIN | {"ignore": 3}, None, False, {0, 1, 2}, id="3D ignore label", marks=pytest.mark.long),
        pytest.param(2, {"background": 0, "b": 9, "a": 4}, None, False, {0, 1, 2}, id="values with gaps"),
    ],
)
def test_labels_and_probabilities_equal_the_oracles(
    tmp_path: Path, dimensions: int, labels: Labels, order: list[int] | None, by_slice: bool, found: set[int]
) -> None:
    model = model_of(tmp_path, dimensions, labels, order, by_slice=by_slice)
    ours, theirs, probabilities = both(model, bordered(dimensions), by_slice=by_slice)
    assert ours.labels.dtype == theirs.dtype == np.uint8
    assert set(np.unique(ours.labels).tolist()) == found
    np.testing.assert_array_equal(ours.labels, theirs)
    assert ours.probabilities is not None and ours.probabilities.shape == probabilities.shape
    assert np.abs(ours.probabilities - probabilities).max() <= 1e-5
    outside = ours.probabilities[:, -1, 0, 0].tolist()
    assert outside == [0.0] * len(outside) if order else outside == [1.0, *([0.0] * (len(outside) - 1))]


def test_hundreds_of_labels_need_sixteen_bits(tmp_path: Path) -> None:
    model = make_model(tmp_path, dimensions=2, classes=300, patch=(16, 24), seed=5)
    image = bordered(2)[:, 1:]
    ours, theirs, probabilities = both(model, image, by_slice=True)
    assert ours.labels.dtype == theirs.dtype == np.uint16
    assert ours.labels.max() > 255
    np.testing.assert_array_equal(ours.labels, theirs)
    assert ours.probabilities is not None
    assert np.abs(ours.probabilities - probabilities).max() <= 1e-5


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("regions"), 2, REGIONS, [1, 2, 3])


def test_a_threshold_takes_the_union_of_regions(regions: Path) -> None:
    binary = "inference.postprocessing.binary."
    words = [*WORDS, f"{binary}enabled=true", f"{binary}threshold=0.6"]
    image = bordered(2)
    for choice, channels in (([], [0, 1, 2]), (["inference.test_time_augmentation.select_channel=[2,0]"], [2, 0])):
        every = InferenceManager.from_checkpoint(regions, WORDS).predict(image)
        assert every.probabilities is not None
        labels = InferenceManager.from_checkpoint(regions, [*words, *choice]).predict(image).labels
        np.testing.assert_array_equal(labels, every.probabilities[channels].max(0) > np.float32(0.6))
        assert 0 < labels.mean() < 1


def test_the_activation_may_be_stated_but_not_another_than_the_models(regions: Path, tmp_path: Path) -> None:
    act, image = "inference.test_time_augmentation.act", bordered(2)
    default = InferenceManager.from_checkpoint(regions, WORDS).predict(image)
    stated = InferenceManager.from_checkpoint(regions, [*WORDS, f"{act}=sigmoid"]).predict(image)
    logits = InferenceManager.from_checkpoint(regions, [*WORDS, f"{act}=none"]).predict(image)
    assert default.probabilities is not None and stated.probabilities is not None and logits.probabilities is not None
    assert default.probabilities.tobytes() == stated.probabilities.tobytes()
    inside = (slice(None), slice(1, None), slice(5, None), slice(None, -4))
    expected = torch.sigmoid(torch.from_numpy(logits.probabilities[inside])).numpy()
    np.testing.assert_allclose(default.probabilities[inside], expected, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="act is 'softmax', but the model gives regions"):
        InferenceManager.from_checkpoint(regions, [*WORDS, f"{act}=softmax"])
    plain = make_model(tmp_path, dimensions=2, patch=(16, 24))
    with pytest.raises(ConfigError, match="act is 'sigmoid', but the model gives labels"):
        InferenceManager.from_checkpoint(plain, [*WORDS, f"{act}=sigmoid"])
