"""``open_volume``: from a name to a reader; ``input_formats`` knows which format a name means.

Formats are imported when first needed, so a run that reads HDF5 never loads a TIFF codec.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.core.places import refusal
from connectomics.volumes.formats.signatures import KNOSSOS_MARKERS, converter, suffix_by_content
from connectomics.volumes.input_formats import (
    READERS,
    STACK,
    InputFormat,
    input_formats,
    long_suffixes,
    name_of,
    suffixes,
)
from connectomics.volumes.opened import OpenedVolume
from connectomics.volumes.source import Source, is_folder, path_and_inner, reason, three_positive, without_prefix
from connectomics.volumes.volume import Array, Nanometres, Spacing, VolumeInfo, VolumeReader


def open_volume(
    uri: str | os.PathLike[str],
    *,
    axes: str | None = None,
    voxel_size_nm: Sequence[float] | None = None,
    channels: int | None = None,
) -> OpenedVolume:
    """Open a volume for lazy reading; its format follows from the name.

    Parameters
    ----------
    uri
        A path, ``path::inner`` (an HDF5 dataset, a Zarr or N5 level or array, a precomputed scale, a TIFF series),
        either behind ``precomputed://``, or a ``phantom:`` URI.
    axes
        One letter out of c, z, y, x for each axis of the stored array, overriding what the file says. For a
        folder of images: "zyx" makes each file a section, "cyx" each file a channel.
    voxel_size_nm
        (z, y, x) in nanometres, overriding what the file says.
    channels
        How many are expected. Images whose colours are equal everywhere are grey, one channel, unless as many as
        there are colours are expected.

    Returns
    -------
    OpenedVolume
        A reader and an array (c, z, y, x): ``read(box)``, ``volume[0, :10]``, ``np.asarray(volume)``.

    Raises
    ------
    VolumeError
        If the volume cannot be opened; the message names it and says what was found.

    Examples
    --------
    >>> open_volume("phantom:64x1024x1024?seed=7").info.shape
    (1, 64, 1024, 1024)
    """
    uri, size = _text(uri), _size(voxel_size_nm)
    if axes is not None and not isinstance(axes, str):
        raise VolumeError(f"cannot open {uri}: axes are {axes!r:.80}, expected letters out of c, z, y, x, as 'zyx'.")
    if uri.startswith("phantom:"):
        from connectomics.volumes.phantom.volume import open_phantom

        return OpenedVolume(open_phantom(uri), uri, "phantom")
    prefix, local = without_prefix(uri)
    if why := refusal(local):
        raise VolumeError(f"cannot open {uri}: {why}.")
    name, inner = path_and_inner(local)
    source = Source(uri, Path(name), inner or None, axes, voxel_size_nm=size, channels=channels)
    form = _stated_precomputed(source) if prefix else _format_of(source)
    return OpenedVolume(form.open(source), uri, name_of(form))


def _text(uri: object) -> str:
    """The name of a volume."""
    text = os.fspath(uri) if isinstance(uri, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise VolumeError(f"cannot open {uri!r:.80}: it names no volume; give a path as str or pathlib.Path.")
    return text


def _size(stated: object) -> Nanometres | None:
    """A voxel size that somebody stated."""
    size = None if stated is None else three_positive(stated)
    if stated is not None and size is None:
        raise VolumeError(f"voxel_size_nm is {stated!r:.80}, expected three positive numbers (z, y, x) in nanometres.")
    return size


def open_channels(
    uris: Sequence[str | os.PathLike[str]], *, axes: str | None = None, voxel_size_nm: Sequence[float] | None = None
) -> OpenedVolume:
    """Open several volumes of the same extent as the channels of one, in the order given.

    As nnU-Net's readers do it, channels of different dtypes become float32, and spacings agree where they are equal
    within numpy's tolerance (a share of 1e-5).

    Parameters
    ----------
    uris
        At least one volume, as for ``open_volume``; a volume of several channels contributes all of them.
    axes, voxel_size_nm
        As for ``open_volume``, for each of them.

    Raises
    ------
    VolumeError
        If one cannot be opened, or its extent, or the voxel size or spacing that it states, differs from the first's.
    """
    if not uris:
        raise VolumeError("no volume was named; give at least one for the first channel.")
    readers: list[OpenedVolume] = []
    try:
        for uri in uris:
            readers.append(open_volume(uri, axes=axes, voxel_size_nm=voxel_size_nm))
            for other in readers[:-1]:
                _require_alike(other.uri, other.info, readers[-1].uri, readers[-1].info)
    except VolumeError:
        for reader in readers:
            reader.close()
        raise
    if len(readers) == 1:
        return readers[0]
    return OpenedVolume(_Channels(readers), f"{readers[0].uri} and its other channels", readers[0].format)


class _Channels:
    """Volumes of one extent, stacked along c; float32 where their dtypes differ."""

    def __init__(self, readers: Sequence[VolumeReader]) -> None:
        self._readers = list(readers)
        infos = [reader.info for reader in readers]
        self.info = dataclasses.replace(
            infos[0],
            shape=(sum(info.channels for info in infos), *infos[0].extent),
            dtype=infos[0].dtype if len({info.dtype for info in infos}) == 1 else np.dtype(np.float32),
            voxel_size_nm=_first(info.voxel_size_nm for info in infos),
            spacing=_first(info.spacing for info in infos),
        )

    @property
    def identity(self) -> dict[str, object]:
        return {"channels": [reader.identity for reader in self._readers]}

    def read(self, box: Box) -> Array:
        block: Array = np.concatenate(
            [reader.read(box) for reader in self._readers], dtype=self.info.dtype, casting="unsafe"
        )
        return block

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _first(stated: Iterable[Spacing | None]) -> Spacing | None:
    return next((value for value in stated if value is not None), None)


def _require_alike(first_uri: str, first: VolumeInfo, uri: str, info: VolumeInfo) -> None:
    pairs = ((first.voxel_size_nm, info.voxel_size_nm), (first.spacing, info.spacing))
    if first.extent != info.extent or not all(a is None or b is None or np.allclose(a, b) for a, b in pairs):
        raise VolumeError(
            f"{uri} cannot be a channel beside {first_uri}: (z, y, x), voxel size and spacing are "
            f"{(info.extent, info.voxel_size_nm, info.spacing)}, expected "
            f"{(first.extent, first.voxel_size_nm, first.spacing)}; all channels must agree."
        )


def _format_of(source: Source) -> InputFormat:
    suffix = _suffix(source.path)
    files, folders = suffixes(folders=False), suffixes(folders=True)
    if is_folder(source):
        for form in input_formats():
            if form.markers is not None and (suffix in form.suffixes or _holds(source, form.markers)):
                return form
        if _holds(source, KNOSSOS_MARKERS):
            raise VolumeError(
                f"cannot open {source.uri}: a KNOSSOS cube data set is not read; convert it: "
                f"webknossos convert-knossos {source.path.name} {source.path.name}_wkw"
            )
        if suffix in files:
            raise VolumeError(
                f"cannot open {source.uri}: a folder, where {suffix} promises a file; rename or correct it."
            )
        return STACK
    if suffix in folders:
        raise VolumeError(f"cannot open {source.uri}: a file, where {suffix} promises a folder; unpack or correct it.")
    if suffix not in files:
        suffix = _by_content(source, suffix)
    if suffix not in files:
        raise VolumeError(
            f"cannot open {source.uri}: unknown format {suffix or 'without suffix'!r}; known are "
            f"{', '.join(files + folders)}, a precomputed folder, a folder of images, or phantom:."
        )
    return next(form for form in input_formats() if suffix in form.suffixes)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in long_suffixes() if name.endswith(suffix)), path.suffix.lower())


def _by_content(source: Source, suffix: str) -> str:
    """The suffix that a file's first bytes promise, else its own; a VolumeError if such files are not read."""
    try:
        found = suffix_by_content(source.path)
    except OSError as error:
        raise VolumeError(f"cannot open {source.uri}: {reason(error)}.") from error
    for one in (suffix, found):
        if why := converter(source.path.name, one):
            raise VolumeError(f"cannot open {source.uri}: {why}.")
    return found or suffix


def _stated_precomputed(source: Source) -> InputFormat:
    if not is_folder(source):
        raise VolumeError(f"cannot open {source.uri}: a file, where precomputed:// promises a folder; correct it.")
    return READERS.load("precomputed")


def _holds(source: Source, names: Sequence[str]) -> bool:
    try:
        return any((source.path / name).exists() for name in names)
    except OSError as error:
        raise VolumeError(f"cannot open {source.uri}: {reason(error)}.") from error
