"""NIfTI volumes (``.nii``, ``.nii.gz``) as nnU-Net's SimpleITKIO and NibabelIO read them; for ``opening``.

A ``.nii`` file is memory-mapped. A ``.nii.gz`` file is unpacked once, at the first read, into an anonymous temporary
file (in TMPDIR) that vanishes when the volume is closed or the process ends.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import AxisOrder, vec3
from connectomics.volumes.formats.mapped import LARGEST_RATIO, MappedArray, UnpackedArray, contiguous_chunk
from connectomics.volumes.reoriented import Orientation, ReorientedVolume
from connectomics.volumes.source import READ_ERRORS, Source, three_positive, unreadable
from connectomics.volumes.stored import Layout, StoredVolume, info_of, layout_of, native_dtype
from connectomics.volumes.volume import Array, Spacing, VolumeReader
from connectomics.volumes.watched import WatchedFiles

LETTERS = {2: "xy", 3: "xyz", 4: "xyzc"}
"""Stored axes by their number; the fourth holds channels, as nnU-Net's SimpleITKIO takes it."""
FIVE_AXES = "xyztc"
"""Where there are more, the fourth is time and the fifth holds channels, as NIfTI says; others have no meaning."""
MILLIMETRES_PER_UNIT = {"meter": 1e3, "mm": 1.0, "micron": 1e-3}
HEADER_BYTES = 540
RAS, ITK = "ras", "itk"


@dataclass(frozen=True, slots=True)
class _NiftiHeader:
    """What a NIfTI header says of the array behind it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float | None
    intercept: float
    zooms: tuple[float, ...]
    unit: str
    first_version: bool
    affine: Array

    @property
    def total_bytes(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def open_nifti(source: Source) -> VolumeReader:
    """Open a NIfTI-1 or NIfTI-2 file for lazy reading.

    The inner part ``ras`` turns it as NibabelIOWithReorient does. With ``itk`` spacing and voxels are those of
    SimpleITKIO whatever the suffix: a stored value that is infinite or not a number is 0.

    Scaled voxels (``scl_slope``, ``scl_inter``) are float32. The spacing is the one nnU-Net's reader of the suffix
    states: in millimetres for ``.nii.gz`` (SimpleITKIO), as stored for ``.nii`` and NIfTI-2 (NibabelIO).

    Raises
    ------
    VolumeError
        If the file is damaged or cut short, has voxels that are no numbers, or more than four axes.
    """
    _check_inner(source)
    packed = source.path.name.lower().endswith(".gz")
    try:
        with contextlib.ExitStack() as opened:
            watched = WatchedFiles(source.path)
            header = _header(source.path, packed)
            native_dtype(source, header.dtype)
            layout = layout_of(source, header.shape, _letters(len(header.shape)), "NIfTI's own order")
            by_itk = source.inner == ITK or (packed and header.first_version and source.inner is None)
            array = _array(source, header, opened, packed=packed)
            info = info_of(
                source,
                layout,
                header.dtype if header.slope is None else np.dtype(np.float32),
                contiguous_chunk(header.shape, header.dtype.itemsize, "F"),
                voxel_size_nm=_spatial(layout, header, MILLIMETRES_PER_UNIT.get(header.unit, math.nan) * 1e6),
                spacing=_spacing(layout, header, by_itk=by_itk),
                found={"voxel size": "pixdim and xyzt_units of its header", "spacing": "pixdim of its header"},
            )
            turn = turn_to_ras(header.affine) if source.inner == RAS else None
            release = opened.pop_all().close
    except (HeaderDataError, WrapStructError, *READ_ERRORS) as error:
        raise unreadable(source, "NIfTI", error) from error

    def fetch(index: tuple[slice, ...]) -> Array:
        return _values(array.fetch(index), header, zeros=source.inner == ITK)

    volume = StoredVolume(source, info, layout, fetch=fetch, watched=watched, release=release)
    return ReorientedVolume(volume, turn) if turn else volume


def _array(
    source: Source, header: _NiftiHeader, opened: contextlib.ExitStack, *, packed: bool
) -> UnpackedArray | MappedArray:
    if not packed:
        stream = opened.enter_context(source.path.open("rb"))
        return MappedArray(stream, header.dtype, header.shape, header.offset, order="F")
    if header.total_bytes > LARGEST_RATIO * source.path.stat().st_size:
        raise ValueError(f"its header promises {header.total_bytes} bytes, more than the file can hold")
    array = UnpackedArray(
        source,
        cast(Callable[[], IO[bytes]], functools.partial(gzip.open, source.path)),
        header.total_bytes,
        lambda stream: MappedArray(stream, header.dtype, header.shape, header.offset, order="F"),
    )
    opened.callback(array.close)
    return array


def _values(voxels: Array, header: _NiftiHeader, *, zeros: bool) -> Array:
    """Stored voxels as the header scales them, before that with ``zeros`` where one is no finite number."""
    if zeros and voxels.dtype.kind == "f":
        voxels = np.where(np.isfinite(voxels), voxels, voxels.dtype.type(0))
    if header.slope is None:
        return voxels
    with np.errstate(over="ignore", invalid="ignore"):
        return (voxels.astype(np.float64) * header.slope + header.intercept).astype(np.float32)


def _check_inner(source: Source) -> None:
    if source.inner not in (None, RAS, ITK):
        raise VolumeError(
            f"{source.uri}: a NIfTI file has no inner part {source.inner!r}; name the file alone, with ::{RAS} "
            f"to turn its axes to right, front and up, or with ::{ITK} to read it as SimpleITK does."
        )
    if source.inner == RAS and source.axes:
        raise VolumeError(
            f"{source.uri}: ::{RAS} and the axes {source.axes!r} both turn the volume; state one of them."
        )


def _header(path: Path, packed: bool) -> _NiftiHeader:
    with gzip.open(path) if packed else path.open("rb") as stream:
        block = stream.read(HEADER_BYTES)
    kinds: tuple[Any, ...] = (Nifti1Header, Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(block)), None)
    if kind is None:
        raise ValueError("it does not start with a NIfTI header")
    header = kind(block[: kind.template_dtype.itemsize], check=True)
    if not bytes(header["magic"].item()).startswith(b"n+"):
        raise ValueError("its voxels are in another file (.hdr and .img); join them into one .nii file")
    slope, intercept = header.get_slope_inter()
    if (slope, intercept) == (1.0, 0.0):
        slope = None
    with np.errstate(over="ignore", invalid="ignore"):
        affine = header.get_best_affine()
    return _NiftiHeader(
        tuple(int(n) for n in header.get_data_shape()),
        header.get_data_dtype(),
        int(header.get_data_offset()),
        slope,
        intercept=intercept or 0.0,
        zooms=tuple(float(zoom) for zoom in header.get_zooms()),
        unit=str(header.get_xyzt_units()[0]),
        first_version=kind is Nifti1Header,
        affine=affine,
    )


def _letters(count: int) -> str | None:
    """Letters of so many stored axes; None for fewer than two."""
    return LETTERS.get(count, f"{FIVE_AXES:?<{count}}" if count > 4 else None)


def turn_to_ras(affine: Array) -> Orientation:
    """Turn (z, y, x) as stored to those of nnU-Net's NibabelIOWithReorient: x to the right, y to the front, z up.

    Raises ValueError if the affine leaves out an axis.
    """
    orientation = io_orientation(affine)
    if np.isnan(orientation).any():
        raise ValueError("its affine has no direction for one of the axes, so they cannot be turned")
    stored = {int(axis): i for i, axis in enumerate(orientation[:, 0])}
    back = [bool(sign < 0) for sign in orientation[::-1, 1]]
    return Orientation((back[0], back[1], back[2]), AxisOrder(vec3([2 - stored[axis] for axis in (2, 1, 0)])))


def _spatial(layout: Layout, header: _NiftiHeader, factor: float) -> Spacing | None:
    """Distances (z, y, x) times ``factor``, or None where an axis is absent or a distance is not positive."""
    found = dict(zip(layout.letters, header.zooms, strict=True))
    return three_positive([found.get(letter, math.nan) for letter in "zyx"], factor)


def _spacing(layout: Layout, header: _NiftiHeader, *, by_itk: bool) -> Spacing | None:
    factor = MILLIMETRES_PER_UNIT.get(header.unit, 1.0) if by_itk else 1.0
    if len(header.shape) > 2:
        return _spatial(layout, header, factor)
    y, x = (header.zooms[layout.letters.index(letter)] * factor for letter in "yx")
    return three_positive([999 * max(y, x), y, x])  # one section, as SimpleITKIO states it
