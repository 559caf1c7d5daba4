"""What nnU-Net wrote as JSON, plans.json and dataset.json: read, and each value checked when it is asked for.

``contents`` and ``converted`` read it; what it means is said in ``plans``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.core.errors import ModelError

_LARGEST_BYTES = 1 << 26
RESTORE = "restore the file that nnU-Net wrote for this model"


@dataclass(frozen=True, slots=True)
class PlanText:
    """Parsed JSON and where it came from: a file, or the checkpoint's own copy."""

    values: Mapping[str, Any]
    where: str

    @property
    def text(self) -> str:
        """The values as JSON with sorted keys: equal values give equal text."""
        return json.dumps(self.values, sort_keys=True)

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of a required key; a ModelError if it is missing or of another type."""
        if key not in self.values:
            raise ModelError(f"{self.where}: '{key}' is missing, expected {expected}; {RESTORE}")
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ModelError(f"{self.where}: '{key}' is {value!r:.80}, expected {expected}; {RESTORE}")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """A required list of positive numbers; a ModelError if it is anything else."""
        values: list[float] = self.get(key, list, f"{count} positive numbers")
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if len(values) != count or not numeric or not all(0 < v < math.inf for v in values):
            raise ModelError(f"{self.where}: '{key}' is {values!r:.80}, expected {count} positive numbers; {RESTORE}")
        return values


def read_json(path: Path) -> PlanText:
    """The object in a JSON file; a ModelError, which names the line, if it cannot be read or is none."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LARGEST_BYTES + 1)
        if len(text) > _LARGEST_BYTES:
            raise ValueError(f"larger than {_LARGEST_BYTES} bytes")
        values = json.loads(text.decode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg}); {RESTORE}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON text file ({error!s:.80}); {RESTORE}") from error
    return _as_object(values, str(path))


def embedded_json(value: object, where: str) -> PlanText:
    """A mapping that a checkpoint carries, with JSON's types; a ModelError if JSON cannot carry it."""
    try:
        return _as_object(json.loads(json.dumps(value)), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not plain values ({error}); put plans.json and dataset.json beside it") from error


def _as_object(values: object, where: str) -> PlanText:
    if not isinstance(values, dict):
        raise ModelError(f"{where}: holds a {type(values).__name__}, expected a JSON object; {RESTORE}")
    return PlanText(values, where)
