"""What the stages of a run share: names of their outputs, and where they work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from connectomics.execution.runner import RunStage

LABELS = "labels"

PROBABILITIES = "probabilities"


BEHIND_BYTES = 32 << 20  # outputs of a block that may be written while the next one is computed


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a stage works, and with what.

    Parameters
    ----------
    work
        Work folder; the result and all that is unfinished lie in it.
    run
        Brings the blocks of a stage into its ledger.
    block_bytes
        Host memory that a block may take.
    alone
        Held while something is made that one process alone may make.
    """

    work: Path
    run: RunStage
    block_bytes: int
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
