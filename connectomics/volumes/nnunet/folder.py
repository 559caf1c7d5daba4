"""Folders as nnU-Net's predictor reads and writes them: cases by name, their spacing, one label file a case.

Called by ``commands.from_nnunet``.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from connectomics.core.errors import ConfigError, OutputError, VolumeError
from connectomics.core.files import replacing, write_text
from connectomics.core.geometry import BlockGrid
from connectomics.volumes.formats.images import open_image
from connectomics.volumes.formats.nifti import ITK, RAS
from connectomics.volumes.formats.tiff import open_tiff
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.nnunet.nifti import (
    NIBABEL_TURNED,
    NIFTI_READERS,
    SIMPLE_ITK,
    NiftiGeometry,
    header_of,
    holds,
    write_nifti,
)
from connectomics.volumes.opening import open_volume
from connectomics.volumes.reoriented import ReorientedVolume
from connectomics.volumes.source import Source, three_positive
from connectomics.volumes.volume import Array, VolumeReader

IMAGES, TIFFS = "NaturalImage2DIO", "Tiff3DIO"
ENDINGS = {
    IMAGES: (".png", ".bmp", ".tif", ".tiff"),
    TIFFS: (".tif", ".tiff"),
    **dict.fromkeys(NIFTI_READERS, (".nii.gz", ".nii")),
}
CLASSIC_TIFF_BYTES = 3_500_000_000
SLAB_BYTES = 256 << 20
Spacing3 = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class FileKind:
    """How a dataset's files are read: nnU-Net's class, from plans.json, and the ending of all, from dataset.json."""

    reader: str
    ending: str

    def __post_init__(self) -> None:
        if self.form not in ENDINGS.get(self.reader, ()):
            known = "; ".join(f"{', '.join(endings)} with {reader}" for reader, endings in ENDINGS.items())
            raise ConfigError(
                f"the dataset's files are {self.ending} read by {self.reader}, which from-nnunet does not read yet "
                f"(it has {known}); convert the volumes and use infer-volume, or use nnU-Net itself for this dataset"
            )

    @property
    def form(self) -> str:
        """The ending that says how a file is read and written: nnU-Net does not look at its case."""
        return self.ending.lower()

    @property
    def axes(self) -> str | None:
        """What is stated of the files' axes; None leaves it to the file."""
        return "zyx" if self.reader == TIFFS else None

    @property
    def inner(self) -> str:
        """What stands behind a file's name so that its axes and voxels are the reader's."""
        return {NIBABEL_TURNED: f"::{RAS}", SIMPLE_ITK: f"::{ITK}"}.get(self.reader, "")


def list_cases(folder: Path, kind: FileKind) -> list[VolumeSource]:
    """Cases of a folder sorted by name; ``CASE_0000.png``, ``CASE_0001.png`` … are the files of one.

    Raises ConfigError if there is none, or a file with this ending has no channel number.
    """
    ending = kind.ending
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(ending) and path.is_file())
    except OSError as error:
        raise ConfigError(f"-i {folder}: cannot be listed ({error.strerror}); give a folder of images") from error
    if not names:
        other = _other_endings(folder, ending)
        raise ConfigError(f"-i {folder}: holds no *{ending}, which is the ending of this model's dataset{other}")
    numbered = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}", re.DOTALL)
    files: dict[str, list[str]] = {}
    for name in names:
        match = numbered.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"-i {folder}: {name} has no channel number; nnU-Net expects CASE_0000{ending}, with _0001 and so on "
                "for further channels; rename or move it"
            )
        files.setdefault(match[1], []).append(name)
    return [_case(folder, case, files[case], kind) for case in sorted(files)]


def _other_endings(folder: Path, ending: str) -> str:
    """What to do where the files' endings are written otherwise than the dataset's, which nnU-Net tells apart."""
    names = [path.name for path in folder.iterdir()]
    found = sorted({name[-len(ending) :] for name in names if name.lower().endswith(ending.lower())})
    return f"; it has {', '.join(found)}, so rename these files to *{ending}" if found else ""


def _case(folder: Path, case: str, names: list[str], kind: FileKind) -> VolumeSource:
    expected = [f"{case}_{c:04d}{kind.ending}" for c in range(len(names))]
    problem = "" if names == expected else f"{folder / case}: found {', '.join(names)}, expected {', '.join(expected)}"
    return VolumeSource(case, case, tuple(str(folder / name) + kind.inner for name in names), problem)


def require_single_image(source: VolumeSource) -> None:
    """Refuse, by a VolumeError, what nnU-Net's reader of single images cannot take: stacks, and grey with alpha."""
    for uri in source.uris:
        volume = open_volume(uri)
        volume.close()
        if volume.info.extent[0] > 1:
            raise VolumeError(
                f"{uri}: holds {volume.info.extent[0]} sections, but the model's dataset is one of single images "
                f"({IMAGES}); label stacks with infer-volume"
            )
        if volume.info.channels not in (1, 3, 4):
            raise VolumeError(
                f"{uri}: holds {volume.info.channels} channels, but nnU-Net's reader of single images ({IMAGES}) takes "
                "grey, RGB or RGBA; write each channel as a grey image of its own"
            )


def stated_spacing(source: VolumeSource, ending: str) -> Spacing3 | None:
    """(z, y, x) from ``CASE.json`` beside the images, in nnU-Net's unit; None where there is no such file.

    Raises VolumeError if the file does not state three positive numbers.
    """
    path = Path(source.uris[0][: -len(ending) - 5] + ".json")
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text())["spacing"]
        numbers = three_positive(stated)
    except (OSError, ValueError, LookupError, TypeError):
        numbers = None
    if numbers is None:
        raise VolumeError(
            f'{path}: does not state the spacing; expected {{"spacing": [z, y, x]}}, three positive numbers'
        )
    return numbers


def write_spacing(path: Path, spacing: Spacing3) -> None:
    """``CASE.json`` beside a TIFF of labels, as nnU-Net leaves it."""
    write_text(path, json.dumps({"spacing": list(spacing)}, indent=4))


def copy_descriptions(model: Path, folder: Path) -> None:
    """Put ``dataset.json`` and ``plans.json`` beside the labels, where nnU-Net's post-processing looks for them.

    Several parts of one prediction may do so at a time. Raises OutputError if the folder refuses.
    """
    for name in ("dataset.json", "plans.json"):
        temporary = folder / f".{name}.{secrets.token_hex(8)}.partial"
        try:
            temporary.write_bytes((model / name).read_bytes())
            temporary.replace(folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{folder / name}: cannot be written ({error.strerror}); choose another -o") from error


def write_labels(labels: VolumeReader, path: Path, kind: FileKind, frame: NiftiGeometry | None = None) -> None:
    """Write labels of one channel as nnU-Net would leave them: uint8 where all are below 255, else uint16.

    The file is read back and compared, and appears under its name when it is complete; the OutputError says if that
    gives other voxels, or the format cannot hold them. ``frame`` is that of the image, for NIfTI.
    """
    largest = max(int(slab.max()) for slab in _slabs(labels))
    dtype = np.dtype(np.uint8 if largest < 255 else np.uint16)
    with replacing(path) as temporary:
        if frame is not None:
            same = _write_nifti(labels, temporary, dtype, kind, frame=frame)
        else:
            same = _write_picture(labels, temporary, dtype, kind)
        if not same:
            raise OutputError(f"{path}: reads back with other voxels than were written; check the disk, run again")


def _write_nifti(labels: VolumeReader, path: Path, dtype: np.dtype[Any], kind: FileKind, frame: NiftiGeometry) -> bool:
    stored = labels if frame.turn is None else ReorientedVolume(labels, frame.turn.inverse)
    header = header_of(frame, stored.info.extent, dtype)
    packed = kind.form.endswith(".gz")
    write_nifti(path, header, (slab.astype(dtype) for slab in _slabs(stored)), packed=packed)
    return holds(path, header, (slab.astype(dtype) for slab in _slabs(stored)), packed=packed)


def _write_picture(labels: VolumeReader, path: Path, dtype: np.dtype[Any], kind: FileKind) -> bool:
    if kind.reader == TIFFS:
        _write_stack(labels, path, dtype)
    else:
        _write_image(next(_slabs(labels))[0].astype(dtype), path, kind.form)
    source = Source(str(path), path, axes=kind.axes)
    written = open_image(source) if kind.form in (".png", ".bmp") else open_tiff(source)
    try:
        same = written.info.shape == labels.info.shape and written.info.dtype == dtype
        pairs = zip(_slabs(labels), _slabs(written, like=labels), strict=True)
        return same and all(np.array_equal(a, b) for a, b in pairs)
    finally:
        written.close()


def _write_stack(labels: VolumeReader, path: Path, dtype: np.dtype[Any]) -> None:
    extent = labels.info.extent
    big = int(np.prod(extent)) * dtype.itemsize > CLASSIC_TIFF_BYTES
    with tifffile.TiffWriter(path, bigtiff=big) as writer:
        sections = (section.astype(dtype) for slab in _slabs(labels) for section in slab)
        writer.write(sections, shape=extent, dtype=dtype, photometric="minisblack", compression="zlib")


def _write_image(section: Array, path: Path, ending: str) -> None:
    if ending in (".tif", ".tiff"):
        tifffile.imwrite(path, section, photometric="minisblack")
    else:
        Image.fromarray(section).save(path, format=ending[1:])


def _slabs(volume: VolumeReader, like: VolumeReader | None = None) -> Iterator[Array]:
    """Whole sections (z, y, x) of the first channel, as many at a time as one chunk of ``like`` is deep."""
    info = (like or volume).info
    depth, height, width = info.extent
    deep = min(depth, max(1, min(info.chunk_shape[0], SLAB_BYTES // (height * width * info.dtype.itemsize))))
    return (volume.read(block.core)[0] for block in BlockGrid(info.extent, (deep, height, width)))
