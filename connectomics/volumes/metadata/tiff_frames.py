"""Voxel size and origin that TIFF files state: OME-XML, ImageJ's description, LSM, this program's own; for ``tiff``.

Resolution tags alone say nothing: they are a printer's or a camera's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.frame import Frame
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import Source, three_positive

MICROMETRES = "µm"
"""What OME means where it states no unit."""
_ELSEWHERE = re.compile(r"BinaryOnly\b[^>]*MetadataFile")


def tiff_frame(source: Source, tif: Any, number: int) -> Frame:
    """Frame of one image series of an opened file.

    Raises
    ------
    VolumeError
        If nobody knows a unit that it states.
    """
    if tif.is_ome:
        return _of_ome(source, tif.ome_metadata, number)
    if tif.is_imagej:
        return _of_imagej(source, tif)
    if tif.is_lsm:
        stated = tif.lsm_metadata or {}
        size = three_positive([stated.get(f"VoxelSize{axis}", np.nan) for axis in "ZYX"], 1e9)
        return Frame(size, where="VoxelSizeZ, Y and X of its LSM metadata") if size else Frame()
    if tif.is_shaped:
        size = three_positive(tif.shaped_metadata[0].get("voxel_size_nm"))
        return Frame(size, where="voxel_size_nm of its description") if size else Frame()
    return Frame()


def refuse_companions(source: Source, tif: Any) -> None:
    """Refuse one file of an OME-TIFF set whose description is in another file, by a VolumeError."""
    if tif.is_ome and _ELSEWHERE.search(tif.ome_metadata or ""):
        raise VolumeError(
            f"{source.uri}: one part of an OME-TIFF set of several files, which a companion file describes; join them "
            "into one file first."
        )


def _of_ome(source: Source, xml: str, number: int) -> Frame:
    try:
        pixels = [e for e in ElementTree.fromstring(xml).iter() if e.tag.rpartition("}")[2] == "Pixels"]
        stated = pixels[number].attrib
        sizes = [float(stated.get(f"PhysicalSize{axis}", "nan")) for axis in "ZYX"]
    except (ElementTree.ParseError, IndexError, ValueError):
        return Frame()
    if not any(np.isfinite(sizes)):
        return Frame()
    factors = [
        nanometres(source, stated.get(f"PhysicalSize{axis}Unit", MICROMETRES), f"PhysicalSize{axis}Unit of its OME-XML")
        for axis in "ZYX"
    ]
    size = None if None in factors else three_positive(np.multiply(sizes, [factor or 0.0 for factor in factors]))
    return Frame(size, where="PhysicalSizeZ, Y and X of its OME-XML") if size else Frame()


def _of_imagej(source: Source, tif: Any) -> Frame:
    """ImageJ's description: x in ``unit``, y in ``yunit``, z is ``spacing`` in ``zunit``, else both in ``unit``.

    Calibration may be negative, and ``xorigin`` and so on count voxels from the first to the origin of coordinates.
    """
    metadata = tif.imagej_metadata or {}
    steps = [abs(_step(tif, metadata, axis)) for axis in "zyx"]
    if three_positive(steps) is None:
        return Frame()
    factors = list[float]()
    for axis in "zyx":
        key = f"{axis}unit" if metadata.get(f"{axis}unit") not in (None, "") else "unit"
        factor = nanometres(source, metadata.get(key), f"`{key}` of ImageJ's description")
        if factor is None:
            return Frame()
        factors.append(factor)
    size = three_positive(np.multiply(steps, factors))
    if size is None:
        return Frame()
    z, y, x = (
        -_number(metadata, f"{axis}origin") * s if f"{axis}origin" in metadata else 0.0
        for axis, s in zip("zyx", size, strict=True)
    )
    where = "`spacing`, `unit` and resolution tags of ImageJ's description"
    return Frame(
        size, (z, y, x), where, "`xorigin`, `yorigin`, `zorigin` of ImageJ's description" if any((z, y, x)) else ""
    )


def _step(tif: Any, metadata: Mapping[str, Any], axis: str) -> float:
    """Length of a voxel in its unit; not a number where none is stated."""
    if axis == "z":
        return _number(metadata, "spacing")
    tag = tif.pages[0].tags.get(f"{axis.upper()}Resolution")
    try:
        voxels, length = tag.value
        return float(length / voxels)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return float("nan")


def _number(metadata: Mapping[str, Any], key: str) -> float:
    try:
        return float(metadata.get(key, "nan"))
    except (TypeError, ValueError):
        return float("nan")
