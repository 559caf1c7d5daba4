"""Final outputs by format: names, what each can hold, stamps, and the writing of those that are one file or a stack.

Everything is written under a temporary name, read back, compared with the store and renamed; memory holds a
piece at most. The stamp (the result key and what belongs to it) alone says what a finished output is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from connectomics.core.errors import OutputError
from connectomics.core.files import replacing
from connectomics.core.geometry import Vec3
from connectomics.stages.output.multiscale.contract import UNIT_BYTES, Multiscale
from connectomics.stages.output.multiscale.n5 import N5Levels, stamp_of_n5
from connectomics.stages.output.multiscale.precomputed import (
    PrecomputedLevels,
    precomputed_levels,
    stamp_of_precomputed,
)
from connectomics.stages.output.multiscale.zarr import Zarr2Levels, Zarr3Levels, stamp_of_zarr2, stamp_of_zarr3
from connectomics.stages.output.single_file import (
    SLAB_BYTES,
    compare_file,
    section_bytes,
    stamp_of_hdf5,
    stamp_of_png,
    stamp_of_tiff,
    write_file,
)
from connectomics.volumes.levels import Level, plan_levels
from connectomics.volumes.source import READ_ERRORS, reason
from connectomics.volumes.store import Store
from connectomics.volumes.volume import VolumeInfo

SUFFIXES = {
    "h5": ".h5",
    "tiff": ".tif",
    "png": "_png",
    "zarr": ".zarr",
    "zarr2": ".v2.zarr",
    "n5": ".n5",
    "precomputed": ".precomputed",
}
FORMATS = tuple(SUFFIXES)
PYRAMIDS = ("zarr", "zarr2", "n5", "precomputed")
EXPORT_COPIES = 4  # of what is held at once: as read, as written or encoded, and both again when it is compared
STAMPS: dict[str, Callable[[Path], object]] = {
    "h5": stamp_of_hdf5,
    "tiff": stamp_of_tiff,
    "png": stamp_of_png,
    "zarr": stamp_of_zarr3,
    "zarr2": stamp_of_zarr2,
    "n5": stamp_of_n5,
    "precomputed": stamp_of_precomputed,
}


def export_path(folder: Path, stem: str, format: str) -> Path:
    """The final name of an output.

    Examples
    --------
    >>> export_path(Path("out"), "a_seg", "tiff").as_posix()
    'out/a_seg.tif'
    """
    return folder / (stem + SUFFIXES[_known(format)])


def require_exportable(info: VolumeInfo, path: Path, format: str, budget_bytes: int | None = None) -> None:
    """Make sure that ``format`` can hold such a volume; worth asking before hours of computing.

    Parameters
    ----------
    budget_bytes
        Host memory, where it is bounded.

    Raises
    ------
    OutputError
        Saying which formats can.
    """
    labels = info.channels == 1 and info.dtype in (np.uint8, np.uint16)
    if _known(format) == "png" and not labels:
        raise OutputError(
            f"{path}: png holds one channel of uint8 or uint16, not {info.channels} of {info.dtype}; use "
            "another of inference.output.formats."
        )
    need = EXPORT_COPIES * section_bytes(info)
    if format == "png" and budget_bytes is not None and need > budget_bytes:
        raise OutputError(
            f"{path}: png holds whole sections, and writing one of {info.extent[1:]} pixels takes about "
            f"{need / 1e9:.2f} GB, the memory budget is {budget_bytes / 1e9:.2f} GB; use tiff or a chunked format, or "
            "raise system.memory_budget_gb."
        )
    if format == "precomputed" and info.voxel_size_nm is None:
        raise OutputError(
            f"{path}: precomputed states voxel sizes in nanometres, and the volume states none; set "
            "inference.voxel_size_nm=[z,y,x]."
        )


def export_file(source: Store, path: Path, format: str, stamp: dict[str, object]) -> None:
    """Write the store as a file or a stack, verified, under a name that appears only when complete.

    Parameters
    ----------
    source
        The complete working store.
    path
        Final name, see ``export_path``; what stands there is replaced.
    format
        One of ``FORMATS`` that is none of ``PYRAMIDS``.
    stamp
        JSON-able facts that ``read_stamp`` gives back.

    Raises
    ------
    OutputError
        If the format cannot hold the volume, the storage refuses, or reading back gives other voxels.
    """
    require_exportable(source.info, path, format)
    try:
        with replacing(path) as temporary:
            write_file(source, temporary, format, stamp)
            compare_file(source, temporary, format, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run "
            f"again; the computed blocks are kept in {source.path}."
        ) from error


def multiscale_of(
    format: str, info: VolumeInfo, block_shape: Vec3, path: Path, *, labels: bool, levels: int | None = None
) -> Multiscale:
    """The pyramid of a volume in one of ``PYRAMIDS``.

    Parameters
    ----------
    info
        Level 0.
    block_shape
        (z, y, x) of the run's blocks, which are the shards of the working store.
    path
        Final name, for messages.
    labels
        Whether it is a segmentation.
    levels
        How many at most; None for all there are.

    Raises
    ------
    OutputError
        If the format cannot hold the volume.
    """
    require_exportable(info, path, format)
    if format == "precomputed" and info.voxel_size_nm is not None:
        size = info.voxel_size_nm
        return PrecomputedLevels(info, size, precomputed_levels(info, size)[:levels], labels)
    planned: tuple[Level, ...] = plan_levels(info)[:levels]
    if format == "n5":
        return N5Levels(info, planned)
    return Zarr3Levels(info, planned, block_shape) if format == "zarr" else Zarr2Levels(info, planned)


def exporting_bytes(extent: Vec3, voxel_bytes: int, formats: Sequence[str]) -> int:
    """Most memory that writing and comparing exports takes; PNG alone needs whole sections.

    Zarr v3 alone is written part by part, however large its shards are.
    """
    section = extent[1] * extent[2] * voxel_bytes
    volume = extent[0] * section
    if not set(formats) - {"zarr"}:
        return EXPORT_COPIES * min(volume, UNIT_BYTES)
    return EXPORT_COPIES * min(volume, max(SLAB_BYTES, section if "png" in formats else 0))


def read_stamp(path: Path, format: str) -> dict[str, object] | None:
    """The stamp of a finished output, or None where the output or its stamp is absent or unreadable."""
    try:
        stamp = STAMPS[_known(format)](path)
    except READ_ERRORS:
        return None
    return stamp if isinstance(stamp, dict) else None


def _known(format: str) -> str:
    if format not in FORMATS:
        raise OutputError(f"unknown output format {format!r}; known are {', '.join(FORMATS)}.")
    return format
