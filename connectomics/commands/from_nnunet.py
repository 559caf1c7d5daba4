"""``connectomics from-nnunet``: arguments of ``nnUNetv2_predict``, this program's inference, nnU-Net's file names."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.identity import case_note
from connectomics.assembly.engine.make_engine import build_engine, check_resampling, under
from connectomics.assembly.settings import resolve
from connectomics.assembly.shared_sample import SharedSample
from connectomics.config.inference_keys import InferenceConfig
from connectomics.config.load import load_config, with_values
from connectomics.config.schema import Config
from connectomics.config.validation import validate
from connectomics.core.errors import ConfigError, ModelError
from connectomics.core.geometry import AxisOrder
from connectomics.jobs.outcome import EXPECTED, NullObserver, Observer, VolumeOutcome, failed_outcome, outcomes_of
from connectomics.lightning.inference import VolumeProcessor
from connectomics.models.locate import training_folder
from connectomics.models.spec import ModelSpec
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.nnunet.folder import (
    IMAGES,
    TIFFS,
    FileKind,
    Spacing3,
    copy_descriptions,
    list_cases,
    require_single_image,
    stated_spacing,
    write_labels,
    write_spacing,
)
from connectomics.volumes.nnunet.nifti import NIFTI_READERS, NiftiGeometry, frame_of
from connectomics.volumes.opening import open_volume

log = logging.getLogger(__name__)
OWN_FOLDER = "connectomics"  # within the output folder: HDF5 results, logs, provenance
IMAGE_SPACING: Spacing3 = (999.0, 1.0, 1.0)  # what nnU-Net's reader of single images says
UNSTATED: Spacing3 = (1.0, 1.0, 1.0)  # what its TIFF reader assumes without a JSON file


@dataclass(frozen=True, slots=True)
class NnunetCall:
    """What was asked for, in nnU-Net's terms.

    Parameters
    ----------
    input_folder, output_folder
        Images ``CASE_0000.png``, ``CASE_0000.nii.gz``, … and where ``CASE.png`` or ``CASE.nii.gz`` goes.
    model
        Training folder.
    folds, checkpoint_name
        Which checkpoints are averaged.
    step_size
        Step between windows as a share of the patch, above 0 and at most 1.
    mirroring
        Whether to average over mirrored passes.
    save_probabilities
        Whether to keep probabilities too, as HDF5.
    keep_finished
        Whether a case whose file is there is left alone, whatever made it.
    num_parts, part_id
        This call predicts every ``num_parts``-th case, from number ``part_id`` on.
    device
        cpu, cuda or mps.
    previous_folder
        For the second stage of a cascade the labels of the first, under the names of ``output_folder``.
    """

    input_folder: Path
    output_folder: Path
    model: Path
    folds: Sequence[str]
    checkpoint_name: str
    step_size: float
    mirroring: bool
    save_probabilities: bool
    keep_finished: bool
    num_parts: int
    part_id: int
    device: str
    previous_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.previous_folder is not None and not self.previous_folder.is_dir():
            raise ConfigError(f"-prev_stage_predictions {self.previous_folder}: is no folder; give that of the labels")
        if not 0 < self.step_size <= 1:
            raise ConfigError(f"-step_size is {self.step_size:g}, expected a number above 0 and at most 1")
        if not 0 <= self.part_id < self.num_parts:
            raise ConfigError(
                f"-part_id is {self.part_id} and -num_parts {self.num_parts}, expected a part from 0 to num_parts - 1"
            )


class FolderPrediction:
    """Labels the cases of a folder.

    The overrides are ``key=value`` words of this program's configuration; what the call says wins over them.

    Raises
    ------
    ConfigError, ModelError, DeviceError
        If the call, the model or the device does not fit, or the dataset's files are of a kind that is not read.
    """

    def __init__(self, call: NnunetCall, overrides: Sequence[str] = ()) -> None:
        self._call = call = dataclasses.replace(call, model=training_folder(call.model))
        self._kind = kind_of(call.model)
        self._sources = list_cases(call.input_folder, self._kind)[call.part_id :: call.num_parts]
        self._config = _configured(call, self._kind, overrides)
        self._engine = build_engine(self._config, call.model)
        if self._engine.spec.previous_stage is not None and call.previous_folder is None:
            raise ConfigError(
                f"the model is the second stage of a cascade; give -prev_stage_predictions, the folder of what "
                f"{self._engine.spec.previous_stage} predicted"
            )

    @property
    def deviations(self) -> tuple[str, ...]:
        """The ways in which this is not nnU-Net's default inference."""
        return self._engine.identity.deviations

    @property
    def case_note(self) -> str:
        """What a case is, in one line."""
        if self._config.inference.case == "volume" and self._kind.reader != IMAGES:
            return "case: each file (as nnU-Net takes it)"
        return case_note(self._engine)

    @property
    def own_folder(self) -> Path:
        """Where this program's own results, logs and provenance are."""
        return self._engine.settings.folder

    def run(self, observer: Observer | None = None) -> list[VolumeOutcome]:
        """Predict; one outcome a case, in the order of their names.

        Raises
        ------
        OutputError
            If the output folder refuses its first files.
        """
        copy_descriptions(self._call.model, self._call.output_folder)
        observer = observer or NullObserver()
        kept = {s.name: paths for s in self._sources if (paths := self._kept(s))}
        sample = SharedSample(self._sources, self._engine_of)
        names = [source.name for source in self._sources]
        return outcomes_of(names, kept, lambda i: self._predict(self._sources[i], observer, sample), observer)

    def _label_file(self, source: VolumeSource) -> Path:
        return self._call.output_folder / (source.stem + self._kind.ending)

    def _kept(self, source: VolumeSource) -> tuple[Path, ...]:
        """The results of a case that is left alone; empty where it is predicted."""
        paths = [self._label_file(source)]
        if self._call.save_probabilities:
            paths.append(self.own_folder / f"{source.stem}_labels_probabilities.h5")
        return tuple(paths) if self._call.keep_finished and all(path.is_file() for path in paths) else ()

    def _predict(self, source: VolumeSource, observer: Observer, sample: SharedSample) -> VolumeOutcome:
        try:
            if not source.problem and self._kind.reader == IMAGES:
                require_single_image(source)
            frame = _frame(source, self._kind)
            spacing = _stated_spacing(source, self._kind, frame)
            config = self._config_at(spacing)
            (outcome,) = VolumeProcessor(config, self._engine, _BlockProgress(observer)).run([source], sample)
            if outcome.state == "failed":
                return outcome
            return dataclasses.replace(
                outcome, state="done", paths=self._deliver(source, outcome.paths, spacing, frame)
            )
        except EXPECTED as error:
            return failed_outcome(source.name, error, 0.0)

    def _deliver(
        self, source: VolumeSource, own: tuple[Path, ...], spacing: Spacing3, frame: NiftiGeometry | None
    ) -> tuple[Path, ...]:
        """Write a finished case under nnU-Net's name; this program's own probabilities follow in the list."""
        target = self._label_file(source)
        with contextlib.closing(open_volume(str(own[0]))) as labels:
            write_labels(labels, target, self._kind, frame)
        if self._kind.reader == TIFFS:
            write_spacing(self._call.output_folder / f"{source.stem}.json", spacing)
        return (target, *own[1:])

    def _engine_of(self, source: VolumeSource, engine: Engine) -> Engine:
        config = self._config_at(spacing_of(source, self._kind))
        return under(engine, resolve(config, self._call.model))

    def _config_at(self, spacing: Spacing3) -> Config:
        """The configuration for a case of this spacing: resampled where it differs from the plan's, as nnU-Net does."""
        spec, members = self._engine.spec, self._engine.segmenter.members
        if members[0].by_slice:
            return self._config
        inference = resampled_at(self._config.inference, spec, spacing, [member.order for member in members])
        if inference is self._config.inference:
            return self._config
        check_resampling(spec, resample=True, by_slice=False)
        return dataclasses.replace(self._config, inference=inference)


def resampled_at(
    inference: InferenceConfig, spec: ModelSpec, spacing: Spacing3, orders: Sequence[AxisOrder]
) -> InferenceConfig:
    """The settings for a volume of this spacing (z, y, x): resampled where it is not the plan's, as by nnU-Net.

    ``orders`` turn the volume to what the network sees, along each plane.
    """
    turned = [order.turn(spacing) for order in orders]
    if all(p is None or p == s for own in turned for p, s in zip(spec.spacing, own, strict=True)):
        return inference
    return dataclasses.replace(inference, resample="plan", spacing=list(spacing), allow_large_resampling=True)


def _frame(source: VolumeSource, kind: FileKind) -> NiftiGeometry | None:
    if kind.reader not in NIFTI_READERS:
        return None
    return frame_of(Path(source.uris[0].removesuffix(kind.inner)), kind.reader)


def spacing_of(source: VolumeSource, kind: FileKind) -> Spacing3:
    """The spacing (z, y, x) that nnU-Net's reader states for a case.

    Raises
    ------
    VolumeError
        If its header or JSON file cannot be read.
    """
    return _stated_spacing(source, kind, _frame(source, kind))


def _stated_spacing(source: VolumeSource, kind: FileKind, frame: NiftiGeometry | None) -> Spacing3:
    if frame is not None:
        return frame.spacing
    if kind.reader == IMAGES:
        return IMAGE_SPACING
    stated = stated_spacing(source, kind.ending)
    if stated is None:
        log.warning("%s: no %s.json states the spacing; nnU-Net takes it for (1, 1, 1)", source.name, source.stem)
    return stated or UNSTATED


class _BlockProgress:
    """Passes on what happens within a volume; the list of volumes and their ends are told by ``FolderPrediction``."""

    def __init__(self, observer: Observer) -> None:
        self.began = observer.began
        self.block = observer.block

    def listed(self, total: int, finished: int) -> None:
        """Told already."""

    def ended(self, outcome: VolumeOutcome) -> None:
        """Told when nnU-Net's file is written."""


def _configured(call: NnunetCall, kind: FileKind, overrides: Sequence[str]) -> Config:
    stated = load_config(None, overrides)
    first, case = call.previous_folder, stated.inference.case
    config: Config = with_values(
        stated,
        {
            "system.device": call.device,
            "model.folds": list(call.folds),
            "model.checkpoint_name": call.checkpoint_name,
            "model.previous_stage": None if first is None else f"{first}/*{kind.ending}{kind.inner}",
            "inference.axes": kind.axes,
            "inference.case": case if case != "auto" or kind.reader == IMAGES else "volume",
            "inference.resample": "off",
            "inference.spacing": None,
            "inference.data.output_path": str(call.output_folder / OWN_FOLDER),
            "inference.volume_mode.output_suffix": "labels",
            "inference.sliding_window.overlap": 1.0 - call.step_size,
            # as nnU-Net, whose labels are asked for
            "inference.sliding_window.sw_batch_size": stated.inference.sliding_window.sw_batch_size or 1,
            "inference.test_time_augmentation.enabled": call.mirroring,
            "inference.output.formats": ["h5"],
            "inference.output.save_probabilities": call.save_probabilities,
            "inference.output.overwrite": True,
        },
    )
    validate(config)
    return config


def kind_of(model: Path) -> FileKind:
    """What the files of a training folder's dataset are.

    Raises
    ------
    ModelError, ConfigError
        If the folder does not say so, or they are of a kind that is not read.
    """
    if not model.is_dir():
        raise ModelError(
            f"{model}: there is no such folder; check -m, or -d, -c, -p, -tr and the variable nnUNet_results"
        )
    return FileKind(
        _stated(model / "plans.json", "image_reader_writer"), _stated(model / "dataset.json", "file_ending")
    )


def _stated(path: Path, key: str) -> str:
    try:
        value = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path}: does not state {key} ({type(error).__name__}); give a whole nnU-Net training folder"
        ) from error
    if not isinstance(value, str):
        raise ModelError(f"{path}: {key} is {str(value)[:80]!r}, expected text; give the file nnU-Net wrote")
    return value
