"""InferenceManager: shapes in and out, filters, refusals."""

from __future__ import annotations

from pathlib import Path

import cc3d
import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from connectomics.core.errors import ConfigError, DeviceError, ModelError, VolumeError
from connectomics.lightning.inference import InferenceManager

from nnunet_models import make_model
from parity_table import scene

WORDS = ["system.device=cpu", "system.num_cpus=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dimensions=2, patch=(16, 24), classes=2, seed=2)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return (scene(1, (2, 40, 51), 1)[0][0] * 255).astype(np.uint8)


def test_images_and_volumes_keep_their_axes(model: Path, image: np.ndarray) -> None:
    manager = InferenceManager.from_checkpoint(model, [*WORDS, "inference.output.save_probabilities=true"])
    volume, section = manager.predict(image), manager.predict(image[0])
    assert volume.labels.shape == image.shape
    assert volume.probabilities is not None
    assert volume.probabilities.shape == (2, *image.shape)
    assert section.probabilities is not None
    np.testing.assert_array_equal(section.labels, volume.labels[0])
    np.testing.assert_array_equal(section.probabilities, volume.probabilities[:, 0])
    np.testing.assert_array_equal(manager.predict(image[None]).labels, volume.labels)
    np.testing.assert_allclose(volume.probabilities.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(volume.probabilities.argmax(0), volume.labels)


def test_boolean_images_are_zeros_and_ones(model: Path, image: np.ndarray) -> None:
    manager = InferenceManager.from_checkpoint(model, WORDS)
    mask = image > 120
    np.testing.assert_array_equal(manager.predict(mask).labels, manager.predict(mask.astype(np.uint8)).labels)


def test_binary_filters_are_those_of_cc3d_and_scipy(model: Path, image: np.ndarray) -> None:
    base = [*WORDS, "inference.postprocessing.binary.enabled=true", "inference.postprocessing.binary.threshold=0.4"]
    plain = InferenceManager.from_checkpoint(model, base).predict(image).labels
    large = cc3d.dust(plain, threshold=20, connectivity=26)
    expected = binary_fill_holes(large)
    words = [*base, "inference.postprocessing.binary.remove_small_objects=20"]
    assert plain.any()
    np.testing.assert_array_equal(InferenceManager.from_checkpoint(model, words).predict(image).labels, large)
    words.append("inference.postprocessing.binary.fill_holes=true")
    np.testing.assert_array_equal(InferenceManager.from_checkpoint(model, words).predict(image).labels, expected)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2, 2, 2, 2)), np.zeros((0, 4)), np.zeros((4, 4), complex), np.zeros(5), np.array([["a"]])]
)
def test_what_is_no_image_is_refused(model: Path, bad: np.ndarray) -> None:
    with pytest.raises(VolumeError, match="expected numbers with axes"):
        InferenceManager.from_checkpoint(model, WORDS).predict(bad)


def test_a_wrong_number_of_channels_is_refused(model: Path) -> None:
    with pytest.raises(VolumeError, match="3 channels, the model expects 1"):
        InferenceManager.from_checkpoint(model, WORDS).predict(np.zeros((3, 1, 20, 30), np.uint8))


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["system.device=cuda:63"], DeviceError, "not available"),
        (["system.num_gpus=1", "system.device=cpu"], ConfigError, "asks for a GPU"),
        (["system.num_gpus=0", "system.device=cuda"], ConfigError, "allows no GPU"),
        (["inference.sliding_window.window_size=[8,16,24]"], ConfigError, "the model is 2D"),
        (["inference.test_time_augmentation.flip_axes=[0]"], ConfigError, "the model is 2D"),
        (["model.in_channels=2"], ModelError, "model.in_channels is 2, but the model has 1"),
        (["model.out_channels=5"], ModelError, "the model has 2"),
        (["data.do_2d=false"], ModelError, "data.do_2d is False"),
        (
            ["inference.test_time_augmentation.select_channel=2", "inference.output.save_probabilities=true"],
            ConfigError,
            "classes 0 to 1",
        ),
        (["inference.output.formats=[png]", "inference.output.save_probabilities=true"], ConfigError, "cannot hold"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    model: Path, words: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        InferenceManager.from_checkpoint(model, [w for w in WORDS if not words[-1].startswith("system")] + words)


def test_a_model_must_be_named() -> None:
    from connectomics.config.load import load_config

    with pytest.raises(ConfigError, match="no model is named"):
        InferenceManager(load_config(None, WORDS))


def test_infinite_logits_are_an_error_not_a_label(model: Path, image: np.ndarray) -> None:
    manager = InferenceManager.from_checkpoint(model, WORDS)
    for backend in manager.engine.segmenter.members[0].predictor._folds:
        backend.forward = lambda batch: batch.new_full((len(batch), 2, 1, 16, 24), float("inf"))
    with pytest.raises(ModelError, match="infinite or undefined logits"):
        manager.predict(image)
