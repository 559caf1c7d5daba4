"""Files of a few named arrays, of which a reader takes what it needs: a line of JSON, then the arrays' bytes.

What blocks leave behind is written so; numpy's own ``.npz`` takes milliseconds a file to find its members.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
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
    with replacing(path) as temporary:
        write(temporary, **members)


def write(path: Path, **members: Array) -> None:
    """Write arrays to one file, which may be part of something that is not whole yet."""
    head = {name: [array.dtype.descr, list(array.shape)] for name, array in members.items()}
    with path.open("wb") as stream:
        stream.write(json.dumps(head).encode() + b"\n")
        for array in members.values():
            stream.write(np.ascontiguousarray(array).tobytes())


def load(path: Path, *names: str) -> tuple[Array, ...]:
    """Members of a saved file in the order of their names; a LedgerError if it is absent or damaged."""
    with _reading(path), path.open("rb") as stream:
        head = json.loads(stream.readline())
        place, found = stream.tell(), {}
        for name, (fields, shape) in head.items():
            kind, count = _dtype(fields), math.prod(shape)
            if name in names:
                stream.seek(place)
                found[name] = np.fromfile(stream, kind, count).reshape(shape)
            place += count * kind.itemsize
        return tuple(found[name] for name in names)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the members of a saved file, which are not read; a LedgerError as for ``load``."""
    with _reading(path), path.open("rb") as stream:
        return {name: tuple(shape) for name, (_, shape) in json.loads(stream.readline()).items()}


def view(path: Path, name: str) -> Array:
    """A member of a saved file, mapped for reading, so that only what is looked at is read; errors as for ``load``."""
    with _reading(path), path.open("rb") as stream:
        head = json.loads(stream.readline())
        place = stream.tell()
        for each, (fields, shape) in head.items():
            kind, count = _dtype(fields), math.prod(shape)
            if each == name:
                return np.memmap(stream, kind, "r", place, tuple(shape)) if count else np.zeros(shape, kind)
            place += count * kind.itemsize
        raise KeyError(name)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Have what goes wrong told with the file and the remedy."""
    try:
        yield
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
