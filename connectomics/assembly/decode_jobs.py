"""Decoding, from the configuration: what is asked for, which volume a word means, final names, the job."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from connectomics.assembly.decode_inputs import (
    RUN,
    DecodingInput,
    check_stored,
    identity_at,
    identity_of,
    units_of_classes,
    units_of_volume,
)
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import program_version
from connectomics.assembly.memory import decoding_bytes
from connectomics.assembly.reproduction import named_steps, steps_from_anywhere, words_of
from connectomics.assembly.settings import memory_budget_bytes
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.table import require_parquet
from connectomics.runs.decoding_run import DecodeJob, DecodeRecord, DecodeSettings, TableProbabilities
from connectomics.stages.decode.context import decode_plan, in_chunks
from connectomics.stages.decode.object_filters import passes
from connectomics.stages.decode.step_contract import DecodingMemory, DecodingStep, StepInput
from connectomics.stages.decode.values import ClassProbabilities, Values
from connectomics.stages.output.export import formats_holding
from connectomics.stages.output.finish import FinalOutput
from connectomics.volumes.opening import open_volume
from connectomics.volumes.source import absolute_uri
from connectomics.volumes.volume import Nanometres, VolumeInfo, VolumeReader
from connectomics.volumes.watched import changed_input

OBJECTS = "objects"
SMALLEST_IDS = np.dtype(np.uint32)
DEFAULT_NOTES = {"experiment_name": Config().experiment_name, "description": Config().description}


@dataclass(frozen=True, slots=True)
class ObjectsOutput:
    """What decoding leaves: folder, formats of the final volume, kind of the table (``none`` for none)."""

    folder: Path
    formats: tuple[str, ...]
    table: str
    pyramid: bool
    overwrite: bool


@dataclass(frozen=True, slots=True)
class DecodingRequest:
    """What is asked of all volumes that are decoded: the steps in order, and what is left.

    ``axes`` and ``voxel_size_nm`` are those of volumes that do not say so themselves, ``block_shape`` (z, y, x) is None
    where memory decides, ``stale_s`` is that of ``RunSettings``, and ``notes`` are what the user says, for the
    provenance.
    """

    steps: tuple[DecodingStep, ...]
    output: ObjectsOutput
    axes: str | None
    voxel_size_nm: Nanometres | None
    block_shape: Vec3 | None
    budget_bytes: int
    stale_s: float
    notes: Mapping[str, object]

    def facts(self) -> list[dict[str, object]]:
        """Return the steps for result keys and provenance, which do not depend on where volumes lie."""
        return named_steps(self.steps)


def decoding_request(config: Config) -> DecodingRequest:
    """Resolve a configuration; refuse one that cannot decode anything, before any work.

    Raises
    ------
    ConfigError
        If there are no steps, or no format that holds ids.
    OutputError
        If the table needs what is not installed.
    """
    if not config.decoding:
        raise ConfigError(
            "decoding names no step; state for example 'decoding=[{name: connected_components}, {name: filters, "
            "min_voxels: 100}]'"
        )
    inference, output = config.inference, config.inference.output
    formats = formats_holding(output.formats, 1, SMALLEST_IDS)
    if not formats:
        raise ConfigError(
            f"inference.output.formats is [{', '.join(output.formats)}], which cannot hold ids; add h5, zarr or tiff"
        )
    if output.table == "parquet":
        require_parquet()
    size, shape = inference.voxel_size_nm, inference.block_shape
    return DecodingRequest(
        tuple(config.decoding),
        ObjectsOutput(
            Path(inference.data.output_path), formats, output.table, pyramid=output.pyramid, overwrite=output.overwrite
        ),
        axes=inference.axes,
        voxel_size_nm=None if size is None else (size[0], size[1], size[2]),
        block_shape=None if shape is None else vec3(shape),
        budget_bytes=memory_budget_bytes(config.system.memory_budget_gb),
        stale_s=config.system.stale_after_s,
        notes={"experiment_name": config.experiment_name, "description": config.description},
    )


def keeps_probabilities(engine: Engine) -> bool:
    """Whether a run keeps the probabilities of all labels, so that each voxel's own is known."""
    rule = engine.segmenter.probabilities
    if rule is None or rule.activation == "none" or engine.spec.regions:
        return False
    return rule.channels == tuple(range(engine.spec.classes))


def check_run(request: DecodingRequest, engine: Engine) -> None:
    """Refuse, before a run, steps that need a threshold of its labels, or probabilities that it does not keep."""
    _check(request, StepInput("", None, probabilities=keeps_probabilities(engine)))


def _check(request: DecodingRequest, given: StepInput) -> None:
    for i, step in enumerate(request.steps):
        given = step.check(f"decoding[{i}]", given)


def output_of(request: DecodingRequest, source: DecodingInput, volume: VolumeReader) -> FinalOutput:
    """Return the final volume with its result key."""
    facts: dict[str, object] = {
        "decoding": request.facts(),
        "input": identity_of(source.uri, volume),
        "probabilities": None if source.probabilities is None else identity_at(source.probabilities),
        "axes": request.axes,
        "voxel_size_nm": list(volume.info.voxel_size_nm or ()),
    }
    for step in request.steps:
        if step.probabilities is not None:
            facts["probabilities"] = identity_at(step.probabilities)
    output = request.output
    wanted = {"pyramid": output.pyramid, "overwrite": output.overwrite}
    return FinalOutput(OBJECTS, source.stem, key_of(facts), output.formats, **wanted)


def _require_unchanged(request: DecodingRequest, source: DecodingInput, output: FinalOutput) -> None:
    """Open all inputs again, and refuse to go on, by a VolumeError, if they are not those of this result."""
    with contextlib.closing(open_decoding_input(request, source)) as volume:
        now = output_of(request, source, volume)
    if now.result_key != output.result_key:
        raise VolumeError(changed_input(source.uri))


def table_of(output: ObjectsOutput, source: DecodingInput) -> Path | None:
    """Return the final name of the table of objects, or None where none is wanted."""
    return None if output.table == "none" else output.folder / f"{source.stem}.{output.table}"


def run_folder_of(output: ObjectsOutput, source: DecodingInput) -> Path:
    """Return RUN: the folder of a decoding's log, ledgers and report."""
    return output.folder / f"{source.stem}{RUN}"


def stated_probabilities(request: DecodingRequest, source: DecodingInput) -> str | None:
    """Return the volume of probabilities that a step names, else what the source brings."""
    return next((step.probabilities for step in request.steps if step.probabilities), source.probabilities)


def open_decoding_input(request: DecodingRequest, source: DecodingInput) -> VolumeReader:
    """Open a volume and hold it against the steps; ConfigError or VolumeError where they do not fit."""
    reader = open_volume(source.uri, axes=request.axes, voxel_size_nm=request.voxel_size_nm)
    known = stated_probabilities(request, source) is not None
    try:
        _check(request, StepInput(source.uri, reader.info, probabilities=known))
        check_stored(request.steps[0], source.uri)
    except (ConfigError, VolumeError):
        reader.close()
        raise
    return reader


def settings_of(request: DecodingRequest) -> DecodeSettings:
    """Return how all volumes of a request are decoded."""
    return DecodeSettings(request.output.folder, request.budget_bytes, request.stale_s)


@contextlib.contextmanager
def opened_job(request: DecodingRequest, source: DecodingInput) -> Iterator[DecodeJob]:
    """All that decoding one volume needs, open while the context is; errors are those of opening and ``decode_job``."""
    named = stated_probabilities(request, source)
    with contextlib.ExitStack() as opened:
        volume = opened.enter_context(contextlib.closing(open_decoding_input(request, source)))
        likely = None if named is None else opened.enter_context(contextlib.closing(open_volume(named)))
        yield decode_job(request, source, volume, likely)


def decode_job(
    request: DecodingRequest, source: DecodingInput, volume: VolumeReader, likely: VolumeReader | None
) -> DecodeJob:
    """Return all that decoding one volume needs; it and its probabilities (``likely``) are open.

    Raises
    ------
    ResourceError
        If the memory budget cannot hold the smallest blocks.
    VolumeError
        If the probabilities have another shape.
    """
    output, plan = output_of(request, source, volume), _plan(request, volume.info)
    probabilities = TableProbabilities(own_units=units_of_volume(source.uri, volume.info))
    if likely is not None:
        if likely.info.extent != volume.info.extent:
            raise VolumeError(
                f"{source.uri}: has extent (z, y, x) {volume.info.extent}, its probabilities {likely.info.extent}; "
                "name those of this volume"
            )
        named = stated_probabilities(request, source)
        of_classes = ClassProbabilities(likely, Values(volume))
        probabilities = replace(
            probabilities,
            read=of_classes,
            of_labels=of_classes.of if likely.info.channels > 1 else None,
            units=units_of_classes(str(named), likely.info, source.certain),
        )
    provenance = {
        "program": program_version(),
        **request.notes,
        "input": identity_of(source.uri, volume),
        "decoding": request.facts(),
    }
    return DecodeJob(
        run_folder_of(request.output, source),
        volume,
        passes(request.steps, volume.info.voxel_size_nm),
        output,
        table=table_of(request.output, source),
        plan=plan,
        record=DecodeRecord(
            program_version(),
            provenance,
            _command(request, source),
            require_unchanged=functools.partial(_require_unchanged, request, source, output),
        ),
        probabilities=probabilities,
    )


def _plan(request: DecodingRequest, info: VolumeInfo) -> BlockPlan:
    """Return blocks that fit all steps."""
    free = decoding_bytes(info, request.budget_bytes, psutil.Process().memory_info().rss)
    plan, memory = decode_plan(info, free), DecodingMemory(request.budget_bytes, free)
    for i, step in enumerate(request.steps):
        plan = step.plan(f"decoding[{i}]", info, memory, plan)
    return plan if request.block_shape is None else in_chunks(request.block_shape)


def _command(request: DecodingRequest, source: DecodingInput) -> tuple[str, ...]:
    """Return the words of the command that makes this result again from any folder, but for where it goes."""
    stated = {
        "decoding": steps_from_anywhere(request.steps),
        "inference.axes": request.axes,
        "inference.voxel_size_nm": request.voxel_size_nm,
        "inference.output.formats": list(request.output.formats),
        "inference.output.pyramid": request.output.pyramid,
        "inference.output.table": request.output.table,
        **{key: value for key, value in request.notes.items() if value != DEFAULT_NOTES[key]},
    }
    words = words_of({key: value for key, value in stated.items() if value is not None})
    return ("decode", absolute_uri(source.word or source.uri), *words)
