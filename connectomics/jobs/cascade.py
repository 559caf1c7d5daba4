"""The first stage of a cascade: its labels of a volume, computed before the second stage begins and kept in RUN."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.volumes import first_stage_of, job_of
from connectomics.execution.executors.overlapping import OverlappingExecutor
from connectomics.execution.runner import OnBlock
from connectomics.jobs.apart import kept_previous, labelled_apart
from connectomics.runs.volume import run_volume
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.volume import VolumeReader

log = logging.getLogger(__name__)


@contextlib.contextmanager
def previous_labels(
    engine: Engine, source: VolumeSource, reader: VolumeReader, on_block: OnBlock
) -> Iterator[VolumeReader | None]:
    """The labels of the previous stage of a volume while the context is open; None where the model has no such stage.

    Where a model gives them they are a volume of their own with its own ledger and result key, in the RUN folder, so
    that a run which is killed in either stage continues there.

    Raises
    ------
    ConnectomicsError
        If they cannot be computed or read, or do not fit the volume.
    """
    if engine.previous is not None:
        _compute(engine, source, reader, on_block=on_block)
    with kept_previous(engine, source, reader) as labels:
        yield labels


def _compute(engine: Engine, source: VolumeSource, reader: VolumeReader, on_block: OnBlock) -> None:
    """Compute the first stage's labels if they are not there."""
    first = first_stage_of(engine, source)
    job = job_of(first, source, reader)
    if any(output.missing(first.settings.folder) for output in job.outputs):
        log.info("the previous stage, configuration %s", first.spec.configuration)
        job = replace(job, outputs=tuple(replace(output, overwrite=True) for output in job.outputs))
        apart = labelled_apart(first, source)
        run_volume(job, first.settings, OverlappingExecutor(), on_block, apart=apart)
