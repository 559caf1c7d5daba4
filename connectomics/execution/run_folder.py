"""What stands where in RUN: one work folder for each result and program, in it ledgers, stores, sessions, leases."""

from __future__ import annotations

import contextlib
from pathlib import Path

from connectomics.core.errors import ConfigError
from connectomics.execution.block_plan import HEADER
from connectomics.volumes.digests import SUFFIX

LEDGER = "ledger"  # of the predict stage; those of other stages are called ledger_STAGE
COORDINATION = "coordination"  # what the processes of a run agree on
OLD_WORKERS = "workers"  # where programs before kept their heartbeats
SURVEY = "survey.json"
AGREEMENT = "agreement.json"  # of fast with exact
REPORTS = "reports"  # of each process that took part, made when it ends and kept until the run is finished
REPORT = "report.json"  # their sum
CHECKSUMS = "checksums"  # of final outputs
LOG = "run.log"
PROVENANCE = "provenance.json"  # of the outputs that were made last
PREPARATION = "preparation"  # the lease on what one process makes for all: the survey's end, stores, tables
SINGLE_WRITER = "single_writer"  # the lease on what one process alone does behind the blocks: exports, publishing


def work_folders(run: Path) -> list[Path]:
    """Work folders of a RUN folder in which blocks were begun; a ConfigError if there is none."""
    works = begun_folders(run)
    if not works:
        raise ConfigError(f"{run}: is not the RUN folder of a run with blocks; give OUTPUT_PATH/NAME_labels.run")
    return works


def begun_folders(run: Path) -> list[Path]:
    """Work folders of a RUN folder in which blocks were begun; none where the run failed before, or it is no RUN."""
    return sorted({path.parent.parent for path in run.glob(f"*/*/{HEADER}")})


def ledger_folders(work: Path) -> list[Path]:
    """The ledgers of a work folder, one for each stage, in the order in which they were begun."""
    found = []
    for path in (path for place in (work, *work.glob("staging.*")) for path in place.glob(f"*/{HEADER}")):
        with contextlib.suppress(FileNotFoundError):  # what was made in a staging folder has just been put in place
            found.append((path.stat().st_mtime_ns, path))
    return [path.parent for _, path in sorted(found)]


def stage_of(ledger: Path) -> str:
    """Name of the stage that a ledger's folder belongs to."""
    return "predict" if ledger.name == LEDGER else ledger.name.removeprefix(f"{LEDGER}_")


def checksums_of(run: Path, output: Path) -> Path:
    """Where the checksums of a final output are kept."""
    return run / CHECKSUMS / (output.name + SUFFIX)
