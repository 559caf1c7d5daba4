"""``decoding``: the list of steps that turn labels into objects, each with keys of its own.

``connectomics.config.load`` reads the list with ``read_steps``; ``assembly`` reads the steps. A further
step is one more class here, in ``STEPS``.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from connectomics.config.validation import shown
from connectomics.core.errors import ConfigError

CONNECTIVITIES = (4, 8, 6, 18, 26)
HOLES = ("off", "2d", "3d")
MEASURES = ("iou", "overlap")
WINDOW_VOXELS = (4096, 1 << 27)  # least and most of ``max_component_voxels``
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class ConnectedComponents:
    """Objects are connected voxels of one label, numbered by their first voxel.

    ``connectivity`` is 6, 18 or 26, or 4 or 8 within sections. ``threshold`` makes foreground of probabilities, of
    ``channel``. With ``per_class`` false all labels count as one. ``probabilities`` names a volume for the table.
    """

    name: str = "connected_components"
    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    per_class: bool = True
    probabilities: str | None = None


@dataclass(frozen=True, slots=True)
class Filters:
    """Whole objects are dropped by size, border and rank, then holes of the others are filled."""

    name: str = "filters"
    min_voxels: int = 0
    max_voxels: int | None = None
    min_volume_nm3: float | None = None
    max_volume_nm3: float | None = None
    drop_border: bool = False
    keep_largest: int | None = None
    fill_holes: str = "off"


@dataclass(frozen=True, slots=True)
class SliceLinking:
    """Objects of sections are linked over z where they overlap by at least ``threshold``.

    ``measure`` is iou, or overlap over the smaller of the two. Links leap up to ``max_gap`` sections. With ``ids`` a
    volume that is given holds ids of objects in sections, not classes.
    """

    name: str = "slice_linking"
    measure: str = "iou"
    threshold: float = 0.25
    max_gap: int = 0
    one_to_one: bool = False
    ids: bool = False


@dataclass(frozen=True, slots=True)
class Watershed:
    """Objects are what seeds flood within the components of the foreground, numbered by their first voxel.

    ``connectivity``, ``threshold``, ``channel`` and ``probabilities`` as for connected components; all labels count as
    one. Seeds are where the probability exceeds ``seed_threshold``, or what is farther than ``seed_distance_nm`` from
    the background. ``keep_unseeded`` keeps components without a seed. A component whose bounding box has more than
    ``max_component_voxels`` is flooded in subvolumes.
    """

    name: str = "watershed"
    connectivity: int = 26
    threshold: float | None = None
    channel: int = 0
    seed_threshold: float | None = None
    seed_distance_nm: float | None = None
    keep_unseeded: bool = True
    max_component_voxels: int = 1 << 24
    probabilities: str | None = None


DecodingStep = ConnectedComponents | Filters | SliceLinking | Watershed
STEPS: Mapping[str, type[DecodingStep]] = {
    "connected_components": ConnectedComponents,
    "filters": Filters,
    "slice_linking": SliceLinking,
    "watershed": Watershed,
}


def read_steps(value: object) -> list[DecodingStep]:
    """The steps of a list of mappings.

    Raises
    ------
    ConfigError
        If it is no such list, a name or key is unknown, or a value has the wrong type or is impossible.
    """
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ConfigError(
            f"decoding is {shown(value)}, expected a list of steps, such as [{{name: connected_components}}]"
        )
    steps = [_step(f"decoding[{i}]", item) for i, item in enumerate(value)]
    for i, step in enumerate(steps):
        for key, (possible, rule) in _RULES[type(step)](step).items():
            if not possible:
                found = shown(dataclasses.asdict(step)[key])
                raise ConfigError(f"decoding[{i}].{key} is {found}, but {rule}")
    return steps


def _step(where: str, stated: Mapping[str, object]) -> DecodingStep:
    name = stated.get("name")
    if name not in STEPS:
        near = _nearest(str(name), STEPS)
        raise ConfigError(f"{where}.name is {shown(name)}, known steps are {', '.join(STEPS)}{near}")
    kind = STEPS[str(name)]
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in stated.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {shown(key)} of {name}, which has {', '.join(hints)}{_nearest(key, hints)}"
            )
        values[key] = _typed(f"{where}.{key}", hints[key], value)
    return kind(**values)


def _nearest(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _typed(key: str, hint: Any, value: object) -> Any:
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {shown(value)}, expected {_TYPE_NAMES[kind]}{', or null' if optional else ''}")
    return str(value) if kind is str else value  # Hydra's quoted text is a class of its own


Rules = Mapping[str, tuple[bool, str]]


def _component_rules(step: Any) -> Rules:
    return {
        "connectivity": (step.connectivity in CONNECTIVITIES, f"must be one of {', '.join(map(str, CONNECTIVITIES))}"),
        "channel": (step.channel >= 0, "must be 0 or more"),
        "probabilities": (step.probabilities is None or step.threshold is None, "the threshold's volume has them"),
    }


def _filter_rules(step: Any) -> Rules:
    def at_least(minimum: float, value: float | None) -> bool:
        return value is None or value >= minimum

    most, least = step.max_voxels, step.min_voxels
    return {
        "min_voxels": (least >= 0, "must be 0 or more"),
        "max_voxels": (at_least(max(least, 0), most), "must be min_voxels or more"),
        "min_volume_nm3": (at_least(0, step.min_volume_nm3), "must be 0 or more"),
        "max_volume_nm3": (at_least(step.min_volume_nm3 or 0, step.max_volume_nm3), "must be min_volume_nm3 or more"),
        "keep_largest": (at_least(1, step.keep_largest), "must be 1 or more"),
        "fill_holes": (step.fill_holes in HOLES, f"must be one of {', '.join(HOLES)}"),
    }


def _linking_rules(step: Any) -> Rules:
    return {
        "measure": (step.measure in MEASURES, f"must be one of {', '.join(MEASURES)}"),
        "threshold": (0 <= step.threshold <= 1, "must be 0 to 1"),
        "max_gap": (step.max_gap >= 0, "must be 0 or more"),
    }


def _watershed_rules(step: Any) -> Rules:
    high, deep = step.seed_threshold, step.seed_distance_nm
    floor = high if step.threshold is None else step.threshold
    least, most = WINDOW_VOXELS
    return {
        **_component_rules(step),
        "seed_distance_nm": (deep is None or deep > 0, "must be positive"),
        "seed_threshold": (
            (high is None) != (deep is None) and (high is None or high >= floor),
            "must be threshold or more, and exactly one of seed_threshold and seed_distance_nm is stated",
        ),
        "max_component_voxels": (least <= step.max_component_voxels <= most, f"must be {least} to {most}"),
    }


_RULES: Mapping[type[DecodingStep], Callable[[Any], Rules]] = {
    ConnectedComponents: _component_rules,
    Filters: _filter_rules,
    SliceLinking: _linking_rules,
    Watershed: _watershed_rules,
}
