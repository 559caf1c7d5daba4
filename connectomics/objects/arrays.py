"""Files of a few named arrays, of which a reader takes what it needs: a line of JSON, then the arrays' bytes.

What blocks leave behind is written so; numpy's own ``.npz`` takes milliseconds a file to find its members.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import LedgerError
from connectomics.core.files import replacing
from connectomics.volumes.source import READ_ERRORS, reason
from connectomics.volumes.volume import Array

SUFFIX = ".members"


def save(path: Path, **members: Array) -> None:
    """Write arrays to one file, whole or not at all."""
    head = {name: [array.dtype.descr, list(array.shape)] for name, array in members.items()}
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(json.dumps(head).encode() + b"\n")
        for array in members.values():
            stream.write(np.ascontiguousarray(array).tobytes())


def load(path: Path, *names: str) -> tuple[Array, ...]:
    """Members of a saved file in the order of their names; a LedgerError if it is absent or damaged."""
    try:
        with path.open("rb") as stream:
            head = json.loads(stream.readline())
            place, found = stream.tell(), {}
            for name, (fields, shape) in head.items():
                kind, count = _dtype(fields), math.prod(shape)
                if name in names:
                    stream.seek(place)
                    found[name] = np.fromfile(stream, kind, count).reshape(shape)
                place += count * kind.itemsize
            return tuple(found[name] for name in names)
    except READ_ERRORS as error:
        raise LedgerError(
            f"{path}: cannot be read ({reason(error)}); remove the folder {path.parent} to decode anew"
        ) from error


def _dtype(fields: list[list[Any]]) -> np.dtype[Any]:
    """A dtype from its description in JSON, where tuples are lists."""
    if len(fields) == 1 and fields[0][0] == "":
        return np.dtype(str(fields[0][1]))
    described = [tuple(tuple(part) if isinstance(part, list) else part for part in field) for field in fields]
    kind: np.dtype[Any] = np.dtype(described)
    return kind
