"""Turns plans.json and dataset.json into checked values: configuration, channels, labels, normalisation.

Called by ``checkpoint``. What this program cannot do yet is refused here by name.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

from connectomics.core.errors import ModelError
from connectomics.core.geometry import Vec3, vec3
from connectomics.models.plan_text import RESTORE, PlanText
from connectomics.models.spec import (
    DEFAULT_RESAMPLING,
    NO_RESAMPLING,
    SINGLE_IMAGES,
    TORCH_RESAMPLING,
    ChannelNormalisation,
    PlanSpacing,
    ResamplingRule,
)

NORMALISATIONS = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
_SEPARATE = {"is_seg": False, "force_separate_z": False, "separate_z_anisotropy_threshold": 3}
_RESAMPLING: dict[str, dict[str, Any]] = {  # nnU-Net's functions with the defaults of their arguments
    DEFAULT_RESAMPLING: _SEPARATE | {"order": 3, "order_z": 0},
    TORCH_RESAMPLING: _SEPARATE
    | {"force_separate_z": None, "mode": "linear", "aniso_axis_mode": "nearest-exact"}
    | {"num_threads": 4, "device": "cpu", "memefficient_seg_resampling": False},
    NO_RESAMPLING: {},
}
_MODES = {"nearest-exact": 0, "linear": 1}  # torch's names of spline orders
_LARGEST_PATCH = 4096
_LARGEST_PAINTED = 32767  # nnU-Net paints regions in int16


def resolve_configuration(plans: PlanText, name: str) -> PlanText:
    """The configuration ``name`` with what it inherits, in today's format of nnU-Net's plans.

    Raises ModelError if it does not exist, inherits in a circle, or its old format cannot be converted.
    """
    configurations = plans.get("configurations", dict, "the configurations")
    chain: list[dict[str, Any]] = []
    visited: list[str] = []
    parent: object = name
    while parent is not None:
        if not isinstance(parent, str) or not isinstance(configurations.get(parent), dict):
            raise ModelError(
                f"{plans.where}: there is no configuration '{parent}', found: "
                f"{', '.join(configurations) or 'none'}; give the plans file this checkpoint was trained with"
            )
        if parent in visited:
            raise ModelError(
                f"{plans.where}: configurations inherit in a circle ({' -> '.join([*visited, parent])}); {RESTORE}"
            )
        visited.append(parent)
        chain.append(configurations[parent])
        parent = chain[-1].get("inherits_from")
    merged: dict[str, Any] = {}
    for part in reversed(chain):
        merged.update(copy.deepcopy(part))
    where = f"{plans.where}, configuration '{name}'"
    return PlanText(merged if "architecture" in merged else _modernised(merged, where), where)


def _modernised(configuration: dict[str, Any], where: str) -> dict[str, Any]:
    """Plans written before nnunetv2 2.3 describe their network otherwise; nnunetv2 itself converts them."""
    if "UNet_class_name" not in configuration:
        raise ModelError(f"{where}: neither 'architecture' nor 'UNet_class_name' describes the network; {RESTORE}")
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted: dict[str, Any] = ConfigurationManager(configuration).configuration
    except (KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{where}: the old network description cannot be converted ({error}); {RESTORE}") from error
    return converted


def check_supported(plans: PlanText, configuration: PlanText) -> None:
    """Refuse, by a ModelError, the custom preprocessors and label managers that nnU-Net has and this program lacks."""
    reason: str | None = None
    preprocessor = configuration.values.get("preprocessor_name", "DefaultPreprocessor")
    manager = plans.values.get("label_manager", "LabelManager")
    if preprocessor != "DefaultPreprocessor":
        reason = f"it uses the preprocessor {preprocessor!r:.60}, expected DefaultPreprocessor"
    elif manager != "LabelManager":
        reason = f"it uses the label manager {manager!r:.60}, expected LabelManager"
    if reason is not None:
        raise ModelError(f"{configuration.where}: this model is not supported yet: {reason}; use nnU-Net itself for it")


def previous_stage(configuration: PlanText) -> str | None:
    """The configuration whose labels a second stage is given beside the image, or None; a ModelError if no name."""
    stated = configuration.values.get("previous_stage")
    if stated is not None and (not isinstance(stated, str) or not stated):
        raise ModelError(
            f"{configuration.where}: 'previous_stage' is {stated!r:.60}, expected a configuration's name; {RESTORE}"
        )
    return stated


def axis_order(plans: PlanText) -> Vec3:
    """``transpose_forward``: which axis of the volume each axis of the model is.

    Raises ModelError if it is no permutation of the axes, or ``transpose_backward`` does not undo it.
    """
    forward = plans.values.get("transpose_forward", [0, 1, 2])
    if not isinstance(forward, list) or any(type(a) is not int for a in forward) or sorted(forward) != [0, 1, 2]:
        raise ModelError(
            f"{plans.where}: 'transpose_forward' is {forward!r:.40}, expected 0, 1 and 2 in some order; {RESTORE}"
        )
    undone = [forward.index(axis) for axis in range(3)]
    backward = plans.values.get("transpose_backward", [0, 1, 2])
    if backward != undone:
        raise ModelError(
            f"{plans.where}: 'transpose_backward' is {backward!r:.40}, expected {undone}, which undoes "
            f"transpose_forward {forward}; {RESTORE}"
        )
    return vec3(forward)


def trained_on_sections(plans: PlanText, dimensions: int, order: Vec3) -> bool:
    """Whether training saw single sections: single images, or volumes whose median depth is one section.

    ``original_median_shape_after_transp`` begins with the axis across which a 2D model's sections lie. Where it is not
    stated, or sections lie across another axis than z, only the reader of single images tells.
    """
    if dimensions != 2 or plans.values.get("image_reader_writer") == SINGLE_IMAGES:
        return dimensions == 2
    shape = plans.values.get("original_median_shape_after_transp")
    depth = shape[0] if isinstance(shape, list) and len(shape) == 3 else None
    return isinstance(depth, (int, float)) and not isinstance(depth, bool) and depth == 1 and order[0] == 0


def channel_names(dataset: PlanText) -> tuple[str, ...]:
    """Names of the input channels in order; ``modality``, the key of older files, goes first as in nnU-Net.

    nnU-Net only counts them, so they may have any keys or none: a mapping whose keys are 0, 1, … is taken in the order
    of these numbers, any other mapping and a list in the order of the file. Raises ModelError if there is none.
    """
    key = "modality" if "modality" in dataset.values else "channel_names"
    names = dataset.get(key, (dict, list), "the input channels by number")
    if not names:
        raise ModelError(f"{dataset.where}: '{key}' is empty, expected the input channels by number; {RESTORE}")
    if isinstance(names, list):
        return tuple(map(str, names))
    numbered = [str(i) for i in range(len(names))]
    return tuple(str(names[k]) for k in (numbered if set(names) == set(numbered) else names))


@dataclass(frozen=True, slots=True)
class LabelTable:
    """What the output channels mean; the fields are those of ``ModelSpec``."""

    label_names: tuple[tuple[str, int], ...]
    class_values: tuple[int, ...]
    regions: tuple[tuple[str, tuple[int, ...]], ...]


def labels(dataset: PlanText) -> LabelTable:
    """What dataset.json says of labels or regions.

    As in nnU-Net, an output channel belongs to each distinct value but ``ignore``, and what is written where a channel
    wins is the channel's index. If a label has several values, all are regions: a channel belongs to each but the
    background, in the order of the file, and ``regions_class_order`` says what is painted for it.

    Raises
    ------
    ModelError
        If there is no background 0, a value is not a whole number, or the order does not fit the regions.
    """
    stated = {n: _values_of(dataset, n, v) for n, v in dataset.get("labels", dict, "label values by name").items()}
    if stated.get("background") != (0,):
        raise ModelError(f"{dataset.where}: the labels lack 'background' with value 0; {RESTORE}")
    values = sorted({value for name, several in stated.items() if name != "ignore" for value in several})
    ignored = stated.get("ignore", ())
    if ignored and ignored != (values[-1] + 1,):
        raise ModelError(
            f"{dataset.where}: label 'ignore' is {ignored[0]}, expected the highest value, {values[-1] + 1}; {RESTORE}"
        )
    if all(len(several) == 1 for several in stated.values()):
        return LabelTable(tuple((n, several[0]) for n, several in stated.items()), tuple(range(len(values))), ())
    regions = tuple((n, several) for n, several in stated.items() if n != "ignore" and set(several) != {0})
    order = _painting_order(dataset, len(regions), len(set(values) - {0}))
    names = [("background", 0), *((n, value) for (n, _), value in zip(regions, order, strict=True))]
    return LabelTable((*names, *(("ignore", value) for value in ignored)), order, regions)


def _values_of(dataset: PlanText, name: str, stated: object) -> tuple[int, ...]:
    """The values of a label or region; background and ignore have one, and it is not in a list."""
    several = stated if isinstance(stated, list) and stated and name not in ("background", "ignore") else [stated]
    values = [whole_number(value) for value in several]
    if any(value is None or value < 0 for value in values):
        raise ModelError(
            f"{dataset.where}: label '{name}' is {stated!r:.40}, expected a whole number, or a list of them for a "
            f"region; {RESTORE}"
        )
    return tuple(value for value in values if value is not None)


def whole_number(stated: object) -> int | None:
    """What nnU-Net's ``int()`` makes of a label value, which may be text or 1.0; None where it is no whole number."""
    if isinstance(stated, str) and stated.strip().isdecimal():
        return int(stated)
    if isinstance(stated, float) and stated.is_integer():
        return int(stated)
    return stated if isinstance(stated, int) and not isinstance(stated, bool) else None


def _painting_order(dataset: PlanText, regions: int, labels_: int) -> tuple[int, ...]:
    """``regions_class_order``: the label painted for each region, which nnU-Net keeps in the type of its labels."""
    largest = 255 if labels_ < 255 else _LARGEST_PAINTED
    expected = f"{regions} whole numbers from 0 to {largest}, one for each region"
    stated = dataset.get("regions_class_order", list, expected)
    order = [whole_number(value) for value in stated]
    if len(order) != regions or any(value is None or not 0 <= value <= largest for value in order):
        raise ModelError(f"{dataset.where}: 'regions_class_order' is {stated!r:.60}, expected {expected}; {RESTORE}")
    return tuple(value for value in order if value is not None)


def normalisations(plans: PlanText, configuration: PlanText, channels: int) -> tuple[ChannelNormalisation, ...]:
    """How each channel is normalised.

    Raises ModelError if a scheme is unknown, missing, or lacks what it needs, or ``use_mask_for_norm`` does not fit.
    """
    schemes = configuration.get("normalization_schemes", list, "one scheme a channel")
    if len(schemes) != channels:
        raise ModelError(
            f"{configuration.where}: {len(schemes)} normalization_schemes for the {channels} channels of "
            "dataset.json; check that both files belong to this model"
        )
    masked = configuration.values.get("use_mask_for_norm") or [False] * channels
    if not isinstance(masked, list) or len(masked) != channels or any(type(m) is not bool for m in masked):
        raise ModelError(
            f"{configuration.where}: 'use_mask_for_norm' is {masked!r:.60}, expected true or false for each of the "
            f"{channels} channels; {RESTORE}"
        )
    by_channel: Any = {}
    for key in ("foreground_intensity_properties_by_modality", "foreground_intensity_properties_per_channel"):
        by_channel = plans.values.get(key, by_channel)
    result = []
    for index, scheme in enumerate(schemes):
        if scheme not in NORMALISATIONS:
            raise ModelError(
                f"{configuration.where}: unknown normalisation '{scheme}' of channel {index}, known: "
                f"{', '.join(NORMALISATIONS)}; custom schemes are not supported yet"
            )
        stated = by_channel.get(str(index), {}) if isinstance(by_channel, dict) else {}
        numbers = [_number(stated, key) for key in ("mean", "std", "percentile_00_5", "percentile_99_5")]
        if scheme == "CTNormalization" and None in numbers:
            raise ModelError(
                f"{plans.where}: CTNormalization of channel {index} needs mean, std, percentile_00_5 and "
                f"percentile_99_5 in foreground_intensity_properties_per_channel; {RESTORE}"
            )
        within = masked[index] and scheme == "ZScoreNormalization"  # nnU-Net's other schemes do not look at it
        mean, std, lower, upper = numbers
        result.append(ChannelNormalisation(scheme, mean, std, lower, upper=upper, masked=within))
    return tuple(result)


def _number(values: object, key: str) -> float | None:
    value = values.get(key) if isinstance(values, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def patch_and_spacing(configuration: PlanText) -> tuple[int, Vec3, PlanSpacing]:
    """Dimensions of the network, its patch (z, y, x) and its spacing (z, y, x) in the plan's unit.

    Raises ModelError if they are not two or three positive numbers, or absurdly large.
    """
    dimensions = len(configuration.get("patch_size", list, "two or three whole numbers"))
    if dimensions not in (2, 3):
        raise ModelError(f"{configuration.where}: 'patch_size' has {dimensions} axes, expected 2 or 3; {RESTORE}")
    patch = configuration.numbers("patch_size", dimensions)
    sizes = [int(size) for size in patch]
    if sizes != patch or max(sizes) > _LARGEST_PATCH:
        raise ModelError(
            f"{configuration.where}: 'patch_size' is {patch}, expected whole numbers up to {_LARGEST_PATCH}; {RESTORE}"
        )
    spacing = configuration.numbers("spacing", dimensions)
    depth, spacing_z = (1, None) if dimensions == 2 else (sizes[0], float(spacing[0]))
    return dimensions, (depth, sizes[-2], sizes[-1]), (spacing_z, float(spacing[-2]), float(spacing[-1]))


def resampling_rule(configuration: PlanText, key: str) -> ResamplingRule:
    """The resampling function that the plans name under ``key``, with nnU-Net's defaults for what they do not state.

    Raises ModelError if its arguments are of the wrong type.
    """
    function = configuration.values.get(key, DEFAULT_RESAMPLING)
    stated = configuration.values.get(f"{key}_kwargs", {"force_separate_z": None})
    if not isinstance(function, str) or not isinstance(stated, dict):
        raise ModelError(f"{configuration.where}: '{key}' is {function!r:.60}, expected a function's name; {RESTORE}")
    known = _RESAMPLING.get(function, {})
    values = known | stated
    labels_ = key == "resampling_fn_seg"
    strange = {name for name in stated if name not in known}
    strange |= {"is_seg"} if known and bool(values.get("is_seg")) != labels_ else set()
    strange |= {"memefficient_seg_resampling"} if labels_ and values.get("memefficient_seg_resampling") else set()
    orders = [values.get("order", 0), values.get("order_z", 0)]
    if "mode" in known:
        orders = [_MODES.get(str(values[name]), 0) for name in ("mode", "aniso_axis_mode")]
        strange |= {name for name in ("mode", "aniso_axis_mode") if str(values[name]) not in _MODES}
    force, threshold = values.get("force_separate_z"), values.get("separate_z_anisotropy_threshold", 3)
    whole = all(isinstance(n, int) and 0 <= n <= 5 for n in orders)
    if not whole or not (force is None or force in (0, 1)) or not isinstance(threshold, (int, float)):
        raise ModelError(
            f"{configuration.where}: '{key}_kwargs' is {stated!r:.80}, expected spline orders 0 to 5, "
            f"force_separate_z true, false or null and a number as threshold; {RESTORE}"
        )
    problem = ", ".join(f"{name}={values[name]!r:.40}" for name in sorted(strange))
    return ResamplingRule(
        function,
        int(orders[0]),
        int(orders[1]),
        None if force is None else bool(force),
        anisotropy_threshold=float(threshold),
        problem=problem,
    )
