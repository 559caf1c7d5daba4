"""ModelSpec: what follows from its fields."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from connectomics.models.spec import ChannelNormalisation, ModelSpec, ResamplingRule

SPEC = ModelSpec(
    configuration="2d",
    dimensions=2,
    trainer_name="nnUNetTrainer",
    plans_name="nnUNetPlans",
    dataset_name="Dataset001",
    patch_shape=(1, 16, 16),
    channel_names=("a", "b"),
    label_names=(("background", 0), ("mito", 1), ("ignore", 2)),
    class_values=(0, 1),
    normalisations=(ChannelNormalisation("ZScoreNormalization"), ChannelNormalisation("NoNormalization")),
    mirror_axes=(1, 2),
    spacing=(None, 1.0, 1.0),
    resampling_data=ResamplingRule("resample_data_or_seg_to_shape", 3, 0, None),
    resampling_probabilities=ResamplingRule("resample_data_or_seg_to_shape", 1, 0, None),
    image_reader="NaturalImage2DIO",
    slice_case=True,
    folds=("0",),
    checkpoint_name="checkpoint_final.pth",
    files=(("checkpoint_final.pth", "ab"),),
    weights_sha256="ab",
    sha256="cd",
    parameters=3,
)


def test_channels_and_classes_are_counted() -> None:
    assert (SPEC.channels, SPEC.classes) == (2, 2)


@pytest.mark.parametrize(("foreground", "expected"), [(1, np.uint8), (254, np.uint8), (255, np.uint16)])
def test_labels_need_sixteen_bits_from_255_foreground_labels(foreground: int, expected: type) -> None:
    assert replace(SPEC, class_values=tuple(range(foreground + 1))).label_dtype == expected


def test_regions_count_the_labels_they_are_made_of() -> None:
    regions = (("whole", tuple(range(1, 255))), ("core", (0, 3, 4)))
    spec = replace(SPEC, class_values=(1, 2), regions=regions)
    assert (spec.classes, spec.label_dtype) == (2, np.uint8)
    more = (("whole", tuple(range(1, 256))), ("core", (3, 4)))
    assert replace(spec, regions=more).label_dtype == np.uint16


def test_classes_are_named_by_what_is_written_for_them() -> None:
    assert SPEC.class_labels == {"background": (0,), "mito": (1,)}
    assert SPEC.ignored_label == 2
    gaps = replace(SPEC, label_names=(("c", 7), ("background", 0), ("b", 3), ("also b", 3)), class_values=(0, 1, 2))
    assert gaps.class_labels == {"background": (0,), "b": (1,), "c": (2,)}
    assert gaps.ignored_label is None
    spec = replace(SPEC, class_values=(1, 2), regions=(("whole", (1, 2)), ("core", (2,))))
    assert spec.class_labels == {"background": (0,), "whole": (1, 2), "core": (2,)}


def test_a_spec_is_plain_json() -> None:
    values = json.loads(json.dumps(SPEC.as_dict()))
    assert values["patch_shape"] == [1, 16, 16]
    assert values["normalisations"][1]["scheme"] == "NoNormalization"
