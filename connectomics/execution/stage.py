"""What the stages of a run share: names of their outputs, and where work beside the first blocks is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from connectomics.execution.runner import RunStage

LABELS = "labels"

PROBABILITIES = "probabilities"


BEHIND_BYTES = 32 << 20  # outputs of a block that may be written while the next one is computed


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where work beside the first blocks is done, and with what: by one process alone, but for the survey's bands.

    Parameters
    ----------
    work
        Work folder; the result and all that is unfinished lie in it.
    run
        Brings the blocks of a stage into its ledger.
    block_bytes
        Host memory that a block may take.
    """

    work: Path
    run: RunStage
    block_bytes: int
