"""One sample of fast against exact for the small volumes of a call; one of each would take longer than to label it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.volumes import job_of, opened_source
from connectomics.core.errors import ConnectomicsError
from connectomics.core.geometry import Box
from connectomics.execution.retry import RetryingReader
from connectomics.runs.agreement import measure_agreement
from connectomics.runs.job import VolumeJob
from connectomics.stages.predict.precision_check import SAMPLED_VOXELS, Agreement, spread
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.volume import VolumeInfo

log = logging.getLogger(__name__)
SMALL_VOXELS = 20 * SAMPLED_VOXELS  # of a larger volume its own sample is 5 % at most
VOLUMES = 4  # that give the sample, at least, where there are so many


class SharedSample:
    """Holds small volumes to a sample of all of them, taken once a numeric class, before the first of them is begun.

    Parameters
    ----------
    sources
        All volumes of the call, finished ones as well, so that a rerun takes the same sample.
    engine_of
        What a volume is labelled with, of an engine; None: the engine as it is.
    """

    def __init__(
        self, sources: Sequence[VolumeSource], engine_of: Callable[[VolumeSource, Engine], Engine] | None = None
    ) -> None:
        self._sources = sources
        self._engine_of = engine_of or (lambda _, engine: engine)
        self._taken: dict[tuple[tuple[str, object], ...], Agreement] = {}

    def shared_by(self, engine: Engine, job: VolumeJob) -> VolumeJob:
        """The job, held to the shared sample if it is small; second stages of a cascade are not, nor is one alone."""
        alone = len(self._sources) == 1 or any(spec.previous_stage is not None for spec in engine.specs)
        if job.labeller.contract is None or alone or not _small(job.reader.info):
            return job
        contract = replace(job.labeller.contract, shared=functools.partial(self._taken_by, engine))
        return replace(job, labeller=replace(job.labeller, contract=contract))

    def _taken_by(self, engine: Engine) -> Agreement:
        numeric_class = tuple(sorted(engine.settings.numeric_class.items()))
        if numeric_class not in self._taken:
            found = self._taken[numeric_class] = self._take(engine)
            log.warning("inference.precision=fast: %s, for all volumes of this call", found.describe())
        return self._taken[numeric_class]

    def _take(self, engine: Engine) -> Agreement:
        """Sample volumes that lie apart in the list until a million voxels are compared; skip what cannot be read."""
        found = Agreement(0, 0, ())
        for seen, number in enumerate(spread(len(self._sources), 0)):
            missing = SAMPLED_VOXELS - found.voxels
            if missing <= 0:
                break
            share = max(SAMPLED_VOXELS // VOLUMES, math.ceil(missing / (len(self._sources) - seen)))
            source = self._sources[number]
            try:
                found += self._measured(engine, source, share)
            except (ConnectomicsError, OSError, MemoryError) as error:  # its own run will say so
                log.info("%s is not in the sample of fast against exact: %s", source.name, error)
        return found

    def _measured(self, engine: Engine, source: VolumeSource, voxels: int) -> Agreement:
        engine = self._engine_of(source, engine)
        with opened_source(engine, source) as (reader, roi):
            if not _small(reader.info):
                return Agreement(0, 0, ())
            job = job_of(engine, source, reader, previous=None, roi=roi)
            retrying = RetryingReader(reader, source.name, engine.settings.pauses_s)
            return measure_agreement(job, retrying, job.labeller.segmenter.survey(retrying, source.name), voxels)


def _small(info: VolumeInfo) -> bool:
    return Box.of_shape(info.extent).voxels < SMALL_VOXELS
