"""Cascades: where the labels of the previous stage come from, a model or a volume, and whether they fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from connectomics.assembly.engine.models import check_alike
from connectomics.assembly.settings import InferenceSettings, LabelSettings, ModelSettings, RegionSettings
from connectomics.config.validation import shown
from connectomics.core.errors import ConfigError, ModelError, VolumeError
from connectomics.core.geometry import Box
from connectomics.inference.case import ReadBox
from connectomics.models.converted import MANIFEST
from connectomics.models.spec import ModelSpec
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Array, VolumeReader

KEY = "model.previous_stage"
NAME = "*"  # stands for the volume's name in a path of label volumes


def first_stage_settings(second: InferenceSettings, specs: Sequence[ModelSpec]) -> InferenceSettings | None:
    """The settings that run the first stage of a second one; None where there is none or its labels are given.

    Raises
    ------
    ConfigError
        If a previous stage is stated that no model asks for, or that does not exist.
    """
    stated, models = second.models.previous_stage, second.models
    if stated is None:
        return None
    if all(spec.previous_stage is None for spec in specs):
        raise ConfigError(f"{KEY} is {shown(stated)}, but the model is no second stage of a cascade; leave it null")
    if not _names_model(Path(stated)):
        if NAME not in stated and ":" not in stated and not Path(stated).exists():
            raise ConfigError(
                f"{KEY} is {shown(stated)}, which does not exist; give the previous stage's model, or its labels of "
                f"the volume ({NAME} stands for the volume's name)"
            )
        return None
    request = dataclasses.replace(models.requests[0], path=Path(stated), plans=None, dataset=None, sha256=None)
    expected = {key: value for key, value in models.expected.items() if key != "data.do_2d"}
    return dataclasses.replace(
        second,
        models=ModelSettings((request,), (1.0,), expected),
        windows=dataclasses.replace(second.windows, shape=None),
        labels=LabelSettings(),
        region=RegionSettings(),  # windows of the second stage reach beyond what is wanted
        outputs=dataclasses.replace(second.outputs, formats=("zarr",), pyramid=True, overwrite=True),
    )


def _names_model(path: Path) -> bool:
    """Whether a path is that of a model rather than of a volume or a folder of predictions."""
    if path.suffix == ".pth" or any(p.suffix == ".zip" for p in (path, *path.parents)):
        return True
    return (path / MANIFEST).is_file() or path.name.startswith("fold_") or any(path.glob("fold_*"))


def check_first_stage(second: InferenceSettings, specs: Sequence[ModelSpec], first: ModelSpec) -> None:
    """Refuse a first stage that is not the one of these models.

    Raises
    ------
    ModelError
        If its configuration, channels or labels are others.
    ConfigError
        If both stages would be given the volume as it is, although they were trained at different spacings.
    """
    path = second.models.previous_stage
    if first.previous_stage is not None:
        raise ModelError(f"{path}: is itself the second stage of a cascade; give the first one as {KEY}")
    for spec in specs:
        if spec.previous_stage not in (None, first.configuration):
            raise ModelError(
                f"{path}: is configuration '{first.configuration}', but the plans name '{spec.previous_stage}' as the "
                f"previous stage; give that model as {KEY}, or the labels that another one made"
            )
        check_alike(spec, first, str(path), "the model", what_they_are="the stages of a cascade")
        if not second.volumes.resample and spec.previous_stage and spec.spacing != first.spacing:
            raise ConfigError(
                f"{path}: the previous stage was trained at spacing {first.spacing}, this model at {spec.spacing}; set "
                f"inference.resample=plan, or give the previous stage's labels of the volume as {KEY}"
            )


def check_previous_stage(stated: str | None, specs: Sequence[ModelSpec], sources: Sequence[VolumeSource]) -> None:
    """Refuse volumes that a second stage cannot be run on, before the first one is.

    Raises
    ------
    ConfigError
        If nothing is said of the previous stage, or one label volume is given for several volumes.
    """
    names = [spec.previous_stage for spec in specs if spec.previous_stage is not None]
    if names and stated is None:
        raise ConfigError(
            f"the model is the second stage of a cascade (previous_stage '{names[0]}'); set {KEY} to that model, or to "
            f"its labels of the volume ({NAME} stands for the volume's name)"
        )
    if stated is not None and len(sources) > 1 and NAME not in stated and not _names_model(Path(stated)):
        raise ConfigError(
            f"{KEY} is {shown(stated)}, one volume for {len(sources)}; write {NAME} where the volume's name stands, or "
            "give the previous stage's model"
        )


def open_previous(stated: str | None, source: VolumeSource, reader: VolumeReader) -> VolumeReader:
    """Open the label volume of the previous stage that is given for a volume, as ``open_labels`` does."""
    assert stated is not None, "checked with the list of volumes"
    return open_labels(stated.replace(NAME, source.stem), reader)


def open_labels(uri: str, reader: VolumeReader, what: str = "the previous stage's labels") -> VolumeReader:
    """Open the labels of a volume; VolumeError where they cannot be read or have another extent."""
    labels = open_volume(uri)
    if labels.info.extent != reader.info.extent or labels.info.channels != 1:
        labels.close()
        raise VolumeError(
            f"{uri}: has shape (c, z, y, x) {labels.info.shape}, expected {what} of extent {reader.info.extent}; "
            "give the labels of this volume"
        )
    return labels


def checked_labels(read: ReadBox, spec: ModelSpec, name: str) -> ReadBox:
    """Gives labels (1, z, y, x) as int32; VolumeError when a box holds anything but the model's labels."""
    known = np.array(sorted({0, *spec.foreground_labels, *spec.class_values}))

    def checked(box: Box) -> Array:
        labels = read(box)
        strange = ~np.isin(labels, known)
        if strange.any():
            index = tuple(np.argwhere(strange)[0])
            place = tuple(int(i + a) for i, a in zip(index[1:], box.start, strict=True))
            raise VolumeError(
                f"{name}: value {labels[index]} at voxel (z, y, x) {place} is no label of the model, which has "
                f"{shown(known.tolist())}; give the previous stage's labels"
            )
        result: Array = labels.astype(np.int32)
        return result

    return checked
