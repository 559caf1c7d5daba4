"""Blocks for a volume: as large as recovery allows, as small as the memory budget demands, in whole chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from connectomics.core.errors import ResourceError
from connectomics.core.geometry import Vec3, vec3
from connectomics.execution.block_plan import REFUSAL_STEP_BYTES, BlockPlan
from connectomics.planning.memory import Budget, Footprint, Work, largest_footprint

PLANE_CHUNK = 512  # chunk edge in y and x where the patch is one voxel deep
CUBE_CHUNK = 64  # chunk edge where it is deeper
WHOLE_PLANE_VOXELS = 1 << 24  # planes up to 16 megavoxels are not cut
STRIPE_ROWS = 2048
STRIPE_PATCHES = 10.5  # patches a stripe is tall at least: two windows a cut, under 10 %, are computed twice
BLOCK_VOXELS = 1 << 22  # voxels of a block of whole sections
SLAB_PATCHES = 4  # patches a 3D slab is thick: a quarter of the windows are computed twice
CUBE_PATCHES = 4  # patches a block has along each axis at most, where sections lie across several axes


Need = Callable[[Sequence[int]], Footprint]


def plan_blocks(extent: Vec3, works: Sequence[Work], budget: Budget, stated: Vec3 | None = None) -> BlockPlan:
    """Choose blocks for a volume.

    Parameters
    ----------
    extent
        Of the volume (z, y, x) in voxels.
    works
        What each model does with a block; the largest decides.
    budget
        Memory.
    stated
        A block shape that is wanted instead, rounded up to whole chunks no larger than it.

    Raises
    ------
    ResourceError
        If the budget cannot hold even the smallest blocks, or the stated ones; the message names one that can.
    """
    crossed = len({work.order.axes[0] for work in works if work.network.patch[0] == 1}) > 1
    chunk = max((_chunk(extent, work, crossed) for work in works), key=min)  # of a 3D model, or where sections cross
    if stated is not None:
        chunk = vec3([min(c, b) for c, b in zip(chunk, stated, strict=True)])
        wanted = [stated]
    elif crossed:  # sections lie across several axes, so that no axis can be cut without windows computed twice
        wanted = [vec3([_up(CUBE_PATCHES * _patch(works, axis), chunk[axis]) for axis in range(3)])]
    else:
        wanted = [_preferred(extent, work, chunk) for work in works]
    block = [_up(min(n, *lengths), c) for n, c, *lengths in zip(extent, chunk, *wanted, strict=True)]

    def need(shape: Sequence[int]) -> Footprint:
        return largest_footprint(works, vec3(list(shape)), extent)

    fixed = stated is not None or any(work.whole for work in works)
    while not budget.holds(need(block)):
        axis = None if fixed else _axis_to_cut(block, chunk, works, need)
        if axis is None:
            raise ResourceError(_refusal(vec3(block), need(block), budget, works, stated=stated))
        block[axis] = _half(block[axis], chunk[axis])
    return BlockPlan(vec3(block), chunk)


def _preferred(extent: Vec3, work: Work, chunk: Vec3) -> Vec3:
    """Blocks of one model where memory does not matter, in the volume's axes."""
    own, unit, patch = work.order.turn(extent), work.order.turn(chunk), work.network.patch
    if work.whole:
        block = [1 if patch[0] == 1 else own[0], own[1], own[2]]
    elif patch[0] == 1:
        rows = _up(max(STRIPE_ROWS, math.ceil(STRIPE_PATCHES * patch[1])), unit[1])
        if own[1] * own[2] <= WHOLE_PLANE_VOXELS:
            rows = own[1]
        block = [1, min(rows, own[1]), own[2]]
        block[0] = max(1, min(own[0], BLOCK_VOXELS // (block[1] * block[2])))
    else:
        block = [min(own[0], _up(SLAB_PATCHES * patch[0], unit[0])), own[1], own[2]]
    return work.order.inverse.turn(vec3(block))


def _patch(works: Sequence[Work], axis: int) -> int:
    """Most voxels of a window along an axis of the volume."""
    return max(work.order.inverse.turn(work.network.patch)[axis] for work in works)


def _chunk(extent: Vec3, work: Work, crossed: bool) -> Vec3:
    flat = work.network.patch[0] == 1 and not crossed
    wanted = (1, PLANE_CHUNK, PLANE_CHUNK) if flat else (CUBE_CHUNK,) * 3
    return vec3([min(c, n) for c, n in zip(work.order.inverse.turn(wanted), extent, strict=True)])


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _half(length: int, unit: int) -> int:
    return max(unit, _up(length // 2, unit))


def _axis_to_cut(block: list[int], chunk: Vec3, works: Sequence[Work], need: Need) -> int | None:
    """The axis whose halving saves most for the windows that are then computed twice; None where none saves anything.

    A block of n voxels computes about n + patch voxels' worth of windows along an axis.
    """
    before = need(block)
    best, choice = 0.0, None
    for axis in range(3):
        if block[axis] <= chunk[axis]:
            continue
        cut = list(block)
        cut[axis] = _half(block[axis], chunk[axis])
        after = need(cut)
        saved = (before.host_bytes + before.device_bytes) / (after.host_bytes + after.device_bytes)
        patch = _patch(works, axis)
        overlap = 0 if patch == 1 else patch
        cost = (1 + overlap / cut[axis]) / (1 + overlap / block[axis])
        if saved > 1 and (gain := math.log(saved) / (math.log(cost) + 0.01)) > best:
            best, choice = gain, axis
    return choice


def _refusal(block: Vec3, need: Footprint, budget: Budget, works: Sequence[Work], stated: Vec3 | None) -> str:
    if budget.device_bytes is not None and need.device_bytes > budget.device_bytes:
        return (
            f"blocks of {block} voxels need {need.device_bytes / 1e9:.3f} GB of the device's memory, of which "
            f"{budget.device_bytes / 1e9:.3f} GB are free; use a smaller inference.sliding_window.sw_batch_size, fewer "
            "folds, or system.device=cpu"
        )
    least = budget.host_need(need)
    steps = math.ceil(least / REFUSAL_STEP_BYTES) + 1
    advice = "set inference.block_shape=null or " if stated is not None else ""
    if any(work.whole for work in works):
        advice = "use inference.sliding_window.engine=nnunet, which cuts them, or "
    chunk = ""
    if budget.input_chunk is not None:
        chunk = f" (the input is stored in pieces of {budget.input_chunk} voxels that can only be read whole)"
    return (
        f"blocks of {block} voxels need {least / 1e9:.3f} GB{chunk}, {budget.taken_bytes / 1e9:.3f} GB of it for the "
        f"program, the model and what is kept of the volume; the memory budget is {budget.host_bytes / 1e9:.3f} GB; "
        f"{advice}raise system.memory_budget_gb to at least {steps * REFUSAL_STEP_BYTES / 1e9:.2f}"
    )
