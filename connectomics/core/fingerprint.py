"""Result and run keys: sha256 over canonical JSON of whatever decides a result.

``assembly`` puts together what goes in; stages stamp and compare the keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def canonical_json(value: object) -> str:
    """Serialise to JSON with sorted keys and no spaces, so that equal values give equal text.

    Raises
    ------
    TypeError, ValueError
        If ``value`` holds anything JSON cannot carry exactly (NaN included).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(facts: Mapping[str, object]) -> str:
    """sha256 (64 hexadecimal digits) of ``facts``.

    Examples
    --------
    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """sha256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's content as 64 hexadecimal digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
