"""Image volumes: a folder of PNG, TIFF, JPEG or BMP sections, or a single image; called by ``opening``.

Pixels are those of ``skimage.io.imread``, which nnU-Net trains on: palettes expanded, colours as channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import natsort
import numpy as np
from PIL import BmpImagePlugin, ImageFile, ImageMode, JpegImagePlugin, PngImagePlugin

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.formats.grey import LOOKED_AT, is_grey, may_be_one_channel, one_channel
from connectomics.volumes.formats.sections import notes_on, sections_of
from connectomics.volumes.formats.tiff import open_tiff
from connectomics.volumes.source import READ_ERRORS, Source, file_identity, folded_identity, reason, unreadable
from connectomics.volumes.stored import Layout, RecentArrays, StoredVolume, info_of, native_dtype
from connectomics.volumes.volume import Array

FORMAT_OF_SUFFIX = {".png": "png", ".tif": "tiff", ".tiff": "tiff", ".jpg": "jpeg", ".jpeg": "jpeg", ".bmp": "bmp"}

_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89P": PngImagePlugin.PngImageFile,
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}
_TIFF_MAGIC = (b"II", b"MM")
_LARGEST_RATIO = 1 << 14  # the best of these formats pack 8256 voxels into a byte
_SMALL_VOXELS = 1 << 28


@dataclass(frozen=True, slots=True)
class _ImageHeader:
    """What an image file says of its pixels."""

    channels: int
    height: int
    width: int
    dtype: np.dtype[Any]


def open_image(source: Source) -> StoredVolume:
    """Open one PNG, JPEG or BMP image as a volume of one section.

    Raises
    ------
    VolumeError
        If it cannot be decoded or the stated axes do not fit it.
    """
    header = _header(source, source.path)
    grey = _saved_as_colour(source, [source.path], header.channels)
    dims = 2 if header.channels == 1 or grey else 3
    if source.axes is not None and (len(source.axes) != dims or not {"y", "x"} <= set(source.axes) <= set("cyx")):
        raise VolumeError(
            f"{source.uri}: the axes {source.axes!r} do not fit an image of {dims} axes; state "
            f"inference.axes={'yx' if dims == 2 else 'cyx'}, or null."
        )
    return _open_sections(source, [(source.path,)], header, grey=grey)


def open_stack(source: Source) -> StoredVolume:
    """Open a folder of images as a volume: natural order is z, ``_0000``, ``_0001`` suffixes of grey ones are channels.

    Raises
    ------
    VolumeError
        If there is no image, an image differs from the first in size or dtype, or a section lacks a channel.
    """
    if source.inner is not None:
        raise VolumeError(
            f"{source.uri}: a folder of images has no inner part {source.inner!r}; name the folder alone."
        )
    images = _listed(source)
    header = _header(source, images[0])
    grey = _saved_as_colour(source, images, header.channels)
    sections = sections_of(source, images, colours=header.channels > 1 and not grey)
    first = sections[0][0]
    return _open_sections(source, sections, header if first == images[0] else _header(source, first), grey=grey)


def _listed(source: Source) -> list[Path]:
    """The images of the folder in natural order."""
    try:
        entries = [path for path in source.path.iterdir() if not path.name.startswith(".") and not path.is_dir()]
    except OSError as error:
        raise VolumeError(f"cannot list {source.uri}: {reason(error)}.") from error
    images = [path for path in entries if path.suffix.lower() in FORMAT_OF_SUFFIX]
    formats = sorted({FORMAT_OF_SUFFIX[path.suffix.lower()] for path in images})
    if not images:
        raise VolumeError(
            f"{source.uri}: no image among the {len(entries)} files of the folder; expected "
            f"{', '.join(FORMAT_OF_SUFFIX)}."
        )
    if len(formats) > 1:
        raise VolumeError(f"{source.uri}: images of different formats ({', '.join(formats)}) in one folder; keep one.")
    return natsort.natsorted(images, key=lambda path: path.name)


def _saved_as_colour(source: Source, images: Sequence[Path], samples: int) -> bool:
    """Whether images with so many samples a pixel are grey: some of them, spread over all, are looked at."""
    if not may_be_one_channel(source, samples):
        return False
    step = max(1, len(images) // LOOKED_AT)
    try:
        return all(is_grey(_decoded(source, path)) for path in images[::step])
    except (VolumeError, *READ_ERRORS):
        return False  # what is damaged says so when it is read


def _open_sections(
    source: Source, sections: Sequence[tuple[Path, ...]], header: _ImageHeader, *, grey: bool
) -> StoredVolume:
    """Open images, the first of which has a header that all others must have."""
    turned = source.axes is not None and source.axes.index("x") < source.axes.index("y")
    first, *others = (path for section in sections for path in section)
    for path in others:
        found = _header(source, path)
        if found != header:
            raise VolumeError(
                f"{source.uri}: {path.name} is {_words(found)}, but {first.name} is {_words(header)}; "
                "all images of a volume must agree."
            )
    channels = (1 if grey else header.channels) * len(sections[0])
    if source.axes is not None and "c" not in source.axes and channels > 1:
        raise VolumeError(
            f"{source.uri}: {first.name} has {header.channels} colours, for which the axes "
            f"{source.axes!r} name no c axis; state inference.axes=c{source.axes}, or null."
        )
    height, width = (header.width, header.height) if turned else (header.height, header.width)
    files = "1 file" if len(sections[0]) == 1 else f"{len(sections[0])} files, one a channel"
    where = "inference.axes" if source.axes else f"names and colours of the files: each section is {files}"
    layout = Layout("czyx", (channels, len(sections), height, width), where)
    info = info_of(source, layout, header.dtype, (channels, 1, height, width))
    info = dataclasses.replace(info, notes=tuple(notes_on(sections)))
    recent = RecentArrays()

    def decoded(path: Path) -> Array:
        pixels = _decoded(source, path)
        return one_channel(pixels, 0, path.name) if grey else pixels

    def section(z: int) -> Array:
        pixels = np.concatenate([decoded(path) for path in sections[z]])
        if pixels.shape != (channels, header.height, header.width):
            raise ValueError(f"{sections[z][0].name} has changed since it was opened, to shape {pixels.shape}")
        return pixels.transpose(0, 2, 1) if turned else pixels

    def fetch(index: tuple[slice, ...]) -> Array:
        c, z, y, x = index
        result = np.empty([span.stop - span.start for span in index], header.dtype)
        for i in range(z.start, z.stop):
            result[:, i - z.start] = recent.get(i, functools.partial(section, i))[c, y, x]
        return result

    return StoredVolume(
        source, info, layout, fetch=fetch, identity=lambda: _identity(source, sections), release=recent.clear
    )


def _identity(source: Source, sections: Sequence[tuple[Path, ...]]) -> dict[str, object]:
    paths = [path for section in sections for path in section]
    if paths == [source.path]:
        return file_identity(source.path)
    return folded_identity(source.path.name, [(path.name, path) for path in paths])


def _words(header: _ImageHeader) -> str:
    return f"{header.height} × {header.width} {header.dtype} with {header.channels} channel(s)"


def _header(source: Source, path: Path) -> _ImageHeader:
    """What the file says of its pixels, without decoding them."""
    try:
        file_identity(path)  # refuses pipes, at which opening would wait for ever
        if _is_tiff(path):
            return _tiff_header(path)
        with _opened(path) as image:
            mode = ImageMode.getmode(_mode(image))
            width, height = image.size
        if width * height > max(_SMALL_VOXELS, path.stat().st_size * _LARGEST_RATIO):
            raise ValueError(f"its header promises {width} × {height} pixels, more than the file can hold")
    except READ_ERRORS as error:
        raise unreadable(source, f"an image ({path.name})", error) from error
    return _ImageHeader(len(mode.bands), height, width, native_dtype(source, np.dtype(mode.typestr)))


def _decoded(source: Source, path: Path) -> Array:
    """Pixels of an image file as (c, y, x)."""
    if _is_tiff(path):
        volume = open_tiff(Source(str(path), path), colours=True)
        try:
            return volume.read(Box.of_shape(volume.info.extent))[:, 0]
        finally:
            volume.close()
    try:
        with _opened(path) as image:
            mode = _mode(image)
            pixels: Array = np.asarray(image if image.mode == mode else image.convert(mode))
    except READ_ERRORS as error:
        raise ValueError(f"{path.name}: {reason(error)}") from error
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _tiff_header(path: Path) -> _ImageHeader:
    volume = open_tiff(Source(str(path), path), colours=True)
    volume.close()
    channels, sections, height, width = volume.info.shape
    if sections > 1:
        raise VolumeError(
            f"{path}: {sections} pages in one file of a folder of sections, so their order is ambiguous; "
            "open the file alone, or keep one page in each file."
        )
    return _ImageHeader(channels, height, width, volume.info.dtype)


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) in _TIFF_MAGIC


def _opened(path: Path) -> ImageFile.ImageFile:
    """The image with its header read; by its first bytes, and without Pillow's limit on pixels."""
    with path.open("rb") as stream:
        magic = stream.read(2)
    decoder = _DECODERS.get(magic)
    if decoder is None:
        raise ValueError(f"{path.name} starts with {magic!r}, not as a PNG, JPEG, BMP or TIFF file does")
    image = decoder(path)
    if image.custom_mimetype == "image/apng":
        image.close()
        raise ValueError(f"{path.name} is an animated PNG; write each frame as an image of its own")
    return image


def _mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name of the pixel type in which the image is handed out."""
    if image.mode == "P" and image.palette is not None:
        return image.palette.mode
    if image.mode == "I" and image.format == "PNG":
        return "I;16"
    return image.mode
