"""The filters of ``inference.postprocessing.binary`` on a store of labels of any size: small objects, holes.

``finish.filter_store`` calls it. The same tasks and tables as for decoding; labels stay labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from connectomics.decode.components import Connectivity
from connectomics.decode.selection import Holes, Selection
from connectomics.fingerprint import key_of
from connectomics.geometry import Block, BlockGrid, vec3
from connectomics.io.atomic import discard, put_in_place
from connectomics.io.store import Store, open_store
from connectomics.io.volume import Array, VolumeInfo
from connectomics.pipeline.contracts import BlockRecord, Task
from connectomics.pipeline.pieces import PiecesTask, painted_block
from connectomics.pipeline.planning import BlockPlan
from connectomics.pipeline.steps import Values
from connectomics.pipeline.workshop import BLOCK_VOXELS, CHUNK, VOXEL_BYTES, Workshop, decode_plan

OBJECTS, BACKGROUND = Connectivity(26), Connectivity(6)


def filter_labels(store: Store, grid: BlockGrid, target: Path, *, minimum_voxels: int, fill_holes: bool) -> Store:
    """Write filtered labels, block by block, continuing what an earlier run left.

    Parameters
    ----------
    store
        Labels.
    grid
        How the volume was cut; blocks that are too large for labelling are cut smaller.
    target
        Where the filtered store stands once it is complete; beside it lies what is unfinished.
    minimum_voxels
        Components (26-connected, of one label) of fewer voxels become background; 0 for none.
    fill_holes
        Whether background (6-connected) that one label encloses takes this label.
    """
    plan = BlockPlan(grid.block_shape, store.info.chunk_shape)
    if grid.block((0, 0, 0)).core.voxels > BLOCK_VOXELS:
        plan = decode_plan(store.info, BLOCK_VOXELS * VOXEL_BYTES)
    work = target.with_name(target.name + ".work")
    key = key_of({"small": minimum_voxels, "holes": fill_holes})
    shops = [
        Workshop(work / name, plan, BlockGrid(grid.volume, plan.block_shape), key, _InOrder(), _unseen)
        for name in ("small", "holes")
    ]
    current = store
    if minimum_voxels > 0:
        task = PiecesTask(shops[0].grid, shops[0].folder / "pieces", Values(current), OBJECTS)
        shops[0].pieces(task)
        rule = Selection(minimum_voxels, by_value=True)
        tables, _, _ = shops[0].objects(task.folder, rule, joined=True)
        current = shops[0].paint(task.folder, tables, store.info, store.info.dtype)
    if fill_holes:
        values = Values(current)
        task = PiecesTask(shops[1].grid, shops[1].folder / "pieces", values, BACKGROUND, holes=True)
        shops[1].pieces(task)
        tables, _, _ = shops[1].objects(task.folder, Holes(), joined=True)
        current = shops[1].paint(task.folder, tables, store.info, store.info.dtype, under=values)
    current.close()
    put_in_place(current.path, target)
    discard(work)
    return open_store(target)


def fill_mask(mask: Array, folder: Path, *, block_voxels: int = BLOCK_VOXELS) -> None:
    """Fill the holes of a mask in place, in memory for one block: equal to scipy's ``binary_fill_holes``.

    Parameters
    ----------
    mask
        bool (z, y, x); may be mapped from a file.
    folder
        Empty folder for what blocks leave in between; removed at the end.
    block_voxels
        Voxels of a block.
    """
    extent = vec3(mask.shape)
    if min(extent) == 1:
        discard(folder)
        return  # all of it lies at the border
    whole = VolumeInfo((1, *extent), mask.dtype, vec3([min(n, CHUNK) for n in extent]))
    plan = decode_plan(whole, block_voxels * VOXEL_BYTES)
    shop = Workshop(folder, plan, BlockGrid(extent, plan.block_shape), key_of({}), _InOrder(), _unseen)
    task = PiecesTask(shop.grid, folder / "pieces", lambda box: np.logical_not(mask[box.slices]), BACKGROUND)
    shop.pieces(task)
    tables, _, _ = shop.objects(task.folder, Selection(off_border=True, by_value=True), joined=True)
    for block in shop.grid:
        mask[block.core.slices] |= painted_block(shop.grid, block, task.folder, tables, np.dtype(np.bool_))
    discard(folder)


class _InOrder:
    """Blocks one after the other: the stage is single-handed."""

    def run(self, task: Task, blocks: Iterable[Block]) -> Iterator[BlockRecord]:
        return (task.process(block) for block in blocks)


def _unseen(done: int, planned: int) -> None:
    """Progress counts predicted blocks only."""
