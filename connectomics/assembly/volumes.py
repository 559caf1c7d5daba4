"""The volumes: which there are, how each is opened, what its results are called and how it is cut."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from connectomics.assembly.engine.cascade import checked_labels, open_previous
from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.make_engine import under
from connectomics.assembly.engine.rules import check_isotropic
from connectomics.assembly.memory import decoding_bytes, plan_within_device
from connectomics.assembly.provenance import choices_of, mask_placement, provenance_of, resampling_facts, roi_facts
from connectomics.assembly.reproduction import command_of
from connectomics.assembly.settings import InferenceSettings, OutputSettings, VolumeSettings
from connectomics.config.inference_keys import VolumeModeConfig
from connectomics.config.load import Given, as_config
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Box, Vec3
from connectomics.core.places import refusal
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.inference.case import ReadBox
from connectomics.inference.resample import Resampling, check_ratio
from connectomics.models.backends.cached import sampled
from connectomics.models.spec import NO_RESAMPLING, ModelSpec
from connectomics.runs.job import JobLimits, JobRecord, Labeller, VolumeJob
from connectomics.stages.output.export import export_path, formats_holding
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.precision_check import FastContract, piece_shape
from connectomics.stages.predict.segmenter import EnsembleMember, Segmenter
from connectomics.stages.survey.region import RegionOfInterest, require_inside
from connectomics.volumes.listing import VolumeSource, expand, group, other_channels, refuse_collisions, without_results
from connectomics.volumes.opening import open_channels, open_volume
from connectomics.volumes.volume import Spacing, VolumeInfo, VolumeReader
from connectomics.volumes.watched import changed_input

PREVIOUS = "previous_stage"  # folder in RUN where the labels of a cascade's first stage are kept


def list_sources(config: Config | Given | None, channels: int) -> list[VolumeSource]:
    """All volumes of ``inference.volume_mode``, before this process's share is taken.

    Raises
    ------
    ConfigError
        If none is stated, none matches, or two would write the same names.
    """
    stated = as_config(config).inference
    return named_sources(stated_volumes(stated.volume_mode), channels, Path(stated.data.output_path))


def stated_volumes(mode: VolumeModeConfig) -> list[str]:
    """The paths of ``inference.volume_mode``, patterns expanded; known before a model is loaded.

    Raises
    ------
    ConfigError
        If none is stated, or none matches.
    """
    if not mode.enabled:
        raise ConfigError("inference.volume_mode.enabled is false; set it to true to label volumes")
    if mode.file_list is not None and mode.file_pattern is not None:
        raise ConfigError("inference.volume_mode has both file_list and file_pattern; state one of them")
    if mode.file_list is None and mode.file_pattern is None:
        raise ConfigError(
            "no volumes are named; write connectomics infer-volume MODEL VOLUME… -o OUT, or set "
            "inference.volume_mode.file_pattern='data/*.h5'"
        )
    uris = mode.file_list if mode.file_list is not None else expand(mode.file_pattern or "")
    return without_results(uris, mode.output_suffix)


def named_sources(uris: list[str], channels: int, folder: Path | None = None) -> list[VolumeSource]:
    """Volumes of stated paths, collisions refused, also those that only the file system of the output folder makes."""
    sources = group(uris, channels)
    refuse_collisions(sources, folder)
    return sources


def sources_of(
    given: Sequence[VolumeSource | str | os.PathLike[str]], channels: int, folder: Path
) -> list[VolumeSource]:
    """Volumes that were listed by ``list_sources``, or of paths, whose results go into a folder.

    Raises
    ------
    ConfigError
        If something else is given, or two would write the same names.
    """
    parts = [given] if isinstance(given, str | os.PathLike | VolumeSource) else list(given)
    if all(isinstance(part, VolumeSource) for part in parts):
        return [part for part in parts if isinstance(part, VolumeSource)]
    if not all(isinstance(part, str | os.PathLike) for part in parts):
        raise ConfigError(f"the volumes are {parts!r:.80}, expected what list_sources gives, or paths")
    uris = [os.fspath(part) for part in parts if isinstance(part, str | os.PathLike)]
    for uri in uris:
        if why := refusal(uri):
            raise ConfigError(f"{uri}: {why}")
    return named_sources(uris, channels, folder)


def share_of(mode: VolumeModeConfig, sources: list[VolumeSource]) -> list[VolumeSource]:
    """This process's share: every ``step``-th volume from ``start_index`` on."""
    return sources[mode.start_index :: mode.step]


def open_source(engine: Engine, source: VolumeSource) -> VolumeReader:
    """Open a volume and hold it against the engine's model; see ``open_input``."""
    return open_input(engine.inference.volumes, engine.spec, source)


def open_input(stated: VolumeSettings, spec: ModelSpec, source: VolumeSource) -> VolumeReader:
    """Open a volume and hold it against a model.

    Raises
    ------
    VolumeError
        If it cannot be read, lacks the file of a channel, has another number of channels, or voxels that do not fit
        ``inference.planes``.
    """
    axes, voxel_size = stated.axes, stated.voxel_size_nm
    if source.problem:
        raise VolumeError(source.problem)
    if len(source.uris) == 1:
        reader = open_volume(source.uris[0], axes=axes, voxel_size_nm=voxel_size, channels=spec.channels)
    else:
        reader = open_channels(source.uris, axes=axes, voxel_size_nm=voxel_size)
    others = other_channels(source.uris[0], spec.channels) if reader.info.channels == 1 < spec.channels else ()
    if others and len(source.uris) == 1:  # the first file stands for all, which lie beside it
        reader.close()
        reader = open_channels(others, axes=axes, voxel_size_nm=voxel_size)
    try:
        if reader.info.channels != spec.channels:
            raise VolumeError(
                f"{source.name}: has {reader.info.channels} channels, the model expects {spec.channels} "
                f"({', '.join(spec.channel_names)}); {_channels_remedy(source, reader.info.channels, spec.channels)}"
            )
        check_isotropic(stated, reader.info.voxel_size_nm or reader.info.spacing, source.name)
    except VolumeError:
        reader.close()
        raise
    return reader


def _channels_remedy(source: VolumeSource, found: int, expected: int) -> str:
    """What to do about a volume of ``found`` channels, where the model has ``expected``."""
    axes = "or, if the file's axes are others, state them, such as inference.axes=czyx"
    if found > expected:
        return f"keep {'one' if expected == 1 else expected} of them in a volume of their own, {axes}"
    path, _, inner = source.uris[0].partition("::")
    numbered = f"{source.stem}_0000" in path
    if found > 1 or inner or path.startswith("phantom:") or Path(path).is_dir():
        return f"write all {expected} into one volume, as an axis c, {axes}"
    ending = Path(path).name.removeprefix(f"{source.stem}_0000" if numbered else source.stem)
    names = [f"{source.stem}_{number:04d}{ending}" for number in range(expected)]
    if numbered:
        return f"add the files of the other channels, {', '.join(names[1:])}, {axes}"
    return (
        f"give each channel as a file of its own, {', '.join(names)}, of which this one may be one, and name the "
        f"volume as {source.stem}_*{ending}, {axes}"
    )


@contextlib.contextmanager
def opened_source(engine: Engine, source: VolumeSource) -> Iterator[tuple[VolumeReader, RegionOfInterest | None]]:
    """A volume and what of it is wanted (see ``roi_of``), open while the context is."""
    with contextlib.closing(open_source(engine, source)) as reader:
        roi = roi_of(engine.inference, reader.info, source.name)
        with contextlib.nullcontext() if roi is None else contextlib.closing(roi):
            yield reader, roi


def run_folder(outputs: OutputSettings, source: VolumeSource) -> Path:
    """RUN: the folder of a volume's log, ledger and report."""
    return outputs.folder / f"{_stem(outputs, source)}.run"


def _stem(outputs: OutputSettings, source: VolumeSource) -> str:
    return f"{source.stem}_{outputs.suffix}"


def final_names(engine: Engine, source: VolumeSource) -> dict[str, tuple[str, tuple[str, ...]]]:
    """File name without suffix, and formats, of each of a volume's results."""
    formats = engine.inference.outputs.formats
    stem = _stem(engine.inference.outputs, source)
    names = {LABELS: (stem, formats)}
    rule = engine.segmenter.probabilities
    if rule is not None:
        names[PROBABILITIES] = (f"{stem}_probabilities", formats_holding(formats, len(rule.channels), rule.dtype))
    return names


def final_paths(engine: Engine, source: VolumeSource) -> list[Path]:
    """Where a volume's results will stand, without opening it."""
    names = final_names(engine, source).values()
    return [export_path(engine.settings.folder, stem, f) for stem, formats in names for f in formats]


def outputs_of(engine: Engine, source: VolumeSource, reader: VolumeReader) -> tuple[FinalOutput, ...]:
    """The final results of a volume with their result keys."""
    names = final_names(engine, source)
    resampling = resampling_facts(segmenter_of(engine, reader.info.spacing))
    facts = dict(engine.identity.facts) | {"input": reader.identity, "resample": resampling}
    facts |= _previous_facts(engine, source, reader) | roi_facts(engine.inference, reader.info)
    wanted = {"pyramid": engine.inference.outputs.pyramid, "overwrite": engine.inference.outputs.overwrite}
    outputs = [FinalOutput(LABELS, names[LABELS][0], key_of(facts), names[LABELS][1], **wanted)]
    rule = engine.segmenter.probabilities
    if rule is not None:
        key = key_of(facts | {PROBABILITIES: rule.facts})
        stem, formats = names[PROBABILITIES]
        outputs.append(FinalOutput(PROBABILITIES, stem, key, formats, **wanted))
    return tuple(outputs)


def first_stage_of(engine: Engine, source: VolumeSource) -> Engine:
    """The engine of the first stage of a cascade, whose labels of a volume are kept in its RUN folder."""
    previous = engine.previous
    assert previous is not None
    folder = run_folder(engine.inference.outputs, source) / PREVIOUS
    outputs = dataclasses.replace(previous.inference.outputs, folder=folder)
    return under(previous, dataclasses.replace(previous.inference, outputs=outputs))


def _previous_facts(engine: Engine, source: VolumeSource, reader: VolumeReader) -> dict[str, object]:
    """What decides the labels of the previous stage: its own result key, or the identity of the given volume."""
    if all(spec.previous_stage is None for spec in engine.specs):
        return {}
    if engine.previous is not None:
        labels, *_ = outputs_of(first_stage_of(engine, source), source, reader)
        return {"previous_stage": labels.result_key}
    given = open_previous(engine.inference.models.previous_stage, source, reader)
    given.close()
    return {"previous_stage": given.identity}


def segmenter_of(
    engine: Engine, own: Spacing | None, previous: ReadBox | None = None, *, exact: bool = False
) -> Segmenter:
    """The engine's segmenter for a volume of this spacing.

    Parameters
    ----------
    own
        Spacing (z, y, x) that the volume itself states, in the plan's unit; ``inference.spacing`` goes first.
    previous
        Gives the labels of the previous stage (1, z, y, x), for second stages of a cascade.
    exact
        Where the engine is fast, that in float32.

    Raises
    ------
    VolumeError
        If no spacing is known, or it is so far from the plan's that a mistaken unit is likely.
    ModelError
        If this program cannot resample as the plans want it.
    """
    segmenter = engine.segmenter if engine.reference is None or not exact else engine.reference.segmenter
    members = (
        dataclasses.replace(
            member,
            resampling=_resampling_of(engine.inference.volumes, model, member, own),
            previous=previous and checked_labels(previous, model.spec, "the labels of the previous stage"),
        )
        for member, model in zip(segmenter.members, engine.of_members, strict=True)
    )
    return dataclasses.replace(segmenter, members=tuple(members))


def _resampling_of(
    stated: VolumeSettings, model: EngineModel, member: EnsembleMember, own: Spacing | None
) -> Resampling | None:
    """How a volume is resampled for a model, or None when it is taken as it is, also as the plans resample nothing."""
    spec = model.spec
    if not stated.resample or spec.resampling_data.function == NO_RESAMPLING:
        return None
    spacing = own if stated.spacing is None else stated.spacing
    if spacing is None:
        raise VolumeError(
            "inference.resample=plan needs the spacing of the volume, which states none: set inference.spacing, "
            'or put NAME.json with {"spacing": [z, y, x]} beside it, in the unit of the plan\'s spacing, which is '
            f"{list(spec.spacing)}"
        )
    spacing = member.order.turn(spacing)
    target = (spacing[0] if spec.spacing[0] is None else spec.spacing[0], spec.spacing[1], spec.spacing[2])
    check_ratio(spacing, target, allowed=stated.allow_large_resampling)
    return Resampling(
        spacing, target, spec.resampling_data, spec.resampling_probabilities, labels=spec.resampling_labels
    )


def fast_contract(engine: Engine, exact: Segmenter, block: Vec3) -> FastContract | None:
    """What a fast run of one volume is held to, or None where the precision is exact.

    Parameters
    ----------
    exact
        The segmenter of this volume in float32.
    block
        Shape (z, y, x) in the volume's axes that memory was planned for; no piece of the sample is larger.
    """
    if engine.reference is None:
        return None
    member, (z, y, x) = exact.members[0], engine.models[0].window.patch
    size = (float(z), float(y), float(x))
    if member.resampling is not None:
        own, network = member.resampling.spacing, member.resampling.target
        size = (z * network[0] / own[0], y * network[1] / own[1], x * network[2] / own[2])
    return FastContract(
        exact,
        engine.inference.networks.max_disagreement,
        piece_shape(member.order.inverse.turn(size), block),
        sampled=functools.partial(sampled, engine.reference.cached_backends),
    )


def roi_of(stated: InferenceSettings, info: VolumeInfo, name: str) -> RegionOfInterest | None:
    """What ``inference.roi`` and ``inference.mask`` leave of a volume; None: they do not restrict it.

    Raises
    ------
    VolumeError
        If the box lies outside the volume, or the mask cannot be opened or belongs to another one.
    """
    region, mask, extent = stated.region, stated.region.mask, info.extent
    if region.box is None and mask is None:
        return None
    box = Box.of_shape(extent) if region.box is None else region.box
    require_inside(box, extent, name)
    if mask is None:
        return RegionOfInterest(extent, box)
    reader = open_volume(mask)
    try:
        told = f"inference.mask={mask}, for {name}"
        return RegionOfInterest(extent, box, reader, told, placement=mask_placement(stated, info, reader.info, told))
    except VolumeError:
        reader.close()
        raise


def _require_unchanged(engine: Engine, source: VolumeSource, outputs: tuple[FinalOutput, ...]) -> None:
    """Open all inputs again, and refuse to go on, by a VolumeError, if they are not those of these results."""
    with contextlib.closing(open_source(engine, source)) as reader:
        now = outputs_of(engine, source, reader)
    if [output.result_key for output in now] != [output.result_key for output in outputs]:
        raise VolumeError(changed_input(source.name))


def job_of(
    engine: Engine,
    source: VolumeSource,
    reader: VolumeReader,
    previous: VolumeReader | None = None,
    roi: RegionOfInterest | None = None,
) -> VolumeJob:
    """All that running one volume needs; ``previous`` are the labels of a cascade's previous stage.

    Raises
    ------
    ResourceError
        If the memory budget cannot hold one block's work, or the mask that the model normalises within.
    """
    outputs = outputs_of(engine, source, reader)
    given = None if previous is None else previous.read
    segmenter = segmenter_of(engine, reader.info.spacing, given)
    exact = segmenter_of(engine, reader.info.spacing, given, exact=True)
    working = (segmenter,) if engine.reference is None else (segmenter, exact)
    plan, readers = plan_within_device(engine, working, reader.info)
    contract = fast_contract(engine, exact, plan.block_shape)
    block_bytes = decoding_bytes(reader.info, engine.settings.budget_bytes, engine.memory.base_bytes)
    return VolumeJob(
        source.name,
        run_folder(engine.inference.outputs, source),
        reader,
        Labeller(segmenter, engine.inference.labels.filters, roi, contract),
        outputs=outputs,
        plan=plan,
        record=JobRecord(
            provenance_of(engine, reader, segmenter, previous),
            command_of(engine, source),
            told=choices_of(engine),
            require_unchanged=functools.partial(_require_unchanged, engine, source, outputs),
        ),
        limits=JobLimits(readers, block_bytes, on_device=engine.memory.device_bytes is not None),
    )
