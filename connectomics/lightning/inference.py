"""The two front doors: InferenceManager for one array in memory, VolumeProcessor for many volumes on disk."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from connectomics.assembly.engine.cascade import check_previous_stage
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import make_engine, under
from connectomics.assembly.engine.rules import check_isotropic
from connectomics.assembly.provenance import batch_note
from connectomics.assembly.settings import resolve
from connectomics.assembly.shared_sample import SharedSample
from connectomics.assembly.volumes import (
    fast_contract,
    final_paths,
    job_of,
    open_input,
    open_source,
    opened_source,
    outputs_of,
    roi_of,
    run_folder,
    segmenter_of,
    sources_of,
)
from connectomics.config.load import Given, Stated, as_config, load_config
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ConnectomicsError, VolumeError
from connectomics.core.files import make_folder
from connectomics.core.geometry import Box
from connectomics.execution.executors.overlapping import OverlappingExecutor
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.execution.task import RunReport
from connectomics.forecast.volumes import JobForecaster
from connectomics.inference.case import ReadBox
from connectomics.jobs.ahead import FoldersAhead
from connectomics.jobs.apart import labelled_apart
from connectomics.jobs.cascade import previous_labels
from connectomics.jobs.outcome import NullObserver, Observer, VolumeOutcome, attempted, outcomes_of
from connectomics.jobs.resume import ResumedEngines
from connectomics.lightning.array_input import image_of
from connectomics.runs.small_volume import is_in_hand, run_any_volume
from connectomics.stages.output.finish import check_names, settle, work_folder
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.volumes.in_memory import ArrayVolume
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.source import three_positive
from connectomics.volumes.volume import Array, Spacing, VolumeReader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Result for one array.

    Parameters
    ----------
    labels
        (z, y, x) or, for a 2D image, (y, x); uint8, or uint16 from 255 foreground labels on.
    probabilities
        float32 (k, z, y, x) or (k, y, x) when they were asked for, else None.
    """

    labels: Array
    probabilities: Array | None


class InferenceManager:
    """Labels arrays in memory exactly as nnU-Net would.

    Parameters
    ----------
    config
        The configuration, a YAML file, or a mapping such as ``{"system": {"device": "cpu"}}``;
        ``inference.output.save_probabilities`` asks for probabilities, and windows are run one at a time where no
        batch is stated.
    checkpoint
        A nnU-Net training folder or ``.pth`` file; replaces ``model.nnunet_checkpoint``.

    Raises
    ------
    ConfigError, ModelError, DeviceError
        If the configuration, the model or the device does not fit.
    """

    def __init__(self, config: Config | Given | None = None, checkpoint: str | os.PathLike[str] | None = None) -> None:
        stated = resolve(config, checkpoint)
        torch.manual_seed(stated.call.seed)
        networks = replace(stated.networks, batch=stated.networks.batch or 1)
        self.engine = make_engine(replace(stated, networks=networks))
        self._held = False  # whether a fast engine was held against exact already

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | os.PathLike[str], overrides: Stated = (), *, device: str | torch.device | None = None
    ) -> InferenceManager:
        """Load a model with nnU-Net's own settings, changed by words or values of the configuration.

        Parameters
        ----------
        checkpoint
            A nnU-Net training folder or ``.pth`` file.
        overrides
            ``["key=value", …]``, or a mapping by key; see ``load_config``.
        device
            Short for ``system.device``.
        """
        own = [overrides] if isinstance(overrides, str | Mapping) else overrides
        words = own if device is None else [*own, {"system.device": str(device)}]
        return cls(load_config(None, words), checkpoint)

    def segmenter(self, spacing: Spacing | None = None, previous: ReadBox | None = None) -> Segmenter:
        """The engine's segmenter for an image of this spacing; ``previous`` gives the labels of a previous stage."""
        return segmenter_of(self.engine, spacing, previous)

    def predict(self, image: Any, spacing: Sequence[float] | None = None, previous: Any = None) -> Prediction:
        """Label one image.

        Parameters
        ----------
        image
            Raw intensities, any real dtype: (c, z, y, x), (z, y, x) for one channel, or (y, x). An array of numpy, a
            tensor, a list; an array of dask, zarr or h5py, which is read piece by piece; a volume of ``open_volume``;
            a path, or a list of paths, one a channel.
        spacing
            Of the image (z, y, x) in the plan's unit, for ``inference.resample=plan`` without ``inference.spacing``;
            None: what a volume states.
        previous
            For the second stage of a cascade the labels of the first, (z, y, x) or (y, x); without them those of the
            model ``model.previous_stage``.

        Raises
        ------
        ConfigError
            If labels of a previous stage are needed and neither given nor made by a model.
        AgreementError
            If the precision is fast and changes too many labels of the first image, which is labelled both ways.
        VolumeError
            If the shape, dtype or number of channels does not fit the model, a value is not finite, or
            ``inference.roi`` or ``inference.mask`` does not fit the image.
        """
        with contextlib.ExitStack() as opened:
            given = opened.enter_context(contextlib.closing(image_of(image, opening=self._opened)))
            if previous is not None:
                labels = image_of(previous, "the labels of the previous stage")
                previous = opened.enter_context(contextlib.closing(labels)).volume
            result = self._predict(given.volume, spacing, previous)
        if given.dimensions > 2:
            return result
        probabilities = result.probabilities
        return Prediction(result.labels[0], None if probabilities is None else probabilities[:, 0])

    def _opened(self, paths: Sequence[str | os.PathLike[str]]) -> VolumeReader:
        """Open an image that is named by paths as a run opens it: ``inference.axes`` and the model's channels count."""
        uris = tuple(os.fspath(path) for path in paths)
        return open_input(self.engine.inference.volumes, self.engine.spec, VolumeSource(uris[0], "", uris))

    def _predict(
        self, reader: VolumeReader, stated: Sequence[float] | None, previous: VolumeReader | None
    ) -> Prediction:
        volumes, spacing = self.engine.inference.volumes, _spacing(stated) or reader.info.spacing
        if reader.info.channels != self.engine.spec.channels:
            raise VolumeError(
                f"the image has {reader.info.channels} channels, the model expects {self.engine.spec.channels} "
                f"({', '.join(self.engine.spec.channel_names)})"
            )
        check_isotropic(volumes, volumes.voxel_size_nm or reader.info.voxel_size_nm or spacing, "the image")
        first = self._previous(reader, spacing, previous)
        segmenter, whole = self.segmenter(spacing, first), Box.of_shape(reader.info.extent)
        roi = roi_of(self.engine.inference, reader.info, "the image")
        with contextlib.closing(roi) if roi is not None else contextlib.nullcontext():
            surveyed = segmenter.survey(reader, "the image")
            if not self._held:
                exact = segmenter_of(self.engine, spacing, first, exact=True)
                contract = fast_contract(self.engine, exact, reader.info.extent)
                if contract is not None:
                    contract.require(
                        contract.measure(segmenter, reader.read, surveyed, whole, seed=0, name="the image"), "the image"
                    )
                self._held = True
            arrays, _ = segmenter.segment_roi(reader.read, surveyed, whole, roi)
        labels = self.engine.inference.labels.filters.apply(arrays[LABELS][0])
        return Prediction(labels, arrays.get(PROBABILITIES))

    def _previous(self, reader: VolumeReader, spacing: Spacing | None, given: VolumeReader | None) -> ReadBox | None:
        """Reads the labels of the previous stage, where the model has one."""
        if all(spec.previous_stage is None for spec in self.engine.specs):
            return None
        labels: VolumeReader
        if given is not None:
            labels = given
        elif self.engine.previous is not None:
            first = segmenter_of(self.engine.previous, spacing)
            surveyed = first.survey(reader, "the image")
            labels = ArrayVolume(first.segment(reader.read, surveyed, Box.of_shape(reader.info.extent))[LABELS])
        else:
            raise ConfigError(
                "the model is the second stage of a cascade; give the labels of the first (previous=…), or set "
                "model.previous_stage to its model"
            )
        if labels.info.shape != (1, *reader.info.extent):
            raise VolumeError(
                f"the labels of the previous stage have shape {labels.info.shape}, expected {reader.info.extent}; give "
                "those of this image"
            )
        return labels.read


def _spacing(stated: Sequence[float] | None) -> Spacing | None:
    found = None if stated is None else three_positive(stated)
    if stated is not None and found is None:
        raise VolumeError(f"spacing is {stated!r:.80}, expected three positive numbers (z, y, x) in the plan's unit")
    return found


class VolumeProcessor:
    """Labels many volumes: skips finished ones, goes on after a failed one, resumes unfinished ones.

    Parameters
    ----------
    config
        The configuration.
    engine
        The model and all that serves every volume.
    observer
        Hears of progress.
    """

    def __init__(self, config: Config | Given | None, engine: Engine, observer: Observer | None = None) -> None:
        config = as_config(config)
        stated = resolve(config, engine.models[0].checkpoint)
        torch.manual_seed(stated.call.seed)
        self._engine = under(engine, stated)
        self._stop_on_error = config.inference.volume_mode.stop_on_error
        self._observer = observer or NullObserver()
        self._resumed = ResumedEngines(self._engine)
        self._forecaster = JobForecaster()

    def run(
        self, sources: Sequence[VolumeSource | str | os.PathLike[str]], sample: SharedSample | None = None
    ) -> list[VolumeOutcome]:
        """Bring volumes to their final outputs.

        Parameters
        ----------
        sources
            The volumes, or their paths, of which the files of channels are grouped.
        sample
            Of fast against exact, where these are but some of the volumes that share it.

        Returns
        -------
        outcomes
            One per volume in the given order; with ``stop_on_error`` the list ends at the first failure. When the disk
            of the results refuses, volumes that are not finished are not begun any more.
        """
        sources = sources_of(sources, self._engine.spec.channels, self._engine.settings.folder)
        check_previous_stage(self._engine.inference.models.previous_stage, self._engine.specs, sources)
        sample = sample or SharedSample(sources)
        finished = {s.name: paths for s in sources if (paths := self._finished(s)) is not None}

        folders = [run_folder(self._engine.inference.outputs, source) for source in sources]

        def process(number: int) -> VolumeOutcome:
            source, folder = sources[number], folders[number]
            self._observer.began(source.name)
            ahead.make(folder)
            return attempted(source.name, folder, functools.partial(self._process, source, sample))

        names = [source.name for source in sources]
        with FoldersAhead([f for f, name in zip(folders, names, strict=True) if name not in finished]) as ahead:
            return outcomes_of(
                names,
                finished,
                process,
                self._observer,
                stop_on_error=self._stop_on_error,
                put_off=lambda number: is_in_hand(folders[number]),
            )

    def _finished(self, source: VolumeSource) -> tuple[Path, ...] | None:
        """Final paths of a volume that is done, or None; a volume that cannot be opened is not done."""
        settings = self._engine.settings
        try:
            if not all(path.exists() for path in final_paths(self._engine, source)):
                return None
            with contextlib.closing(open_source(self._engine, source)) as reader:
                outputs = outputs_of(self._engine, source, reader)
        except (ConnectomicsError, OSError):
            return None
        if any(o.missing(settings.folder) for o in outputs):
            return None
        folder = run_folder(self._engine.inference.outputs, source)
        paths = tuple(p for o in outputs for p in o.paths(settings.folder).values())
        settle(folder, work_folder(folder, outputs, settings.program), outputs, paths)
        return paths

    def _process(self, source: VolumeSource, sample: SharedSample) -> tuple[tuple[Path, ...], RunReport]:
        settings = self._engine.settings
        with contextlib.ExitStack() as opened:
            # what of it is wanted is refused before a first stage is run
            reader, roi = opened.enter_context(opened_source(self._engine, source))
            engine = self._resumed.engine(source, reader)
            for note in [*engine.identity.notes, *batch_note(engine)]:
                log.info("backend: %s", note)
            previous = opened.enter_context(previous_labels(engine, source, reader, on_block=self._observer.block))
            job = job_of(engine, source, reader, previous=previous, roi=roi)
            check_names(job.outputs, settings.folder)
            job = self._forecaster.with_forecast(engine, sample.shared_by(engine, job))
            apart = labelled_apart(engine, source)
            report = run_any_volume(job, engine.settings, OverlappingExecutor(), self._observer.block, apart=apart)
        return tuple(p for o in job.outputs for p in o.paths(settings.folder).values()), report


def check_output_folder(folder: Path) -> None:
    """Make the output folder, or say why it cannot be; ConfigError if it cannot be made or written to."""
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"inference.data.output_path={folder}: cannot be made ({error.strerror}); choose another folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"inference.data.output_path={folder}: may not be written to; mend the permission or choose another folder"
        )
