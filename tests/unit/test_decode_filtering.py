"""Filters of binary post-processing on a store, block by block, are those of the whole volume by cc3d and scipy."""

from __future__ import annotations

from pathlib import Path

import cc3d
import numpy as np
import pytest
from scipy import ndimage

from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import BlocksDone
from connectomics.execution.stage import Workspace
from connectomics.execution.task import Task
from connectomics.stages.decode import binary_filters as filtering
from connectomics.stages.decode.binary_filters import filter_labels
from connectomics.volumes.store import Store, create_store
from connectomics.volumes.volume import Array, VolumeInfo

from decoding import in_order


def mask(shape: Vec3, seed: int) -> Array:
    """Blobs with holes and specks."""
    generator = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(generator.random(shape), 1.0)
    return ((smooth > np.quantile(smooth, 0.55)) ^ (generator.random(shape) < 0.08)).astype(np.uint8)


def stored(labels: Array, block: Vec3, folder: Path) -> Store:
    info = VolumeInfo((1, *labels.shape), labels.dtype, block, (30.0, 4.0, 4.0))
    store = create_store(folder / "labels.zarr", info, shard_shape=block, attributes={})
    for each in BlockGrid(labels.shape, block):
        store.write(each.core, labels[None][(slice(None), *each.core.slices)])
    return store


def whole(labels: Array, minimum: int, *, fill: bool) -> Array:
    kept = cc3d.dust(labels, threshold=minimum, connectivity=26) if minimum else labels
    if fill:
        squeezed = kept.reshape([n for n in kept.shape if n > 1])  # one section counts as an image
        kept = ndimage.binary_fill_holes(squeezed).reshape(kept.shape).astype(np.uint8)
    return kept


@pytest.mark.parametrize(("minimum", "fill"), [(12, False), (0, True), (12, True)])
@pytest.mark.parametrize("shape", [(9, 22, 20), (1, 30, 40)])
def test_filters_by_blocks(shape: Vec3, minimum: int, fill: bool, folder: Path) -> None:
    labels = mask(shape, seed=minimum + fill)
    expected = whole(labels, minimum, fill=fill)
    assert (expected != labels).any()
    store, grid = stored(labels, (4, 8, 20), folder), BlockGrid(shape, (4, 8, 20))
    filtered = filter_labels(
        store,
        grid,
        Workspace(folder, in_order, 1 << 30),
        minimum_voxels=minimum,
        fill_holes=fill,
    )
    assert np.array_equal(filtered.read(Box.of_shape(shape))[0], expected)
    assert (filtered.info.dtype, filtered.info.voxel_size_nm) == (np.uint8, (30.0, 4.0, 4.0))

    def finished(task: Task, ledger: Ledger) -> BlocksDone:
        assert ledger.finished == ledger.planned, "a block is done again"
        return BlocksDone(ledger.planned, ledger.finished, done=0, windows=0, failures=())

    workspace = Workspace(folder, finished, 1 << 30)
    again = filter_labels(store, grid, workspace, minimum_voxels=minimum, fill_holes=fill)
    assert np.array_equal(again.read(Box.of_shape(shape))[0], expected), "whoever comes later finds it"


def test_blocks_too_large_for_labelling_are_cut_smaller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = mask((8, 24, 20), seed=3)
    store = stored(labels, (8, 24, 20), folder)
    monkeypatch.setattr(filtering, "BLOCK_VOXELS", 1000)
    monkeypatch.setattr(filtering, "decode_plan", lambda info, budget: BlockPlan((4, 8, 10), (4, 8, 10)))
    grid = BlockGrid((8, 24, 20), (8, 24, 20))
    filtered = filter_labels(store, grid, Workspace(folder, in_order, 1 << 30), minimum_voxels=12, fill_holes=True)
    assert filtered.shard_shape == (4, 8, 10)
    assert np.array_equal(filtered.read(Box.of_shape((8, 24, 20)))[0], whole(labels, 12, fill=True))
