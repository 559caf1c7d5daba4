"""Decoding, from the configuration: what is asked for, which volume a word means, final names, the job."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import program_version
from connectomics.assembly.memory import decoding_bytes
from connectomics.assembly.provenance import stamp_of
from connectomics.assembly.settings import memory_budget_bytes
from connectomics.config.load import written
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.objects.table import require_parquet
from connectomics.runs.decoding_run import DecodeJob, DecodeRecord, TableProbabilities
from connectomics.stages.decode.context import decode_plan
from connectomics.stages.decode.object_filters import passes
from connectomics.stages.decode.step_contract import DecodingMemory, DecodingStep, StepInput
from connectomics.stages.decode.values import ClassProbabilities, Values, probability_units
from connectomics.stages.output.export import FORMATS, export_path, formats_holding
from connectomics.stages.output.finish import FinalOutput
from connectomics.volumes.listing import stem_of
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Nanometres, VolumeInfo, VolumeReader
from connectomics.volumes.watched import changed_input

OBJECTS = "objects"
SUFFIX = "_instances"
RUN = ".run"
SMALLEST_IDS = np.dtype(np.uint32)


@dataclass(frozen=True, slots=True)
class DecodingInput:
    """A volume of labels, ids or probabilities to be decoded.

    For the table there are the model's ``probabilities`` of all labels, or None, and ``certain``, their stored value of
    probability 1; None for the type's own.
    """

    uri: str
    probabilities: str | None = None
    certain: float | None = None

    @property
    def stem(self) -> str:
        """Return the stem of its results' names."""
        return stem_of(self.uri) + SUFFIX


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
    where memory decides, and ``notes`` are what the user says, for the provenance.
    """

    steps: tuple[DecodingStep, ...]
    output: ObjectsOutput
    axes: str | None
    voxel_size_nm: Nanometres | None
    block_shape: Vec3 | None
    budget_bytes: int
    notes: Mapping[str, object]

    def stated(self) -> list[dict[str, object]]:
        """Return the steps as they stand in the configuration."""
        return [dataclasses.asdict(step) for step in self.steps]  # type: ignore[call-overload]


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


def decoding_input(word: str) -> DecodingInput:
    """Return what a volume, or the RUN folder of an earlier run, means; VolumeError where no labels lie beside that."""
    path = Path(word)
    if path.suffix != RUN:
        return DecodingInput(word)
    for form in FORMATS:
        labels = export_path(path.parent, path.name.removesuffix(RUN), form)
        if labels.exists():
            return DecodingInput(str(labels))
    raise VolumeError(
        f"{word}: no finished labels lie beside this RUN folder; run the command that began it again until it ends, or "
        "name a volume"
    )


def output_of(request: DecodingRequest, source: DecodingInput, volume: VolumeReader) -> FinalOutput:
    """Return the final volume with its result key."""
    facts: dict[str, object] = {
        "decoding": request.stated(),
        "input": _identity(source.uri, volume),
        "probabilities": None if source.probabilities is None else _known(source.probabilities),
        "axes": request.axes,
        "voxel_size_nm": list(volume.info.voxel_size_nm or ()),
    }
    for step in request.steps:
        if step.probabilities is not None:
            facts["probabilities"] = _known(step.probabilities)
    output = request.output
    return FinalOutput(OBJECTS, source.stem, key_of(facts), output.formats, pyramid=output.pyramid)


def _require_unchanged(request: DecodingRequest, source: DecodingInput, output: FinalOutput) -> None:
    """Open all inputs again, and refuse to go on, by a VolumeError, if they are not those of this result."""
    with contextlib.closing(open_decoding_input(request, source)) as volume:
        now = output_of(request, source, volume)
    if now.result_key != output.result_key:
        raise VolumeError(changed_input(source.uri))


def _known(uri: str) -> dict[str, object]:
    with contextlib.closing(open_volume(uri)) as reader:
        return _identity(uri, reader)


def _identity(uri: str, reader: VolumeReader) -> dict[str, object]:
    """The result key of what a run made, which another run may make again; of other volumes what the file says."""
    stamp, _ = stamp_of(Path(uri)) or ({}, "")
    key = stamp.get("result_key")
    return reader.identity if key is None else {"result_key": key}


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
    except (ConfigError, VolumeError):
        reader.close()
        raise
    return reader


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
    probabilities = None
    if likely is not None:
        if likely.info.extent != volume.info.extent:
            raise VolumeError(
                f"{source.uri}: has extent (z, y, x) {volume.info.extent}, its probabilities {likely.info.extent}; "
                "name those of this volume"
            )
        probabilities = TableProbabilities(
            ClassProbabilities(likely, Values(volume)), probability_units(likely.info, source.certain)
        )
    provenance = {
        "program": program_version(),
        **request.notes,
        "input": _identity(source.uri, volume),
        "decoding": request.stated(),
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
    return plan if request.block_shape is None else BlockPlan(request.block_shape, request.block_shape)


def _command(request: DecodingRequest, source: DecodingInput) -> tuple[str, ...]:
    """Return the words of the command that makes this result again, but for where it goes."""
    stated = {
        "decoding": request.stated(),
        "inference.axes": request.axes,
        "inference.voxel_size_nm": request.voxel_size_nm,
        "inference.output.formats": list(request.output.formats),
        "inference.output.table": request.output.table,
    }
    return ("decode", source.uri, *(f"{key}={written(value)}" for key, value in stated.items() if value is not None))
