"""NIfTI files as nnU-Net's readers describe and write them; called by ``nnunet_folder``.

The readers' own libraries state the spacing and make the header; voxels are written behind it slab by slab.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from connectomics.core.errors import OutputError, VolumeError
from connectomics.core.geometry import Vec3
from connectomics.volumes.formats.nifti import turn_to_ras
from connectomics.volumes.reoriented import Orientation
from connectomics.volumes.source import reason, three_positive
from connectomics.volumes.volume import Array, Spacing

SIMPLE_ITK, NIBABEL, NIBABEL_TURNED = "SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"
NIFTI_READERS = (SIMPLE_ITK, NIBABEL, NIBABEL_TURNED)
HEADER_BYTES = 348
LONGEST_AXIS = 32767
READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    WrapStructError,
)


@dataclass(frozen=True, slots=True)
class NiftiGeometry:
    """Where the voxels of an image lie.

    Parameters
    ----------
    spacing
        (z, y, x) as nnU-Net's reader states it, in the order in which it gives the axes.
    itk
        Spacing, origin and direction as SimpleITK has them, or None for a file read by nibabel.
    affine
        Of the labels that nibabel writes, or None.
    turn
        From the file's axes to those of the reader.
    """

    spacing: Spacing
    itk: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] | None = None
    affine: Array | None = None
    turn: Orientation | None = None


def frame_of(path: Path, reader: str) -> NiftiGeometry:
    """Read an image's header as nnU-Net's ``reader`` would.

    Raises VolumeError if it cannot be read, or the reader cannot write labels for an image of its axes.
    """
    try:
        return _itk_frame(path) if reader == SIMPLE_ITK else _nibabel_frame(path, turned=reader == NIBABEL_TURNED)
    except READ_ERRORS as error:
        raise VolumeError(
            f"{path}: nnU-Net's {reader} cannot read it: {_cause(error)}. Mend the header, or write the image again."
        ) from error


def _cause(error: Exception) -> str:
    """What SimpleITK and nibabel say, on one line; SimpleITK puts it behind the place in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return reason(ValueError(lines[-1].removeprefix("ITK ERROR: "))) if lines else type(error).__name__


def _itk_frame(path: Path) -> NiftiGeometry:
    import SimpleITK

    file = SimpleITK.ImageFileReader()
    file.SetFileName(str(path))
    file.ReadImageInformation()
    spacing = tuple(abs(float(value)) for value in file.GetSpacing())
    if len(spacing) not in (2, 3):
        raise VolumeError(
            f"{path}: has {len(spacing)} axes, and nnU-Net's {SIMPLE_ITK} writes labels of 2 or 3; "
            "split the channels into CASE_0000, CASE_0001 and so on"
        )
    stated = spacing[::-1] if len(spacing) == 3 else (999 * max(spacing), *spacing[::-1])
    return NiftiGeometry(_positive(stated), (file.GetSpacing(), file.GetOrigin(), file.GetDirection()))


def _nibabel_frame(path: Path, *, turned: bool) -> NiftiGeometry:
    image: Any = nibabel.load(path)
    if image.ndim != 3:
        raise VolumeError(
            f"{path}: has {image.ndim} axes, and nnU-Net's {NIBABEL} reads 3; write each channel as a file of its own"
        )
    affine, zooms, turn = image.affine, image.header.get_zooms(), None
    if turned:
        orientation = io_orientation(affine)
        blank = type(image)(_blank(image.shape), affine, image.header).as_reoriented(orientation)
        zooms, turn = blank.header.get_zooms(), turn_to_ras(affine)
        back = ornt_transform(axcodes2ornt("RAS"), orientation)
        affine = nibabel.Nifti1Image(_blank(blank.shape), blank.affine).as_reoriented(back).affine
    return NiftiGeometry(_positive(zooms[::-1]), affine=affine, turn=turn)


def _blank(shape: tuple[int, ...]) -> Array:
    """An image without memory, for what depends on its shape alone."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def _positive(values: object) -> Spacing:
    found = three_positive(values)
    if found is None:
        raise ValueError(f"its spacing (z, y, x) is {values}, expected three positive numbers")
    return found


def header_of(frame: NiftiGeometry, extent: Vec3, dtype: np.dtype[Any]) -> bytes:
    """All that stands before the voxels of a label file, made by the library that nnU-Net's reader writes with.

    ``extent`` is (z, y, x) of the labels in the file's axes. Raises OutputError if an axis is too long for NIfTI-1.
    """
    shape = extent[:0:-1] if frame.itk is not None and len(frame.itk[0]) == 2 else extent[::-1]
    if max(shape) > LONGEST_AXIS:
        raise OutputError(
            f"labels of (z, y, x) = {extent} do not fit into NIfTI-1, which holds {LONGEST_AXIS} voxels along an axis; "
            "use infer-volume, whose results have no such limit"
        )
    small = np.zeros((2,) * len(shape), dtype)
    content = _itk_file(frame, small) if frame.itk else nibabel.Nifti1Image(small, frame.affine).to_bytes()
    header = nibabel.Nifti1Header(content[:HEADER_BYTES])
    header["dim"][1 : len(shape) + 1] = shape
    return bytes(header.binaryblock + content[HEADER_BYTES : int(header["vox_offset"])])


def _itk_file(frame: NiftiGeometry, labels: Array) -> bytes:
    import SimpleITK

    assert frame.itk is not None
    image = SimpleITK.GetImageFromArray(labels)
    image.SetSpacing(frame.itk[0])
    image.SetOrigin(frame.itk[1])
    image.SetDirection(frame.itk[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.nii")
        SimpleITK.WriteImage(image, str(path))
        return path.read_bytes()


def write_nifti(path: Path, header: bytes, slabs: Iterable[Array], *, packed: bool) -> None:
    """Write a header and the voxels of ``slabs`` (z, y, x) behind it."""
    with path.open("wb") as file, _packing(file, packed=packed) as stream:
        stream.write(header)
        for slab in slabs:
            stream.write(slab.tobytes())


def holds(path: Path, header: bytes, slabs: Iterable[Array], *, packed: bool) -> bool:
    """Whether a file has this header and these voxels, and nothing more."""
    with gzip.open(path) if packed else path.open("rb") as stream:
        return (
            stream.read(len(header)) == header
            and all(stream.read(slab.nbytes) == slab.tobytes() for slab in slabs)
            and not stream.read(1)
        )


def _packing(file: IO[bytes], *, packed: bool) -> Any:
    return gzip.GzipFile("", "wb", 6, file, mtime=0) if packed else file
