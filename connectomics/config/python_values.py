"""Configuration that Python states: values of numpy and paths as a YAML file would hold them; ``load`` asks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from connectomics.config.validation import shown
from connectomics.core.errors import ConfigError


@runtime_checkable
class _HasList(Protocol):
    """An array of numpy or torch, or a number of theirs."""

    def tolist(self) -> object: ...


def parts_of(overrides: object) -> Sequence[str | Mapping[str, object]]:
    """What is stated beside a file, one after the other; a ConfigError where it is neither words nor mappings."""
    parts = [overrides] if isinstance(overrides, str | Mapping) else overrides
    if not isinstance(parts, Sequence) or not all(isinstance(part, str | Mapping) for part in parts):
        raise ConfigError(f"overrides are {shown(overrides)}, expected a list of 'key=value' words, or a mapping")
    return parts


def plain_value(key: str, value: object) -> object:
    """A value as a YAML file would hold it: paths as text, tuples and arrays as lists, their numbers as plain ones."""
    if isinstance(value, Mapping):
        return {str(name): plain_value(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, _HasList):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain_value(key, item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(f"{key} is {shown(value)}, expected text, a number, true, false, null, or a list of these")
