"""``Decoder``: brings volumes of labels to objects; finished ones are skipped, unfinished ones continued."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from connectomics.assembly.decode_inputs import RUN, SUFFIX, DecodingInput
from connectomics.assembly.decode_jobs import (
    DecodingRequest,
    keeps_probabilities,
    open_decoding_input,
    opened_job,
    output_of,
    run_folder_of,
    settings_of,
    table_of,
)
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import program_version
from connectomics.core.errors import ConnectomicsError
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.task import RunReport
from connectomics.jobs.apart import decoded_apart
from connectomics.jobs.outcome import NullObserver, Observer, VolumeOutcome, attempted, outcomes_of
from connectomics.runs.decoding_run import lacks_table, run_decode
from connectomics.stages.output.finish import check_names, settle, work_folder
from connectomics.volumes.listing import stem_of

OWN_AXES = "zyx"  # of all labels that a run leaves


class Decoder:
    """Decodes volumes as the request says; the observer hears of progress."""

    def __init__(self, request: DecodingRequest, observer: Observer | None = None) -> None:
        self._request = request
        self._observer = observer or NullObserver()
        self._folder = request.output.folder

    def run(self, sources: Sequence[DecodingInput]) -> list[VolumeOutcome]:
        """Bring volumes to their objects; one outcome each, in the given order."""
        finished = {source.uri: paths for source in sources if (paths := self._finished(source)) is not None}

        def process(number: int) -> VolumeOutcome:
            source = sources[number]
            self._observer.began(source.uri)
            folder = run_folder_of(self._request.output, source)
            return attempted(source.uri, folder, functools.partial(self._process, source))

        return outcomes_of([source.uri for source in sources], finished, process, self._observer)

    def _finished(self, source: DecodingInput) -> tuple[Path, ...] | None:
        """Final paths of a volume that is done, or None; a volume that cannot be opened is not done."""
        try:
            with contextlib.closing(open_decoding_input(self._request, source)) as volume:
                output = output_of(self._request, source, volume)
        except (ConnectomicsError, OSError):
            return None
        table = table_of(self._request.output, source)
        if output.missing(self._folder) or lacks_table(table, output.result_key):
            return None
        folder = run_folder_of(self._request.output, source)
        paths = (*output.paths(self._folder).values(), *([] if table is None else [table]))
        settle(folder, work_folder(folder, (output,), program_version()), (output,), paths)
        return paths

    def _process(self, source: DecodingInput) -> tuple[tuple[Path, ...], RunReport]:
        with opened_job(self._request, source) as job:
            check_names((job.output,), self._folder)
            apart, settings = decoded_apart(self._request, source), settings_of(self._request)
            report = run_decode(job, settings, SerialExecutor(), self._observer.block, apart=apart)
        return job.paths(self._folder), report


def decode_outcomes(
    request: DecodingRequest, engine: Engine, outcomes: Sequence[VolumeOutcome], observer: Observer | None = None
) -> list[VolumeOutcome]:
    """Decode the labels that a run has left; each outcome then has the paths of its objects too, or their failure.

    The engine is that of the run; it knows what its probabilities are.
    """
    axes = request.axes if request.axes == OWN_AXES else None  # stated of the images, not of what was made of them
    decoder = Decoder(replace(request, axes=axes), observer)
    done = [i for i, outcome in enumerate(outcomes) if outcome.state != "failed"]
    decoded = decoder.run([_labels_of(engine, outcomes[i]) for i in done])
    result = list(outcomes)
    for i, objects in zip(done, decoded, strict=True):
        before = outcomes[i]
        state = next(state for state in ("failed", "done", "skipped") if state in (before.state, objects.state))
        paths = (*before.paths, *objects.paths)
        result[i] = replace(before, state=state, reason=objects.reason, paths=paths)
    return result


def objects_of(outcome: VolumeOutcome) -> Path:
    """The first volume of objects of an outcome of ``decode_outcomes``."""
    return next(path for path in outcome.paths if stem_of(str(path)).endswith(SUFFIX))


def _labels_of(engine: Engine, outcome: VolumeOutcome) -> DecodingInput:
    """The labels of a finished volume, with its probabilities where they are of all labels."""
    rule = engine.segmenter.probabilities
    labels = outcome.paths[0]
    run = str(labels.with_name(stem_of(str(labels)) + RUN))
    if rule is None or not keeps_probabilities(engine):
        return DecodingInput(str(labels), word=run)
    likely = [path for path in outcome.paths if path.stem.endswith("_probabilities")]
    return DecodingInput(str(labels), str(likely[0]) if likely else None, rule.scale, word=run)
