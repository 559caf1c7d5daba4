"""Blocks for a volume: as large as recovery allows, as small as the memory budget demands, in whole chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from connectomics.errors import ResourceError
from connectomics.geometry import Vec3, vec3

PLANE_CHUNK = 512  # chunk edge in y and x where the patch is one voxel deep
CUBE_CHUNK = 64  # chunk edge where it is deeper
WHOLE_PLANE_VOXELS = 1 << 24  # planes up to 16 megavoxels are not cut
STRIPE_ROWS = 2048
STRIPE_PATCHES = 10.5  # patches a stripe is tall at least: two windows a cut, under 10 %, are computed twice
BLOCK_VOXELS = 1 << 22  # voxels of a block of whole sections
SLAB_PATCHES = 4  # patches a 3D slab is thick: a quarter of the windows are computed twice
FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Shape of the blocks' cores and of the chunks inside them, (z, y, x) voxels; chunks divide blocks."""

    block_shape: Vec3
    chunk_shape: Vec3


def plan_blocks(
    extent: Vec3, patch: Vec3, classes: int, channels: int, budget_bytes: int, kept_bytes: int = 0
) -> BlockPlan:
    """Choose blocks for a volume.

    Parameters
    ----------
    extent, patch
        Volume and window (z, y, x) in voxels.
    classes
        Accumulated channels: the network's classes times the folds, plus one for the weights.
    channels
        Input channels.
    budget_bytes
        Host memory one block may use for its accumulator and input.
    kept_bytes
        What of it is taken all the time: the volume's mask.

    Raises
    ------
    ResourceError
        If even one window's accumulator exceeds the budget.
    """
    chunk = _chunk(extent, patch)
    if patch[0] == 1:
        rows = _up(max(STRIPE_ROWS, math.ceil(STRIPE_PATCHES * patch[1])), chunk[1])
        if extent[1] * extent[2] <= WHOLE_PLANE_VOXELS:
            rows = extent[1]
        block = [1, min(rows, extent[1]), extent[2]]
        block[0] = max(1, min(extent[0], BLOCK_VOXELS // (block[1] * block[2])))
        rolling = 1
    else:
        block = [min(extent[0], _up(SLAB_PATCHES * patch[0], chunk[0])), extent[1], extent[2]]
        rolling = 0
    _fit(block, chunk, patch, rolling, classes + channels, budget_bytes, kept_bytes)
    return BlockPlan(vec3([_up(b, c) for b, c in zip(block, chunk, strict=True)]), chunk)


def forced_plan(extent: Vec3, patch: Vec3, block: Vec3) -> BlockPlan:
    """The plan for a stated block shape, rounded up to whole chunks no larger than it."""
    chunk = vec3([min(c, b) for c, b in zip(_chunk(extent, patch), block, strict=True)])
    return BlockPlan(vec3([_up(min(b, n), c) for b, n, c in zip(block, extent, chunk, strict=True)]), chunk)


def common_plan(plans: Sequence[BlockPlan]) -> BlockPlan:
    """One plan for the models of an ensemble: chunks of the largest, blocks no larger than any but for whole chunks."""
    chunk = max((plan.chunk_shape for plan in plans), key=min)  # those of a 3D model, of which a flat one has no part
    least = [min(lengths) for lengths in zip(*(plan.block_shape for plan in plans), strict=True)]
    return BlockPlan(vec3([_up(n, c) for n, c in zip(least, chunk, strict=True)]), chunk)


def with_logits_in_memory(plan: BlockPlan, classes: int, finer: float, budget_bytes: int) -> BlockPlan:
    """A plan whose blocks' logits fit half the budget, halved along z until they do: resampling keeps them.

    Parameters
    ----------
    classes
        Output channels of the network.
    finer
        Network voxels a voxel of the volume.
    """
    depth, rows, columns = plan.block_shape
    while depth > plan.chunk_shape[0] and depth * rows * columns * finer * classes * FLOAT_BYTES * 2 > budget_bytes:
        depth = _up(depth // 2, plan.chunk_shape[0])
    return BlockPlan((depth, rows, columns), plan.chunk_shape)


def whole_plan(
    extent: Vec3, patch: Vec3, classes: int, channels: int, budget_bytes: int, kept_bytes: int = 0
) -> BlockPlan:
    """One block for a volume, or one a section where the patch is flat: for engines that do not cut.

    Raises
    ------
    ResourceError
        If it does not fit the budget: input, weighted sums, their copy and the labels' logits.
    """
    block = (1, extent[1], extent[2]) if patch[0] == 1 else extent
    need = math.prod(block) * (channels + 3 * classes) * FLOAT_BYTES + kept_bytes
    if need > budget_bytes:
        raise ResourceError(
            f"inference.sliding_window.engine=monai keeps {block} voxels whole, about {need / 1e9:.3f} GB, the memory "
            f"budget is {budget_bytes / 1e9:.3f} GB; use engine=nnunet, or raise system.memory_budget_gb"
        )
    return forced_plan(extent, patch, block)


def _chunk(extent: Vec3, patch: Vec3) -> Vec3:
    wanted = (1, PLANE_CHUNK, PLANE_CHUNK) if patch[0] == 1 else (CUBE_CHUNK,) * 3
    return vec3([min(c, n) for c, n in zip(wanted, extent, strict=True)])


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _working_bytes(block: list[int], patch: Vec3, rolling: int, channels: int) -> int:
    """Accumulator and input rows of one position of the rolling axis, windows' overhang included."""
    spans = [b + 2 * p for b, p in zip(block, patch, strict=True)]
    spans[rolling] = 2 * patch[rolling]
    if rolling == 1:
        spans[0] = 1
    return math.prod(spans) * channels * FLOAT_BYTES


def _fit(
    block: list[int], chunk: Vec3, patch: Vec3, rolling: int, channels: int, budget_bytes: int, kept_bytes: int
) -> None:
    """Halve the axes that do not roll, the longest first, until a block works within the budget."""
    free = [a for a in (1, 2) if a != rolling]
    while (need := _working_bytes(block, patch, rolling, channels) + kept_bytes) > budget_bytes:
        axis = max(free, key=lambda a: block[a])
        if block[axis] <= chunk[axis]:
            raise ResourceError(
                f"a block of {tuple(block)} voxels needs {need / 1e9:.3f} GB, the memory budget is "
                f"{budget_bytes / 1e9:.3f} GB; raise system.memory_budget_gb to at least {need / 1e9 + 0.001:.3f}"
            )
        block[axis] = max(chunk[axis], _up(block[axis] // 2, chunk[axis]))
