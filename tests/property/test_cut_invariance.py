"""However a volume is cut, in whatever order its blocks are computed, the bytes are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.core.geometry import BlockGrid, Box
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.survey.survey import survey

from nnunet_models import make_model
from parity_table import ArrayVolume, scene, some_of

EXTENT = {2: (3, 50, 61), 3: (21, 24, 29)}
SHAPES = {
    2: [(1, 1, 61), (1, 7, 61), (1, 50, 9), (3, 50, 61), (2, 13, 17), (1, 50, 61), (3, 16, 16), (1, 49, 60), (2, 50, 1),
        (1, 25, 31), (3, 5, 61), (1, 33, 8)],
    3: [(1, 24, 29), (5, 24, 29), (21, 7, 29), (21, 24, 11), (8, 8, 8), (20, 23, 28), (3, 24, 10), (21, 24, 29),
        (16, 16, 16), (21, 5, 5), (2, 24, 29), (11, 12, 13)],
}  # fmt: skip


REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}


@pytest.fixture(
    scope="module",
    params=[(2, True, None), (2, False, None), (3, False, None), (2, False, REGIONS)],
    ids=["2D slices", "2D volume", "3D", "2D regions"],
)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    dimensions, by_slice, regions = request.param
    folder = make_model(
        tmp_path_factory.mktemp("model"),
        dimensions=dimensions,
        classes=3,
        patch=(16, 24) if dimensions == 2 else (8, 16, 8),
        folds=("0", "1"),
        mirror_axes=(0,),
        reader="NaturalImage2DIO" if by_slice else "SimpleITKIO",
        seed=4 if regions is None else 9,
        labels=regions,
        regions_class_order=None if regions is None else [1, 2],
    )
    torch.set_num_threads(1)
    words = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]
    engine = InferenceManager.from_checkpoint(folder, words).engine
    image = (scene(1, EXTENT[dimensions], 6)[0] * 255).astype(np.uint8)
    image[:, :, :3] = 0
    image[:, :, :, -4:] = 0
    reader = ArrayVolume(image)
    cases = survey(reader, "image", engine.segmenter.members[0].schemes, by_slice=by_slice)
    whole = engine.segmenter.segment(reader.read, [cases], Box.of_shape(reader.info.extent))
    assert len(np.unique(whole["labels"])) == 3
    return dimensions, engine, reader, cases, whole


def require_the_same_bytes(volume: tuple[object, ...], index: int, count: int | None) -> None:
    dimensions, engine, reader, cases, whole = volume
    shape = SHAPES[dimensions][index]  # type: ignore[index]
    for block in some_of(BlockGrid(reader.info.extent, shape), count, seed=index):  # type: ignore[attr-defined]
        arrays = engine.segmenter.segment(reader.read, [cases], block.core)  # type: ignore[attr-defined]
        assert set(arrays) == set(whole)  # type: ignore[call-overload]
        for name, array in arrays.items():
            assert array.tobytes() == whole[name][(slice(None), *block.core.slices)].tobytes()  # type: ignore[index]


@pytest.mark.parametrize("index", range(0, 12, 2))
def test_any_blocks_in_any_order_give_the_same_bytes(volume: tuple[object, ...], index: int) -> None:
    require_the_same_bytes(volume, index, 1)


@pytest.mark.long
@pytest.mark.parametrize("index", range(12))
def test_all_blocks_in_any_order_give_the_same_bytes(volume: tuple[object, ...], index: int) -> None:
    require_the_same_bytes(volume, index, None)


def test_batches_of_windows_do_not_depend_on_the_cut_either(tmp_path: Path) -> None:
    folder = make_model(tmp_path, dimensions=2, classes=2, patch=(16, 24), seed=4)
    words = ["system.device=cpu", "system.num_cpus=1", "inference.sliding_window.sw_batch_size=3"]
    engine = InferenceManager.from_checkpoint(folder, words).engine
    reader = ArrayVolume((scene(1, (2, 50, 61), 6)[0] * 255).astype(np.uint8))
    cases = survey(reader, "image", engine.segmenter.members[0].schemes, by_slice=True)
    whole = engine.segmenter.segment(reader.read, [cases], Box.of_shape((2, 50, 61)))["labels"]
    for block in BlockGrid((2, 50, 61), (1, 13, 40)):
        part = engine.segmenter.segment(reader.read, [cases], block.core)["labels"]
        assert part.tobytes() == whole[(slice(None), *block.core.slices)].tobytes()
