"""MONAI's sliding window as an independent check of ours, and how its grid differs from nnU-Net's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.core.errors import DeviceMemoryError
from connectomics.lightning.inference import InferenceManager
from connectomics.models.backends.torch_eager import TorchBackend

from nnunet_models import make_model
from parity_table import scene

WORDS = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]


@pytest.fixture(scope="module", params=[2, 3])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    patch = (16, 24) if request.param == 2 else (8, 16, 8)
    folder = make_model(
        tmp_path_factory.mktemp("model"), dimensions=request.param, patch=patch, classes=3, folds=("0", "1"), seed=2,
        reader="NaturalImage2DIO" if request.param == 2 else "SimpleITKIO",
    )  # fmt: skip
    return request.param, folder


def both(folder: Path, extent: tuple[int, int, int], *words: str) -> tuple[np.ndarray, np.ndarray]:
    image = (scene(1, extent, 9)[0] * 255).astype(np.uint8)
    results = []
    for engine in ("nnunet", "monai"):
        stated = [*WORDS, f"inference.sliding_window.engine={engine}", *words]
        prediction = InferenceManager.from_checkpoint(folder, stated).predict(image)
        assert prediction.probabilities is not None
        results.append(prediction.probabilities)
    return results[0], results[1]


def test_equal_where_both_grids_coincide(model: tuple[int, Path]) -> None:
    """With constant blending: MONAI's Gaussian is centred half a voxel beside nnU-Net's."""
    dimensions, folder = model
    extent = (3, 16 + 3 * 8, 24 + 2 * 12) if dimensions == 2 else (8 + 2 * 4, 16 + 8, 8 + 4)
    ours, monais = both(folder, extent, "inference.sliding_window.blending=constant")
    np.testing.assert_allclose(ours, monais, atol=1e-5)


def test_padding_of_small_images_is_nnunets(model: tuple[int, Path]) -> None:
    dimensions, folder = model
    extent = (2, 11, 17) if dimensions == 2 else (5, 9, 6)
    ours, monais = both(folder, extent)
    np.testing.assert_allclose(ours, monais, atol=1e-5)
    image = (scene(1, extent, 9)[0] * 255).astype(np.uint8)
    words = [*WORDS, "inference.sliding_window.engine=monai", "inference.sliding_window.padding_mode=replicate"]
    replicated = InferenceManager.from_checkpoint(folder, words).predict(image).probabilities
    assert np.abs(replicated - monais).max() > 1e-3


def test_grids_differ_elsewhere(model: tuple[int, Path]) -> None:
    dimensions, folder = model
    ours, monais = both(folder, (2, 43, 61) if dimensions == 2 else (13, 29, 15))
    assert np.abs(ours - monais).max() > 1e-3
    manager = InferenceManager.from_checkpoint(folder, [*WORDS, "inference.sliding_window.engine=monai"])
    assert "MONAI's window grid" in manager.engine.identity.deviations


def test_a_batch_that_does_not_fit_the_device_is_named(
    model: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, "inference.sliding_window.engine=monai", "inference.sliding_window.sw_batch_size=3"]
    segmenter = InferenceManager.from_checkpoint(model[1], words).engine.segmenter
    segmenter.try_memory((4, 30, 30))

    def full(self: TorchBackend, batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"no room for {len(batch)}")

    monkeypatch.setattr(TorchBackend, "forward", full)
    with pytest.raises(DeviceMemoryError, match=r"3 windows do not fit .*\(no room for 3\)"):
        segmenter.try_memory((4, 30, 30))
