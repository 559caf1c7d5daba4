"""Decoding, from the configuration: which volume a word means, its steps, its final names, its job."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from connectomics.assembly.engine.identity import program_version
from connectomics.assembly.memory import decoding_bytes
from connectomics.assembly.settings import memory_budget_bytes
from connectomics.assembly.watershed import Memory, check_watershed, watershed_of, watershed_plan
from connectomics.config.decoding import ConnectedComponents, DecodingStep, Filters, SliceLinking, Watershed
from connectomics.config.load import written
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.fingerprint import key_of
from connectomics.objects.links import Linking
from connectomics.objects.selection import Selection
from connectomics.objects.table import require_parquet
from connectomics.runs.decode import DecodeJob
from connectomics.stages.decode import linking, steps
from connectomics.stages.decode.context import Step, decode_plan
from connectomics.stages.decode.watershed.step import Watershed as WatershedStep
from connectomics.stages.output.export import FORMATS, export_path, read_stamp
from connectomics.stages.output.finish import FinalOutput
from connectomics.volumes.listing import stem_of
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Nanometres, VolumeInfo, VolumeReader

OBJECTS = "objects"
SUFFIX = "_instances"
RUN = ".run"
HOLES = {"off": None, "2d": 4, "3d": 6}
LABELLING = (ConnectedComponents, Watershed)


@dataclass(frozen=True, slots=True)
class DecodingInput:
    """A volume to be decoded.

    Parameters
    ----------
    uri
        Labels, ids or probabilities.
    probabilities
        URI of the model's probabilities of all labels, for the table, or None.
    certain
        Their stored value of probability 1; None for the type's own.
    """

    uri: str
    probabilities: str | None = None
    certain: float | None = None

    @property
    def stem(self) -> str:
        """Of its results."""
        return stem_of(self.uri) + SUFFIX


def check_decoding(config: Config) -> None:
    """Refuse a configuration that cannot decode anything, before any work.

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
    if not _formats(config):
        raise ConfigError("inference.output.formats is [png], which cannot hold ids; add h5, zarr or tiff")
    if config.inference.output.table == "parquet":
        require_parquet()


def decoding_input(word: str) -> DecodingInput:
    """What a volume, or the RUN folder of an earlier run, means.

    Raises
    ------
    VolumeError
        If a RUN folder has no labels beside it.
    """
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


def _formats(config: Config) -> tuple[str, ...]:
    return tuple(form for form in config.inference.output.formats if form != "png")


def output_of(config: Config, source: DecodingInput, volume: VolumeReader) -> FinalOutput:
    """The final volume with its result key."""
    facts: dict[str, object] = {
        "decoding": [dataclasses.asdict(step) for step in config.decoding],
        "input": _identity(source.uri, volume),
        "probabilities": None if source.probabilities is None else _known(source.probabilities),
        "axes": config.inference.axes,
        "voxel_size_nm": list(volume.info.voxel_size_nm or ()),
    }
    for step in config.decoding:
        if isinstance(step, LABELLING) and step.probabilities is not None:
            facts["probabilities"] = _known(step.probabilities)
    return FinalOutput(OBJECTS, source.stem, key_of(facts), _formats(config), pyramid=config.inference.output.pyramid)


def _known(uri: str) -> dict[str, object]:
    reader = open_volume(uri)
    try:
        return _identity(uri, reader)
    finally:
        reader.close()


def _identity(uri: str, reader: VolumeReader) -> dict[str, object]:
    """The result key of what a run made, which another run may make again; of other volumes what the file says."""
    path = Path(uri)
    for form in FORMATS:
        if path.name.endswith(export_path(Path(), "", form).name):
            key = (read_stamp(path, form) or {}).get("result_key")
            if key is not None:
                return {"result_key": key}
    return reader.identity


def table_of(config: Config, source: DecodingInput) -> Path | None:
    """Final name of the table of objects, or None where none is wanted."""
    kind = config.inference.output.table
    return None if kind == "none" else Path(config.inference.data.output_path) / f"{source.stem}.{kind}"


def open_decoding_input(config: Config, source: DecodingInput) -> VolumeReader:
    """Open a volume and hold it against the first step.

    Raises
    ------
    VolumeError
        If it cannot be read, or the first step cannot work on it.
    """
    stated = config.inference.voxel_size_nm
    size: Nanometres | None = None if stated is None else (stated[0], stated[1], stated[2])
    reader = open_volume(source.uri, axes=config.inference.axes, voxel_size_nm=size)
    problem = _problem(config.decoding[0], reader.info)
    if problem:
        reader.close()
        raise VolumeError(f"{source.uri}: {problem}")
    return reader


def _problem(first: DecodingStep, info: VolumeInfo) -> str:
    components = isinstance(first, LABELLING)
    threshold = first.threshold if isinstance(first, LABELLING) else None
    channel = first.channel if isinstance(first, LABELLING) else 0
    if info.dtype.kind == "f" and threshold is None:
        return (
            f"holds {info.dtype}, not labels; state which probabilities are foreground: decoding=[{{name: "
            "connected_components, threshold: 0.5}]"
        )
    if channel >= info.channels:
        return f"has {info.channels} channels, so decoding[0].channel must be below that, not {channel}"
    if info.channels > 1 and (threshold is None or not components):
        return f"has {info.channels} channels, labels have one; state a threshold and the channel of probabilities"
    return ""


def run_folder_of(config: Config, source: DecodingInput) -> Path:
    """RUN: the folder of a decoding's log, ledgers and report."""
    return Path(config.inference.data.output_path) / f"{source.stem}{RUN}"


def decode_job(config: Config, source: DecodingInput, volume: VolumeReader, likely: VolumeReader | None) -> DecodeJob:
    """All that decoding one volume needs.

    Parameters
    ----------
    config
        The configuration.
    source
        The volume.
    volume, likely
        It and its probabilities, opened.

    Raises
    ------
    ResourceError
        If the memory budget cannot hold the smallest blocks.
    VolumeError
        If a filter by physical volume meets a volume without voxel size, or the probabilities have another shape.
    """
    output = output_of(config, source, volume)
    check_watershed(config, source.uri, volume.info, known=stated_probabilities(config, source) is not None)
    budget = memory_budget_bytes(config.system.memory_budget_gb)
    free = decoding_bytes(volume.info, budget, psutil.Process().memory_info().rss)
    plan = watershed_plan(config.decoding, volume.info, Memory(budget, free), decode_plan(volume.info, free))
    if config.inference.block_shape is not None:
        z, y, x = config.inference.block_shape
        plan = dataclasses.replace(plan, block_shape=(z, y, x), chunk_shape=(z, y, x))
    provenance = {
        "program": program_version(),
        "experiment_name": config.experiment_name,
        "description": config.description,
        "input": _identity(source.uri, volume),
        "decoding": [dataclasses.asdict(step) for step in config.decoding],
    }
    probabilities, units = None, None
    if likely is not None:
        if likely.info.extent != volume.info.extent:
            raise VolumeError(
                f"{source.uri}: has extent (z, y, x) {volume.info.extent}, its probabilities {likely.info.extent}; "
                "name those of this volume"
            )
        probabilities = steps.ClassProbabilities(likely, steps.Values(volume))
        units = steps.probability_units(likely.info, source.certain)
    return DecodeJob(
        run_folder_of(config, source),
        volume,
        _steps(config.decoding, volume.info),
        output,
        table=table_of(config, source),
        plan=plan,
        program=program_version(),
        provenance=provenance,
        command=_command(config, source),
        probabilities=probabilities,
        probability_units=units,
    )


def stated_probabilities(config: Config, source: DecodingInput) -> str | None:
    """The volume of probabilities that a step names, else what the source brings."""
    named = [s.probabilities for s in config.decoding if isinstance(s, LABELLING) and s.probabilities]
    return named[0] if named else source.probabilities


def _command(config: Config, source: DecodingInput) -> tuple[str, ...]:
    """Words of the command that makes this result again, but for where it goes."""
    stated = {
        "decoding": [dataclasses.asdict(step) for step in config.decoding],
        "inference.axes": config.inference.axes,
        "inference.voxel_size_nm": config.inference.voxel_size_nm,
        "inference.output.formats": list(_formats(config)),
        "inference.output.table": config.inference.output.table,
    }
    return ("decode", source.uri, *(f"{key}={written(value)}" for key, value in stated.items() if value is not None))


def _steps(stated: list[DecodingStep], info: VolumeInfo) -> tuple[Step, ...]:
    """Steps with plain values; a selection right behind what finds objects is made with it, which spares a pass."""
    made: list[Step] = []
    for step in stated:
        if isinstance(step, ConnectedComponents):
            made.append(steps.ConnectedComponents(step.connectivity, step.threshold, step.channel, step.per_class))
            continue
        if isinstance(step, SliceLinking):
            rule = Linking(step.measure, step.threshold, step.max_gap, step.one_to_one)
            made.append(linking.SliceLinking(rule, step.ids))
            continue
        if isinstance(step, Watershed):
            made.append(watershed_of(step))
            continue
        filters = steps.Filters(_selection(step, info), HOLES[step.fill_holes])
        finders = (steps.ConnectedComponents, linking.SliceLinking, WatershedStep)
        if made and isinstance(made[-1], finders) and not made[-1].selection.active:
            made[-1] = dataclasses.replace(made[-1], selection=filters.selection)
            filters = steps.Filters(fill_holes=filters.fill_holes)
            if filters.fill_holes is None:
                continue
        made.append(filters)
    return tuple(made)


def _selection(step: Filters, info: VolumeInfo) -> Selection:
    minimum, maximum = step.min_voxels, step.max_voxels
    if step.min_volume_nm3 is not None or step.max_volume_nm3 is not None:
        if info.voxel_size_nm is None:
            raise VolumeError(
                "filters by volume in nm³ need the voxel size, which the volume does not state; set "
                "inference.voxel_size_nm=[z,y,x]"
            )
        voxel = math.prod(info.voxel_size_nm)
        minimum = max(minimum, math.ceil(round((step.min_volume_nm3 or 0) / voxel, 9)))
        if step.max_volume_nm3 is not None:
            largest = math.floor(round(step.max_volume_nm3 / voxel, 9))
            maximum = largest if maximum is None else min(maximum, largest)
    return Selection(minimum, maximum, step.drop_border, step.keep_largest)
