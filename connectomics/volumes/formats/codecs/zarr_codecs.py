"""Codecs in the metadata of a Zarr array: which TensorStore knows, and which levels it takes; for ``zarr``."""

from __future__ import annotations

import json
import re
from typing import Any

V2_COMPRESSORS = ("blosc", "bz2", "gzip", "zlib", "zstd")
V3_CODECS = ("bytes", "transpose", "gzip", "blosc", "zstd", "crc32c", "sharding_indexed")
LEVELS = {"gzip": (0, 9), "zlib": (0, 9), "bz2": (1, 9)}
"""What TensorStore takes for the level of a codec. Java writes -1 for the usual one; unpacking needs no level."""
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,19})(\.\d{1,20})?")


def foreign_codecs(metadata: dict[str, Any]) -> list[str]:
    """Names of the filters and codecs of an array that TensorStore does not know."""
    if metadata.get("zarr_format") == 3:
        return [name for name in _names(metadata.get("codecs")) if name not in V3_CODECS]
    filters = metadata.get("filters") or []
    names = [_id(one) for one in filters] if isinstance(filters, list) else []
    compressor = metadata.get("compressor")
    if isinstance(compressor, dict) and _id(compressor) not in V2_COMPRESSORS:
        names.append(_id(compressor))
    return names


def _id(codec: object) -> str:
    return str(codec.get("id")) if isinstance(codec, dict) else str(codec)


def _names(codecs: object) -> list[str]:
    """Names of the codecs of Zarr v3, those within shards, too."""
    if not isinstance(codecs, list):
        return []
    found = []
    for codec in codecs:
        found.append(str(codec.get("name")) if isinstance(codec, dict) else str(codec))
        configuration = codec.get("configuration") if isinstance(codec, dict) else None
        if found[-1] == "sharding_indexed" and isinstance(configuration, dict):
            found += _names(configuration.get("codecs")) + _names(configuration.get("index_codecs"))
    return found


def as_tensorstore_takes(value: Any) -> Any:
    """Metadata in which a level or a fill value that TensorStore does not take is one that it takes.

    Examples
    --------
    >>> as_tensorstore_takes({"compressor": {"id": "gzip", "level": -1}})
    {'compressor': {'id': 'gzip', 'level': 1}}
    >>> as_tensorstore_takes({"codecs": [{"name": "gzip", "configuration": {"level": 5}}]})
    {'codecs': [{'name': 'gzip', 'configuration': {'level': 5}}]}
    """
    if not isinstance(value, dict):
        return value
    changed = dict(value)
    fill = value.get("fill_value")
    if isinstance(fill, str) and _NUMBER.fullmatch(fill):  # as n5-zarr writes 0
        changed["fill_value"] = json.loads(fill)
    if isinstance(value.get("compressor"), dict):
        changed["compressor"] = _lenient(value["compressor"], _id(value["compressor"]))
    if isinstance(value.get("codecs"), list):
        changed["codecs"] = [_lenient_v3(codec) for codec in value["codecs"]]
    return changed


def _lenient_v3(codec: Any) -> Any:
    if not isinstance(codec, dict) or not isinstance(codec.get("configuration"), dict):
        return codec
    configuration = as_tensorstore_takes(codec["configuration"])  # of a shard: the codecs within it
    return codec | {"configuration": _lenient(configuration, str(codec.get("name")))}


def _lenient(settings: dict[str, Any], name: str) -> dict[str, Any]:
    low, high = LEVELS.get(name, (0, 0))
    level = settings.get("level")
    wrong = name in LEVELS and isinstance(level, int) and not low <= level <= high
    return settings | {"level": 1} if wrong else settings
