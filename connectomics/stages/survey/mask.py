"""The mask that models with nnU-Net's ``use_mask_for_norm`` are normalised within: nonzero voxels, holes filled.

The labels of a cascade's previous stage are resampled within it too. The survey makes it of a case that is a volume;
holes are found as decoding finds them, block by block. A section has none: along z, all of it lies at the border.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import BlockGrid, Box
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import BlocksDone
from connectomics.execution.stage import Workspace
from connectomics.execution.task import Task
from connectomics.inference.case import ReadBox
from connectomics.objects.components import Connectivity
from connectomics.objects.selection import Selection
from connectomics.stages.decode.context import BLOCK_VOXELS, PLAN, VOXEL_BYTES, StepContext, decode_plan, kept_plan
from connectomics.stages.decode.tasks import BlockPieces
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

MASK = "mask"
HOLES = Selection(off_border=True, by_value=True)


def is_inside(image: Array) -> Array:
    """bool (z, y, x): which voxels of an image (c, z, y, x) are not zero in every channel."""
    inside: Array = image[0] != 0 if len(image) == 1 else (image != 0).any(axis=0)
    return inside


def make_mask(reader: VolumeReader, box: Box, labels: ReadBox | None, workspace: Workspace | None) -> ReadBox:
    """The mask of a volume: what is not zero, with its holes filled as scipy's ``binary_fill_holes`` fills them.

    Parameters
    ----------
    reader
        The volume, all its channels.
    box
        Its nonzero box.
    labels
        Gives labels (1, z, y, x) that count as inside, within ``box``; None: there are none.
    workspace
        Where the mask is made and kept, block by block; what is there already is not made again. None: it is made for
        a volume in memory, and kept there.

    Returns
    -------
    read
        Gives bool (1, z, y, x) of any box of the volume.
    """

    def inside(part: Box) -> Array:
        mask = is_inside(reader.read(part))
        shared = part.intersect(box)
        if labels is not None and shared.voxels:
            mask[shared.relative_to(part).slices] |= labels(shared)[0] != 0
        return mask

    if 1 in reader.info.extent:
        return lambda part: inside(part)[None]
    name = MASK if labels is None else f"{MASK}_with_labels"
    if workspace is not None:
        store = _stored(reader, inside, name, workspace)
        return lambda part: store.read(part).view(np.bool_)
    with tempfile.TemporaryDirectory() as folder:
        store = _stored(reader, inside, name, Workspace(Path(folder), _in_order, BLOCK_VOXELS * VOXEL_BYTES))
        whole = store.read(Box.of_shape(store.info.extent)).view(np.bool_)
        store.close()
    return lambda part: whole[(slice(None), *part.slices)]


def sections_of(mask: ReadBox, info: VolumeInfo, axis: int) -> Array:
    """int64: voxels inside the mask in each section of the volume along an axis (0 = z, 1 = y, 2 = x)."""
    counts = np.zeros(info.extent[axis], np.int64)
    others = tuple(a for a in range(3) if a != axis)
    for block in BlockGrid(info.extent, decode_plan(info, BLOCK_VOXELS).block_shape):
        counts[block.core.slices[axis]] += np.count_nonzero(mask(block.core)[0], axis=others)
    return counts


def _stored(reader: VolumeReader, inside: ReadBox, name: str, workspace: Workspace) -> Store:
    info = reader.info
    raw_bytes = info.channels * info.dtype.itemsize
    plan = decode_plan(info, workspace.block_bytes * VOXEL_BYTES // (VOXEL_BYTES + raw_bytes))
    plan = kept_plan(workspace.work / f"{name}.{PLAN}", plan)
    grid = BlockGrid(info.extent, plan.block_shape)
    context = StepContext(
        workspace.work, name, plan, grid, run_key=key_of({"block": list(plan.block_shape)}), run=workspace.run
    )

    def outside(part: Box) -> Array:
        return np.logical_not(is_inside(reader.read(part)))

    pieces = context.pieces(BlockPieces(outside, Connectivity(6)))
    tables, _, _ = context.objects(pieces, HOLES, joined=True)
    return context.paint(pieces, tables, info, np.dtype(np.uint8), under=inside)


def _in_order(task: Task, ledger: Ledger) -> BlocksDone:
    """Blocks one after the other, without any retry."""
    for number in ledger.unfinished():
        ledger.append(task.process(task.grid.numbered(number)))
    return BlocksDone(ledger.planned, 0, ledger.finished, 0, failures=())
