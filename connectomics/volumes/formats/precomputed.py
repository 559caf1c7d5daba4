"""Neuroglancer precomputed volumes through TensorStore; ``path::1`` or ``path::KEY`` picks a scale; for ``opening``."""

from __future__ import annotations

import itertools
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore as ts

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import chunked_volume, open_stored
from connectomics.volumes.formats.codecs.packed_chunks import UNPACKERS, PackedChunks
from connectomics.volumes.metadata.frame import Frame
from connectomics.volumes.source import (
    READ_ERRORS,
    Source,
    files_below,
    folded_identity,
    json_at,
    some_of,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, layout_of

ENCODINGS = ("raw", "jpeg", "png", "compressed_segmentation")
TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32")
LOOKED_AT = 1000
"""Names in a scale's folder that are looked at for packed chunks."""


def open_precomputed(source: Source) -> StoredVolume:
    """Open one scale of a precomputed volume for lazy reading.

    Raises
    ------
    VolumeError
        If its ``info`` is damaged, there is no such scale, or its encoding is not supported.
    """

    def identity() -> dict[str, object]:
        files = [("info", source.path / "info"), *files_below(folder)]
        return {**folded_identity(source.path.name, files), "scale": str(scale["key"])}

    try:
        index, scale = _choose(source, _scales(source))
        folder = _folder(source, scale)
        opened = open_stored("neuroglancer_precomputed", source.path, scale_index=index)
        array = opened[ts.d[:].translate_to[0]]
        layout = layout_of(source, array.shape, "xyzc", "precomputed's own order")
        x, y, z = three_positive(scale.get("resolution")) or (np.nan,) * 3
        size = three_positive((z, y, x))
        offset = [float(n) for n in opened.domain.origin[:3]]
        where = f"resolution and voxel_offset of scale {scale['key']} in info"
        frame = Frame(size, (offset[2] * z, offset[1] * y, offset[0] * x), where) if size else Frame()
        plain = chunked_volume(source, layout, array, frame=frame, identity=identity)
        if not _is_packed(folder):
            return plain
        chunks = PackedChunks(folder, opened, _info_of_one_scale(source, scale))
        return StoredVolume(source, plain.info, layout, fetch=chunks.fetch, identity=identity, release=chunks.forget)
    except READ_ERRORS as error:
        raise unreadable(source, "precomputed", error) from error


def _scales(source: Source) -> list[dict[str, Any]]:
    content = json_at(source.path / "info")
    scales = content.get("scales") if isinstance(content, dict) else None
    if not isinstance(scales, list) or not scales:
        raise VolumeError(
            f"{source.uri}: its info file names no scales, so it is no precomputed volume (a mesh, skeletons or "
            "annotations perhaps); name the folder of the image."
        )
    if not all(isinstance(scale, dict) and isinstance(scale.get("key"), str) for scale in scales):
        raise VolumeError(f"{source.uri}: a scale in its info file has no key; write the info file again.")
    kind = content.get("data_type")
    if kind not in TYPES:
        raise VolumeError(f"{source.uri}: voxels of type {kind!r:.80} cannot be read; expected {', '.join(TYPES)}.")
    return scales


def _choose(source: Source, scales: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Number and description of the scale that the request means: the first, by key, or by number."""
    keys = [scale["key"] for scale in scales]
    wanted = source.inner or "0"
    if wanted in keys:
        return keys.index(wanted), scales[keys.index(wanted)]
    if wanted.isdecimal() and int(wanted) < len(scales):
        return int(wanted), scales[int(wanted)]
    raise VolumeError(
        f"{source.uri}: no scale {wanted!r}; there are {some_of(keys)}. Name one by its key or by its number from 0."
    )


def _folder(source: Source, scale: dict[str, Any]) -> Path:
    """The folder of a scale's chunks, present and of a known encoding."""
    key = PurePosixPath(scale["key"])
    if key.is_absolute() or ".." in key.parts:
        raise VolumeError(f"{source.uri}: the scale {scale['key']!r:.80} lies outside its folder; name one inside.")
    if scale.get("encoding") not in ENCODINGS:
        raise VolumeError(
            f"{source.uri}: encoding {scale.get('encoding')!r:.80} cannot be read; expected {', '.join(ENCODINGS)}. "
            "Write the volume again in one of them."
        )
    folder = source.path / key
    if not folder.is_dir():
        raise VolumeError(f"{source.uri}: the folder of scale {scale['key']!r:.80} is absent; copy it too.")
    return folder


def _is_packed(folder: Path) -> bool:
    """Whether chunks are packed file by file, which their names say."""
    names = (path.name for path in itertools.islice(folder.iterdir(), LOOKED_AT))
    return any(name.endswith(tuple(UNPACKERS)) for name in names)


def _info_of_one_scale(source: Source, scale: dict[str, Any]) -> dict[str, Any]:
    info: dict[str, Any] = json_at(source.path / "info")
    return info | {"scales": [scale]}
