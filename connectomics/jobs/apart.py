"""Blocks that may kill their process: what another process needs to do one of them, and what it does.

A job cannot be sent to it, since it holds networks and open files. So the resolved settings are, which are plain
values, and the job is made again there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from connectomics.assembly.decode_inputs import DecodingInput
from connectomics.assembly.decode_jobs import DecodingRequest, opened_job, settings_of
from connectomics.assembly.engine.backends import as_begun
from connectomics.assembly.engine.cascade import open_labels, open_previous
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import make_engine
from connectomics.assembly.settings import InferenceSettings
from connectomics.assembly.volumes import first_stage_of, job_of, opened_source, outputs_of
from connectomics.core.errors import DeviceError
from connectomics.core.geometry import Block
from connectomics.execution.executors.child_process import ChildProcess
from connectomics.execution.task import BlockFailure, BlockRecord
from connectomics.models.backends.device import give_back, select_device
from connectomics.runs.one_block import block_of_decoding, block_of_volume
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.volume import VolumeReader


def labelled_apart(engine: Engine, source: VolumeSource) -> ChildProcess:
    """Does blocks of a volume that an engine labels in child processes, in the engine's numeric class."""
    stated, numeric_class = engine.inference, dict(engine.settings.numeric_class)
    stated = dataclasses.replace(stated, networks=as_begun(stated.networks, numeric_class))
    return ChildProcess(
        functools.partial(labelled_block, stated, numeric_class, source),
        release=functools.partial(_give_back, stated.networks.device),
    )


def decoded_apart(request: DecodingRequest, source: DecodingInput) -> ChildProcess:
    """Does blocks of a volume that is decoded in child processes."""
    return ChildProcess(functools.partial(decoded_block, request, source))


def labelled_block(
    stated: InferenceSettings, numeric_class: Mapping[str, object], source: VolumeSource, folder: Path, block: Block
) -> BlockRecord | BlockFailure:
    """Do a block of the stage whose ledger lies in ``folder``, in a process that has nothing of the run yet.

    Raises
    ------
    ConnectomicsError
        If the job cannot be made again, or the stage is none of it.
    """
    engine = make_engine(stated)
    found = dict(engine.settings.numeric_class)
    if found != numeric_class:
        raise DeviceError(f"a process of its own computes with {found}, expected {numeric_class}; run again")
    with contextlib.ExitStack() as opened:
        reader, roi = opened.enter_context(opened_source(engine, source))
        previous = opened.enter_context(kept_previous(engine, source, reader))
        job = job_of(engine, source, reader, previous=previous, roi=roi)
        return block_of_volume(job, engine.settings, folder, block)


def decoded_block(
    request: DecodingRequest, source: DecodingInput, folder: Path, block: Block
) -> BlockRecord | BlockFailure:
    """As ``labelled_block``, of a volume that is decoded."""
    with opened_job(request, source) as job:
        return block_of_decoding(job, settings_of(request), folder, block)


@contextlib.contextmanager
def kept_previous(engine: Engine, source: VolumeSource, reader: VolumeReader) -> Iterator[VolumeReader | None]:
    """The labels of a volume's previous stage, which are there, open while the context is; None where it has none."""
    if all(spec.previous_stage is None for spec in engine.specs):
        yield None
        return
    if engine.previous is None:
        labels = open_previous(engine.inference.models.previous_stage, source, reader)
    else:
        first = first_stage_of(engine, source)
        output, *_ = outputs_of(first, source, reader)
        (path,) = output.paths(first.settings.folder).values()
        labels = open_labels(str(path), reader)
    with contextlib.closing(labels):
        yield labels


def _give_back(device: str) -> None:
    give_back(select_device(device))
