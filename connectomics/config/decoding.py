"""``decoding``: the list of steps that turn labels into objects, each with keys of its own.

``connectomics.config.load`` reads the list with ``read_steps``. What the keys are, each step's class says.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from connectomics.config.key_rules import kind_in_words
from connectomics.config.validation import shown
from connectomics.core.errors import ConfigError
from connectomics.core.features import DECODING_STEPS
from connectomics.core.places import refusal


def read_steps(value: object) -> list[Any]:
    """Return the steps of a list of mappings.

    A step's keys are the fields of its class, a frozen dataclass that gives ``rules``; ``core.features`` names them.

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
        for key, (possible, rule) in step.rules().items():
            if not possible:
                found = shown(dataclasses.asdict(step)[key])
                raise ConfigError(f"decoding[{i}].{key} is {found}, but {rule}")
    return steps


def _step(where: str, stated: Mapping[str, object]) -> Any:
    name = stated.get("name")
    if name not in DECODING_STEPS:
        known = DECODING_STEPS.names()
        raise ConfigError(
            f"{where}.name is {shown(name)}, known steps are {', '.join(known)}{_nearest(str(name), known)}"
        )
    kind = DECODING_STEPS.load(str(name))
    types_of = typing.get_type_hints(kind)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(kind)}
    values = {}
    for key, value in stated.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {shown(key)} of {name}, which has {', '.join(hints)}{_nearest(key, hints)}"
            )
        values[key] = _typed(f"{where}.{key}", hints[key], value)
    return kind(**values)


def _nearest(word: str, known: Collection[str]) -> str:
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
        raise ConfigError(f"{key} is {shown(value)}, expected {kind_in_words(hint)}")
    if isinstance(value, str) and refusal(value):
        raise ConfigError(f"{key} is {shown(value)}, but {refusal(value)}")
    return str(value) if kind is str else value  # Hydra's quoted text is a class of its own
