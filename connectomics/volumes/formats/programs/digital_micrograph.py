"""Gatan DigitalMicrograph's ``.dm3`` and ``.dm4`` through RosettaSciIO; needs the extra ``dm``; for ``opening``."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.installation import install_command
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import READ_ERRORS, Source, three_positive, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, native_dtype
from connectomics.volumes.volume import Array, Nanometres
from connectomics.volumes.watched import WatchedFiles


def open_dm(source: Source) -> StoredVolume:
    """Open the image of a DigitalMicrograph file, or with ``::1`` the second one, for lazy reading.

    Raises
    ------
    VolumeError
        If the file is damaged, holds no image or several, is a spectrum, has complex voxels or colours, or the package
        rosettasciio is missing.
    """
    try:
        from rsciio import digitalmicrograph, exceptions
    except ImportError as error:
        raise VolumeError(
            f"cannot open {source.uri}: reading DM3 and DM4 needs the package rosettasciio: {install_command('dm')}"
        ) from error
    errors: tuple[type[Exception], ...] = (*_errors(vars(exceptions)), *READ_ERRORS)
    try:
        watched = WatchedFiles(source.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that are not used
            images = digitalmicrograph.file_reader(str(source.path), lazy=True)
        image, number = _chosen(source, images)
        axes = sorted(image["axes"], key=lambda axis: int(axis["index_in_array"]))
        data = image["data"]
        native_dtype(source, data.dtype)
        layout = layout_of(source, data.shape, _letters(axes, len(data.shape)), "its dimensions")
        info = info_of(
            source,
            layout,
            data.dtype,
            data.chunksize,
            voxel_size_nm=_voxel_size(source, layout.letters, axes),
            found={"voxel size": "its calibration"},
        )
    except errors as error:
        raise unreadable(source, "DigitalMicrograph", error) from error

    def fetch(index: tuple[slice, ...]) -> Array:
        return np.array(data[index].compute(scheduler="synchronous"))

    def identity() -> dict[str, object]:
        return watched.identity | ({} if source.inner is None else {"image": number})

    return StoredVolume(source, info, layout, fetch=fetch, identity=identity, release=lambda: None, watched=watched)


def _errors(names: dict[str, Any]) -> tuple[type[Exception], ...]:
    """The kinds of error among the names of a module; many of theirs are no ValueError."""
    kinds = [kind for kind in names.values() if isinstance(kind, type)]
    return tuple(kind for kind in kinds if issubclass(kind, Exception))


def _chosen(source: Source, images: list[Any]) -> tuple[Any, int]:
    if not images:
        raise VolumeError(f"{source.uri}: the DigitalMicrograph file holds no image.")
    wanted = source.inner or ("0" if len(images) == 1 else "")
    if wanted.isdecimal() and int(wanted) < len(images):
        return images[int(wanted)], int(wanted)
    shapes = ", ".join(str(tuple(image["data"].shape)) for image in images[:4])
    raise VolumeError(
        f"{source.uri}: the file holds {len(images)} images, of shape {shapes}; name one by its number from 0, as "
        f"{source.path.name}::0."
    )


def _letters(axes: list[Any], dimensions: int) -> str:
    """The names of the axes where they are those of space; any other one, such as of energies, is no volume's."""
    names = [str(axis.get("name")).lower() for axis in axes]
    usual = {2: ["y", "x"], 3: ["z", "y", "x"]}.get(dimensions, [])
    return "".join(usual) if names == usual else "".join(name if name in ("z", "y", "x") else "?" for name in names)


def _voxel_size(source: Source, letters: str, axes: list[Any]) -> Nanometres | None:
    """Each axis has a unit of its own; ``A`` is ångström."""
    sizes = {}
    for letter, axis in zip(letters, axes, strict=True):
        unit = "angstrom" if axis["units"] == "A" else axis["units"]
        factor = nanometres(source, unit, f"the unit of axis {letter}")
        sizes[letter] = math.nan if factor is None else float(axis["scale"]) * factor
    return three_positive([sizes.get(letter, math.nan) for letter in "zyx"])
