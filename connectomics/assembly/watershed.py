"""The watershed of ``decoding``, from the configuration: what it needs of volumes and runs, its memory, its step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from connectomics.assembly.engine.engine import Engine
from connectomics.config.decoding import ConnectedComponents, DecodingStep, Watershed
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ResourceError, VolumeError
from connectomics.core.geometry import Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.basins import subvolume_grid
from connectomics.objects.components import Connectivity
from connectomics.objects.distance import reach
from connectomics.planning.blocks import REFUSAL_STEP_BYTES
from connectomics.stages.decode.context import CHUNK, VOXEL_BYTES, decode_plan
from connectomics.stages.decode.watershed import step as watershed
from connectomics.volumes.volume import VolumeInfo

FLOOD_BYTES = 104  # a voxel of a component's box while it is flooded, beside what is read of probabilities
DISTANCE_BYTES = 40  # a voxel whose distance is computed


def keeps_probabilities(engine: Engine) -> bool:
    """Whether a run keeps the probabilities of all labels, so that each voxel's own is known."""
    rule = engine.segmenter.probabilities
    if rule is None or rule.activation == "none" or engine.spec.regions:
        return False
    return rule.channels == tuple(range(engine.spec.classes))


def check_run(config: Config, engine: Engine) -> None:
    """Refuse thresholds of labels, and a watershed whose probabilities the run that it follows does not keep.

    Raises
    ------
    ConfigError
        If so, before the run.
    """
    for i, step in enumerate(config.decoding):
        if isinstance(step, ConnectedComponents | Watershed) and step.threshold is not None:
            raise ConfigError(
                f"decoding[{i}].threshold is {step.threshold}, but a run decodes its labels, all of which are "
                "foreground; leave it out, or decode the saved probabilities afterwards: connectomics decode "
                "NAME_labels_probabilities.h5"
            )
        if not isinstance(step, Watershed) or step.seed_threshold is None or step.probabilities is not None:
            continue
        if not keeps_probabilities(engine):
            raise ConfigError(
                f"decoding[{i}].seed_threshold needs the probabilities of all labels, which this run does not keep; "
                "set inference.output.save_probabilities=true, with inference.test_time_augmentation.select_channel "
                "and act null, or state seed_distance_nm"
            )


def check_watershed(config: Config, uri: str, info: VolumeInfo, *, known: bool) -> None:
    """Refuse a watershed that this volume lacks something for.

    Parameters
    ----------
    config
        The configuration.
    uri, info
        The volume.
    known
        Whether probabilities are stated beside it.

    Raises
    ------
    ConfigError
        If it lacks probabilities, or ids are held against a threshold.
    VolumeError
        If it lacks a voxel size.
    """
    for i, step in enumerate(config.decoding):
        known |= isinstance(step, ConnectedComponents | Watershed) and step.threshold is not None
        if isinstance(step, Watershed):
            if step.threshold is not None and i > 0:
                raise ConfigError(
                    f"decoding[{i}].threshold is {step.threshold}, but the step before leaves ids, all of which are "
                    "foreground; leave it out"
                )
            if step.seed_threshold is not None and not known:
                raise ConfigError(
                    f"decoding[{i}].seed_threshold needs probabilities, which {uri} does not hold or bring; state "
                    "threshold if it holds them, or probabilities=VOLUME, or take seed_distance_nm"
                )
            if step.seed_distance_nm is not None and info.voxel_size_nm is None:
                raise VolumeError(
                    f"{uri}: does not state its voxel size, which decoding[{i}].seed_distance_nm needs; set "
                    "inference.voxel_size_nm=[z,y,x]"
                )


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory: the budget, and what of it is left for a block or a component."""

    budget_bytes: int
    free_bytes: int

    def require(self, need_bytes: int, what: str, instead: str) -> None:
        """Refuse what does not fit.

        Raises
        ------
        ResourceError
            With the smallest budget in which it does.
        """
        if need_bytes > self.free_bytes:
            least = math.ceil((self.budget_bytes - self.free_bytes + need_bytes) / REFUSAL_STEP_BYTES) + 1
            raise ResourceError(
                f"{what} needs {need_bytes / 1e9:.3f} GB, of the memory budget of {self.budget_bytes / 1e9:.3f} GB "
                f"{self.free_bytes / 1e9:.3f} GB are left; raise system.memory_budget_gb to at least "
                f"{least * REFUSAL_STEP_BYTES / 1e9:.2f}, or {instead}"
            )


def watershed_plan(stated: Sequence[DecodingStep], info: VolumeInfo, memory: Memory, plan: BlockPlan) -> BlockPlan:
    """Blocks whose distances fit, too; as planned where there is no watershed.

    Parameters
    ----------
    stated
        The steps.
    info
        The volume.
    memory
        What may be taken.
    plan
        Blocks that fit without distances.

    Raises
    ------
    ResourceError
        If no blocks do, or the largest component that is flooded whole does not fit.
    """
    for i, step in enumerate(stated):
        if isinstance(step, Watershed):
            key = f"decoding[{i}].max_component_voxels"
            memory.require(
                _flood_bytes(step, info),
                f"a component of {key}={step.max_component_voxels}",
                f"lower {key}, which changes the objects of larger components",
            )
            plan = _for_distances(f"decoding[{i}].seed_distance_nm", step, info, memory, plan=plan)
    return plan


def _flood_bytes(step: Watershed, info: VolumeInfo) -> int:
    flat = Connectivity(step.connectivity).by_section
    extent = math.prod(info.extent[1:] if flat else info.extent)
    channels = 0 if step.seed_threshold is None else info.channels * info.dtype.itemsize
    return min(step.max_component_voxels, extent) * (FLOOD_BYTES + channels)


def _for_distances(key: str, step: Watershed, info: VolumeInfo, memory: Memory, plan: BlockPlan) -> BlockPlan:
    distance, size = step.seed_distance_nm, info.voxel_size_nm
    if distance is None or size is None:
        return plan
    margin = reach(distance, size, by_section=Connectivity(step.connectivity).by_section)

    def need(plan: BlockPlan) -> int:
        return Box.of_shape(plan.block_shape).voxels * VOXEL_BYTES + around(plan.block_shape)

    def around(shape: Vec3) -> int:
        sides = zip(Box.of_shape(shape).grow(margin).shape, info.extent, strict=True)
        return math.prod(min(side, n) for side, n in sides) * DISTANCE_BYTES

    part = memory.free_bytes
    while need(plan) > memory.free_bytes and part >= VOXEL_BYTES * CHUNK**3:
        part //= 2
        plan = decode_plan(info, part)
    subvolumes = subvolume_grid(info.extent, step.max_component_voxels, Connectivity(step.connectivity))
    most = max(need(plan), around(subvolumes.block_shape))
    memory.require(most, f"{key}={distance}, {margin} voxels (z, y, x) around a block,", f"lower {key}")
    return plan


def watershed_of(step: Watershed) -> watershed.Watershed:
    """The step with plain values."""
    values = dataclasses.asdict(step)
    return watershed.Watershed(**{k: v for k, v in values.items() if k not in ("name", "probabilities")})
