"""Frames that name their axes: COSEM's ``transform`` and Java's ``pixelResolution``, in N5 and in Zarr; for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.frame import NOWHERE, Frame, numbers_in
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import Source, three_positive

TRANSFORM, PIXEL_RESOLUTION = "transform", "pixelResolution"


def transform_frame(source: Source, attributes: Mapping[str, object], name: str) -> Frame:
    """COSEM's ``transform``, which names its axes, so that their order does not matter; empty where there is none.

    Raises VolumeError if it states a unit that nobody knows, or lists of different lengths.
    """
    stated = attributes.get(TRANSFORM)
    if not isinstance(stated, Mapping):
        return Frame()
    axes, units, scale = (stated.get(key) for key in ("axes", "units", "scale"))
    if not isinstance(axes, list) or not isinstance(units, list) or not isinstance(scale, list):
        return Frame()
    where, moved = f"`{TRANSFORM}` of `{name}`", stated.get("translate") or [0.0] * len(axes)
    if not isinstance(moved, list) or not len(axes) == len(units) == len(scale) == len(moved):
        raise VolumeError(f"{source.uri}: {where} has axes, units, scale and translate of different lengths; mend it.")
    rows: dict[str, tuple[float, float]] = {}
    for axis, unit, step, start in zip(axes, units, scale, moved, strict=True):
        if axis not in ("z", "y", "x"):
            continue
        factor = nanometres(source, unit, f"`units` in {where}")
        if factor is None:
            return Frame()
        rows[axis] = (float(step) * factor, float(start) * factor)
    if len(rows) < 3:
        return Frame()
    size, origin = three_positive([rows[axis][0] for axis in "zyx"]), [rows[axis][1] for axis in "zyx"]
    return Frame(size, (origin[0], origin[1], origin[2]), where) if size else Frame()


def pixel_resolution_frame(source: Source, attributes: Mapping[str, object], name: str) -> Frame:
    """Java's ``pixelResolution``, whose dimensions count x first; empty where there is none or it has no unit.

    Raises VolumeError if nobody knows its unit.
    """
    stated = attributes.get(PIXEL_RESOLUTION)
    if not isinstance(stated, Mapping):
        return Frame()
    where, values = f"`{PIXEL_RESOLUTION}` of `{name}`", numbers_in(stated.get("dimensions"))
    factor = nanometres(source, stated.get("unit"), f"`unit` in {where}")
    if factor is None or values is None or len(values) < 3:
        return Frame()
    size = three_positive(np.array(values[2::-1]) * factor)
    return Frame(size, NOWHERE, where) if size else Frame()


def scaled(frame: Frame, factors: Sequence[float], where: str) -> Frame:
    """The frame of a level whose voxels are ``factors`` (z, y, x) times those of the finest."""
    if frame.voxel_size_nm is None:
        return frame
    z, y, x = np.multiply(frame.voxel_size_nm, factors).tolist()
    return Frame((z, y, x), frame.origin_nm, f"{frame.where}, times {where}", frame.origin_where)
