"""How a volume is cut: what each model's work on it takes, and what memory there is."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.core.errors import DeviceMemoryError, ResourceError
from connectomics.core.geometry import Vec3
from connectomics.execution.block_plan import REFUSAL_STEP_BYTES, BlockPlan
from connectomics.planning.blocks import plan_blocks
from connectomics.planning.memory import LIBRARY_BYTES, Budget, Footprint, NetworkWork, Work, largest_footprint
from connectomics.stages.decode.context import CHUNK, VOXEL_BYTES
from connectomics.stages.output.export import exporting_bytes
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter
from connectomics.stages.survey.survey import survey_bytes
from connectomics.volumes.stored import READ_BYTES, reading_bytes
from connectomics.volumes.volume import VolumeInfo

log = logging.getLogger(__name__)


def peak_of(engine: Engine, segmenter: Segmenter, info: VolumeInfo, block: Vec3) -> Footprint:
    """Memory of the whole process, and of the device, while a volume is worked on in such blocks (z, y, x)."""
    works = _works(engine, segmenter, info)
    budget, _ = _budget(engine, segmenter, info, stored_bytes=works[0].stored_bytes)
    need = largest_footprint(works, block, info.extent)
    return Footprint(budget.host_need(need), need.device_bytes)


def plan_volume(engine: Engine, segmenter: Segmenter, info: VolumeInfo) -> tuple[BlockPlan, int]:
    """Blocks in the volume's axes, and threads that may read ahead in the survey; raises as ``plan_blocks``."""
    works = _works(engine, segmenter, info)
    budget, readers = _budget(engine, segmenter, info, stored_bytes=works[0].stored_bytes)
    return plan_blocks(info.extent, works, budget, engine.inference.outputs.block_shape), readers


def plan_within_device(engine: Engine, segmenters: Sequence[Segmenter], info: VolumeInfo) -> tuple[BlockPlan, int]:
    """Plan as ``plan_volume`` does, with blocks whose memory the device really had for once.

    Parameters
    ----------
    segmenters
        All that will work on the volume's blocks, the run's own first.

    Raises
    ------
    ResourceError
        If the memory budget, or what the device has, cannot hold the smallest blocks.
    """
    plan, readers = plan_volume(engine, segmenters[0], info)
    if engine.memory.device_bytes is None:
        return plan, readers
    while True:
        try:
            for segmenter in segmenters:
                segmenter.try_memory(plan.block_shape)
        except DeviceMemoryError as error:
            log.warning("blocks of %s voxels are too large: %s", plan.block_shape, error)
            works = _works(engine, segmenters[0], info)
            need = largest_footprint(works, plan.block_shape, info.extent).device_bytes
            left = dataclasses.replace(engine.memory, device_bytes=need - 1)
            engine = dataclasses.replace(engine, memory=left)
            try:
                plan, readers = plan_volume(engine, segmenters[0], info)
            except ResourceError:
                raise error from None
        else:
            return plan, readers


def _works(engine: Engine, segmenter: Segmenter, info: VolumeInfo) -> list[Work]:
    pairs = zip(engine.of_members, segmenter.members, strict=True)
    return [_work(engine, segmenter, model, member=member, info=info) for model, member in pairs]


def _work(engine: Engine, segmenter: Segmenter, model: EngineModel, member: EnsembleMember, info: VolumeInfo) -> Work:
    ratio = None
    if member.resampling is not None:
        (z, y, x), (zn, yn, xn) = member.resampling.spacing, member.resampling.target
        ratio = (z / zn, y / yn, x / xn)
    kept = segmenter.probabilities
    probabilities = 0 if kept is None else len(kept.channels) * kept.dtype.itemsize
    return Work(
        NetworkWork(
            model.window.patch,
            model.spec.classes,
            len(model.spec.folds),
            model.spec.input_channels,
            batch=model.window.batch,
            window_bytes=model.window_bytes,
        ),
        info.dtype.itemsize,
        segmenter.labels.dtype.itemsize + probabilities,
        mean_classes=segmenter.classes if len(segmenter.members) > 1 else 0,
        ratio=ratio,
        order=member.order,
        whole=engine.inference.windows.whole,
        on_device=engine.memory.device_bytes is not None,
    )


def _budget(engine: Engine, segmenter: Segmenter, info: VolumeInfo, stored_bytes: int) -> tuple[Budget, int]:
    """What there is and what is taken; threads that read ahead are as many as asked for and as fit half of the rest."""
    host = engine.settings.budget_bytes
    reading = reading_bytes(info)
    taken = engine.memory.base_bytes + reading
    readers = engine.settings.readers
    axes = {member.section_axis or 0 for member in segmenter.members}
    while readers > 1 and max(survey_bytes(info, readers, axis) for axis in axes) > (host - taken) // 2:
        readers -= 1
    exporting = exporting_bytes(info.extent, stored_bytes, engine.inference.outputs.formats)
    passing = max(exporting, *(survey_bytes(info, readers, axis) for axis in axes))
    chunk_bytes = math.prod(info.chunk_shape) * info.channels * info.dtype.itemsize
    decides = info.chunk_shape if chunk_bytes > READ_BYTES else None
    return Budget(host, taken, passing, engine.memory.device_bytes, input_chunk=decides), readers


def decoding_bytes(info: VolumeInfo, budget_bytes: int, base_bytes: int) -> int:
    """Host memory that a block may take whose objects are found, of a process that takes ``base_bytes`` before.

    Raises
    ------
    ResourceError
        If it does not suffice for the smallest blocks.
    """
    taken = base_bytes + reading_bytes(info) + LIBRARY_BYTES
    least = VOXEL_BYTES * CHUNK**3
    if budget_bytes < taken + least:
        steps = -(-(taken + least) // REFUSAL_STEP_BYTES) + 1
        raise ResourceError(
            f"finding objects needs {(taken + least) / 1e9:.3f} GB, {taken / 1e9:.3f} GB of it for the program and for "
            f"reading; the memory budget is {budget_bytes / 1e9:.3f} GB; raise system.memory_budget_gb to at least "
            f"{steps * REFUSAL_STEP_BYTES / 1e9:.2f}"
        )
    return budget_bytes - taken
