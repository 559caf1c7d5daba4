"""Plans that transpose the axes: labels and probabilities are nnU-Net's, however the volume is cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.volumes import named_sources
from connectomics.config.load import load_config
from connectomics.core.geometry import BlockGrid, Vec3
from connectomics.lightning.inference import InferenceManager, VolumeProcessor
from connectomics.stages.survey.survey import survey

import oracle
from nnunet_models import make_model
from parity_table import ArrayVolume, scene

WORDS = ("system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true")
ORDERS = list(itertools.permutations(range(3)))[1:]
EXTENT = (13, 26, 33)


def model_of(folder: Path, dimensions: int, order: tuple[int, ...], reader: str = "SimpleITKIO") -> Path:
    return make_model(
        folder,
        dimensions=dimensions,
        classes=3,
        patch=(16, 24) if dimensions == 2 else (8, 16, 12),
        mirror_axes=(0,),
        reader=reader,
        seed=4 if dimensions == 3 else 5,
        axis_order=order,
    )


def bordered() -> np.ndarray:
    """An image (c, z, y, x) with zeros around, other ones at each side."""
    image: np.ndarray = (scene(1, EXTENT, 6)[0] * 255).astype(np.uint8)
    image[:, :1] = 0
    image[:, :, :3] = 0
    image[..., -4:] = 0
    return image


def of_nnunet(model: Path, image: np.ndarray, *, by_slice: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's labels and probabilities."""
    torch.set_num_threads(1)
    engine = InferenceManager.from_checkpoint(model, WORDS).engine
    predictor = oracle.make_predictor(model, engine.spec.folds)
    parts = []
    for case in survey(ArrayVolume(image), "image", engine.segmenter.members[0].schemes, by_slice=by_slice):
        part = image[(slice(None), *case.region.slices)]
        parts.append(oracle.predict(predictor, part, summaries=case.channels, probabilities=True))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts], axis=1)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_labels_and_probabilities_equal_the_oracles(tmp_path: Path, dimensions: int, order: tuple[int, ...]) -> None:
    model, image = model_of(tmp_path, dimensions, order), bordered()
    ours = InferenceManager.from_checkpoint(model, WORDS).predict(image)
    labels, probabilities = of_nnunet(model, image)
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(ours.labels, labels)
    assert ours.probabilities is not None
    assert np.abs(ours.probabilities - probabilities).max() <= 1e-5


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2)], ids=str)
def test_sections_that_are_cases_are_transposed_one_by_one(tmp_path: Path, order: tuple[int, ...]) -> None:
    model, image = model_of(tmp_path, 2, order, "NaturalImage2DIO"), bordered()[:, :3]
    ours = InferenceManager.from_checkpoint(model, WORDS).predict(image)
    labels, probabilities = of_nnunet(model, image, by_slice=True)
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(ours.labels, labels)
    assert ours.probabilities is not None
    assert np.abs(ours.probabilities - probabilities).max() <= 1e-5


@pytest.mark.parametrize(("dimensions", "order"), [(2, (2, 0, 1)), (3, (1, 2, 0))])
@pytest.mark.parametrize(
    "shape", [(4, 26, 9), *(pytest.param(shape, marks=pytest.mark.long) for shape in ((13, 5, 33), (7, 8, 16)))]
)
def test_any_blocks_give_the_same_bytes(tmp_path: Path, dimensions: int, order: Vec3, shape: Vec3) -> None:
    model, image = model_of(tmp_path, dimensions, order), bordered()
    manager = InferenceManager.from_checkpoint(model, WORDS)
    whole, segmenter = manager.predict(image), manager.engine.segmenter
    reader = ArrayVolume(image)
    cases = survey(reader, "image", segmenter.members[0].schemes, by_slice=False)
    for block in BlockGrid(EXTENT, shape):
        arrays = segmenter.segment(reader.read, [cases], block.core)
        assert arrays["labels"][0].tobytes() == whole.labels[block.core.slices].tobytes()
        assert whole.probabilities is not None
        part = whole.probabilities[(slice(None), *block.core.slices)]
        assert arrays["probabilities"].tobytes() == part.tobytes()


@pytest.mark.parametrize(("dimensions", "order"), [(2, (2, 0, 1)), (3, (1, 2, 0))])
@pytest.mark.parametrize("block", ["null", "[5,26,12]"])
def test_volumes_on_disk_keep_their_own_axes(tmp_path: Path, dimensions: int, order: Vec3, block: str) -> None:
    model, image = model_of(tmp_path / "model", dimensions, order), bordered()
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = image[0]
    words = [*WORDS, f"inference.data.output_path={tmp_path}/out", f"inference.block_shape={block}"]
    config = load_config(None, [*words, "inference.voxel_size_nm=[40,4,5]"])
    engine = build_engine(config, model)
    (outcome,) = VolumeProcessor(config, engine).run(named_sources([str(tmp_path / "v.h5")], 1))
    assert outcome.state == "done", outcome.reason
    assert outcome.report is not None and (outcome.report.planned > 1) == (block != "null")
    expected = InferenceManager.from_checkpoint(model, WORDS).predict(image).labels
    with h5py.File(tmp_path / "out" / "v_labels.h5") as file:
        np.testing.assert_array_equal(file["main"][:], expected)
        assert list(file["main"].attrs["voxel_size_nm"]) == [40, 4, 5]
