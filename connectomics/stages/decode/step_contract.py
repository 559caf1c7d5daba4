"""What a step of ``decoding`` is: ``DecodingStep``, the one home of its settings, checks, memory and work.

``core.features`` names the steps, ``config.load`` reads their settings, ``assembly.decode_jobs`` asks what they
need, ``runs.decoding_run`` runs them; ``connectomics.testing.decoding_step`` holds what each must keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from connectomics.core.errors import ConfigError, ResourceError, VolumeError
from connectomics.execution.block_plan import REFUSAL_STEP_BYTES, BlockPlan
from connectomics.objects.selection import Selection
from connectomics.stages.decode.context import EVERYTHING, DecodingState, StepContext
from connectomics.volumes.volume import VolumeInfo

CONNECTIVITIES = (4, 8, 6, 18, 26)
Rules = Mapping[str, tuple[bool, str]]
"""By key whether its value is possible, and what is said where it is not: that it "must be one of …"."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """What is known before any work of what a step will be given.

    Parameters
    ----------
    uri
        The volume that is decoded, for messages.
    info
        Of this volume; None before the run that makes it, which gives labels.
    ids
        Whether the step reads the ids that the one before it leaves, not this volume.
    probabilities
        Whether the probabilities of the voxels' labels are known.
    """

    uri: str
    info: VolumeInfo | None
    ids: bool = False
    probabilities: bool = False


@dataclass(frozen=True, slots=True)
class DecodingMemory:
    """Host memory: the budget, and what of it is left for a block or a component."""

    budget_bytes: int
    free_bytes: int

    def require(self, need_bytes: int, what: str, instead: str) -> None:
        """Refuse what does not fit, by a ResourceError with the smallest budget in which it does."""
        if need_bytes > self.free_bytes:
            least = math.ceil((self.budget_bytes - self.free_bytes + need_bytes) / REFUSAL_STEP_BYTES) + 1
            raise ResourceError(
                f"{what} needs {need_bytes / 1e9:.3f} GB, of the memory budget of {self.budget_bytes / 1e9:.3f} GB "
                f"{self.free_bytes / 1e9:.3f} GB are left; raise system.memory_budget_gb to at least "
                f"{least * REFUSAL_STEP_BYTES / 1e9:.2f}, or {instead}"
            )


class DecodingStep(Protocol):
    """One step of ``decoding``: a frozen dataclass whose fields are its keys in the configuration, ``name`` first.

    The fields are bool, int, float or str, or one of them or None; all of them are in the result key. What a step
    leaves on disk is whole or absent, does not depend on the blocks, and is called after its context.
    """

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    @property
    def probabilities(self) -> str | None:
        """A volume of probabilities that the step names."""
        ...

    @property
    def selects(self) -> bool:
        """Whether it leaves only those of the objects that it finds which its context selects."""
        ...

    def rules(self) -> Rules:
        """Say of each key that may be impossible whether it is possible."""
        ...

    def check(self, key: str, given: StepInput) -> StepInput:
        """Refuse what the step cannot work on, before any work; give what the next step is given.

        Parameters
        ----------
        key
            Where the step stands in the configuration: ``decoding[0]``.
        given
            What it is given.

        Raises
        ------
        ConfigError
            If the step does not suit what is decoded.
        VolumeError
            If the volume lacks something.
        """
        ...

    def plan(self, key: str, info: VolumeInfo, memory: DecodingMemory, plan: BlockPlan) -> BlockPlan:
        """Return blocks that fit this step, too: ``plan``, or smaller ones.

        Raises
        ------
        ResourceError
            If none do.
        """
        ...

    def run(self, state: DecodingState, context: StepContext) -> DecodingState:
        """Do the step, continuing whatever an earlier run left."""
        ...


@dataclass(frozen=True, slots=True)
class DecodingPass:
    """A step, and which of the objects that it finds stay, where it selects."""

    step: DecodingStep
    selection: Selection = EVERYTHING


def foreground_rules(connectivity: int, channel: int, *, named_twice: bool) -> Rules:
    """Return the rules of what makes foreground of a volume; ``named_twice``: probabilities, beside a threshold."""
    return {
        "connectivity": (connectivity in CONNECTIVITIES, f"must be one of {', '.join(map(str, CONNECTIVITIES))}"),
        "channel": (channel >= 0, "must be 0 or more"),
        "probabilities": (not named_twice, "the threshold's volume has them"),
    }


def check_values(key: str, given: StepInput, threshold: float | None = None, channel: int = 0) -> None:
    """Refuse what holds no labels and becomes none by a threshold.

    Raises
    ------
    ConfigError
        If labels of a run are held against a threshold.
    VolumeError
        If the volume has probabilities and there is no threshold, or it has too few or too many channels.
    """
    if given.info is None and threshold is not None:
        raise ConfigError(
            f"{key}.threshold is {threshold}, but a run decodes its labels, all of which are foreground; leave it out, "
            "or decode the saved probabilities afterwards: connectomics decode NAME_labels_probabilities.h5"
        )
    if given.ids or given.info is None:
        return
    channels, dtype = given.info.channels, given.info.dtype
    problem = ""
    if dtype.kind == "f" and threshold is None:
        problem = (
            f"holds {dtype}, not labels; state which probabilities are foreground: decoding=[{{name: "
            "connected_components, threshold: 0.5}]"
        )
    elif channel >= channels:
        problem = f"has {channels} channels, so {key}.channel must be below that, not {channel}"
    elif channels > 1 and threshold is None:
        problem = f"has {channels} channels, labels have one; state a threshold and the channel of probabilities"
    if problem:
        raise VolumeError(f"{given.uri}: {problem}")
