"""One volume as a run is given it: what is read, how it is labelled, where its results go, what it may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.lease import LIMIT_S
from connectomics.execution.retry import PAUSES_S
from connectomics.stages.decode.context import BLOCK_VOXELS, VOXEL_BYTES
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.precision_check import FastContract
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.stages.survey.region import RegionOfInterest
from connectomics.volumes.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a volume is run; nothing here changes a voxel.

    Parameters
    ----------
    folder
        Where final outputs and RUN folders go.
    program
        Name and version of the program, part of the run key.
    budget_bytes
        Host memory.
    numeric_class
        Of the backend, kept in the ledger's header.
    allow_mixed
        Resume although the numeric class differs.
    readers
        Threads that may read ahead in the survey, as far as memory goes.
    stale_s
        How long a process of another machine may stand still before others take over what it had in hand.
    pauses_s
        Seconds to wait before each further attempt where reading or writing fails for a moment.
    """

    folder: Path
    program: str
    budget_bytes: int
    numeric_class: Mapping[str, object]
    allow_mixed: bool = False
    readers: int = 1
    stale_s: float = LIMIT_S
    pauses_s: tuple[float, ...] = PAUSES_S


@dataclass(frozen=True, slots=True)
class Labeller:
    """How voxels become labels: models, filters of whole objects, what is wanted, what a fast run is held to.

    Without ``roi`` every voxel is wanted.
    """

    segmenter: Segmenter
    filters: BinaryFilters
    roi: RegionOfInterest | None = None
    contract: FastContract | None = None


BLOCKS_KEY, STEPS_KEY = "inference.block_shape", "decoding"  # as they stand in commands


def command_with_blocks(command: Sequence[str], plan: BlockPlan) -> list[str]:
    """A command that also states how the volume was cut, which goes into run keys and chunks.

    It stays as it is where it states blocks, and where it labels and decodes: that cuts twice, in two ways.
    """
    keys = (BLOCKS_KEY,) if "decode" in command[:1] else (BLOCKS_KEY, STEPS_KEY)
    if any(word.partition("=")[0] in keys for word in command):
        return list(command)
    shape = ",".join(map(str, plan.block_shape))
    return [*command, f"{BLOCKS_KEY}=[{shape}]"]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is told of a volume: its provenance, the command that makes it again, and the time that was predicted.

    ``told`` goes into ``provenance.json`` alone, not into the outputs: how a choice was made that the command states.
    ``require_unchanged`` is called before a result is stamped with them; it raises VolumeError where what was read is
    not any more what it was when the provenance was taken.
    """

    provenance: Mapping[str, object]
    command: tuple[str, ...]
    predicted_s: float | None = None
    told: Mapping[str, object] = field(default_factory=dict)
    require_unchanged: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What a volume's work may take.

    ``readers`` threads survey it. ``filter_block_bytes`` is what a block may take whose filters, or the holes of whose
    mask, are worked out. ``on_device`` tells that a device has memory of its own, which the blocks were tried on.
    """

    readers: int = 1
    filter_block_bytes: int = BLOCK_VOXELS * VOXEL_BYTES
    on_device: bool = False


@dataclass(frozen=True, slots=True)
class VolumeJob:
    """One volume and what is wanted of it."""

    name: str
    run_folder: Path
    reader: VolumeReader
    labeller: Labeller
    outputs: tuple[FinalOutput, ...]
    plan: BlockPlan
    record: JobRecord
    limits: JobLimits = JobLimits()
