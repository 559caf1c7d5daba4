"""WEBKNOSSOS volumes (WKW) through the package wkw, which the extra ``wkw`` brings; for ``opening``.

A volume is the folder of one magnification, ``DATASET/LAYER/MAG`` with ``header.wkw`` in it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Vec3, vec3
from connectomics.core.installation import install_command
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import (
    READ_ERRORS,
    Source,
    files_below,
    folded_identity,
    json_at,
    refuse_inner,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, require_small_chunks
from connectomics.volumes.volume import Array, Nanometres

PROPERTIES = "datasource-properties.json"
HEADER = "header.wkw"


def open_wkw(source: Source) -> StoredVolume:
    """Open one magnification of a layer for lazy reading.

    Its box and voxel size are those of ``datasource-properties.json`` two folders above; without that the box is that
    of the files that there are.

    Raises
    ------
    VolumeError
        If the header is damaged, nothing is stored, the layer is not in the properties, or the package wkw is missing.
    """
    refuse_inner(source)
    try:
        from wkw import wkw
    except ImportError as error:
        raise VolumeError(
            f"cannot open {source.uri}: reading WKW needs the package wkw: {install_command('wkw')}"
        ) from error
    folder = source.path.resolve()
    properties = folder.parent.parent / PROPERTIES

    def identity() -> dict[str, object]:
        files = list(files_below(source.path))
        if properties.is_file():
            files.append((f"../../{PROPERTIES}", properties))
        return folded_identity(source.path.name, files)

    try:
        dataset = wkw.Dataset.open(str(folder))
        header = dataset.header
        start, extent, size = _box(source, folder, properties, header.block_len * header.file_len)
        layout = layout_of(source, (header.num_channels, *extent), "cxyz", "WKW's own order")
        dtype = np.dtype(header.voxel_type)
        chunk = (header.num_channels, *(header.block_len,) * 3)
        require_small_chunks(source, chunk, dtype.itemsize)
        origin = (start[2] * size[0], start[1] * size[1], start[0] * size[2]) if size else (0.0, 0.0, 0.0)
        info = info_of(
            source,
            layout,
            dtype,
            chunk,
            voxel_size_nm=size,
            origin_nm=origin,
            found={"voxel size": f"`scale` in {PROPERTIES}"},
        )
    except (wkw.WKWException, *READ_ERRORS) as error:
        raise unreadable(source, "WKW", error) from error
    lock = threading.Lock()

    def fetch(index: tuple[slice, ...]) -> Array:
        channel, *spans = index
        at = [span.start + n for span, n in zip(spans, start, strict=True)]
        with lock:
            try:
                block: Array = dataset.read(at, [span.stop - span.start for span in spans])
            except wkw.WKWException as error:
                raise ValueError("a file of blocks is damaged") from error
        return block[channel]

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=dataset.close)


def _box(source: Source, folder: Path, properties: Path, file_voxels: int) -> tuple[Vec3, Vec3, Nanometres | None]:
    """First voxel and extent (x, y, z) in this magnification, and the voxel size (z, y, x)."""
    if not properties.is_file():
        start, extent = _box_of_files(source, folder, file_voxels)
        return start, extent, None
    content = json_at(properties)
    layers = content.get("dataLayers") if isinstance(content, dict) else None
    name = folder.parent.name
    layer = next((one for one in layers or [] if isinstance(one, dict) and one.get("name") == name), None)
    if layer is None:
        raise VolumeError(
            f"{source.uri}: {PROPERTIES} of its dataset names no layer {name!r:.80}, so its box is not known; correct "
            "the name of the folder or the file."
        )
    box, step = layer["boundingBox"], _magnification(source, folder.name)
    corner = [int(n) for n in box["topLeft"]]
    edges = [int(box[key]) for key in ("width", "height", "depth")]
    start = vec3([n // m for n, m in zip(corner, step, strict=True)])
    stop = [-(-(n + edge) // m) for n, edge, m in zip(corner, edges, step, strict=True)]
    extent = vec3([b - a for a, b in zip(start, stop, strict=True)])
    scale = content.get("scale")
    stated = scale if isinstance(scale, dict) else {"factor": scale, "unit": "nanometer"}
    factor = three_positive(stated.get("factor"))
    unit = nanometres(source, stated.get("unit", "nanometer"), f"`unit` in {PROPERTIES}")
    size = None if factor is None or unit is None else three_positive([factor[i] * step[i] * unit for i in (2, 1, 0)])
    return start, extent, size


def _magnification(source: Source, name: str) -> Vec3:
    """What the folder's name says: ``2`` or ``2-2-1``, voxels (x, y, z) of the finest magnification."""
    parts = name.split("-")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise VolumeError(
            f"{source.uri}: the folder of a magnification is called as 1, 2 or 2-2-1, not {name!r:.80}; rename it."
        )
    return vec3([int(part) for part in (parts * 3)[:3]])


def _box_of_files(source: Source, folder: Path, file_voxels: int) -> tuple[Vec3, Vec3]:
    """The box of the files ``z1/y2/x3.wkw`` that there are."""
    places = []
    for path in folder.glob("z*/y*/x*.wkw"):
        parts: list[Any] = [path.stem[1:], path.parent.name[1:], path.parent.parent.name[1:]]
        if all(part.isdecimal() for part in parts):
            places.append([int(part) for part in parts])
    if not places:
        raise VolumeError(f"{source.uri}: {HEADER}, but no file of blocks (z0/y0/x0.wkw); copy them too.")
    low, high = np.min(places, axis=0), np.max(places, axis=0) + 1
    return vec3([int(n) * file_voxels for n in low]), vec3([int(n) * file_voxels for n in high - low])
