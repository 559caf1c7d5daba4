"""Final outputs by format: names, what each can hold, stamps, sizes, and the writing of those that are one file.

Everything is written under a temporary name, read back, compared with the store and renamed; memory holds a
piece at most. The stamp (the result key and what belongs to it) alone says what a finished output is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import OutputError
from connectomics.core.features import OUTPUT_FORMATS
from connectomics.core.files import discard, sync_tree
from connectomics.core.geometry import Vec3
from connectomics.stages.output.formats.contract import (
    UNIT_BYTES,
    ChunkedFormat,
    FileFormat,
    Multiscale,
    OutputFormat,
    WholeVolume,
)
from connectomics.stages.output.size import FILE_BYTES, STAMP_BYTES, OutputSize
from connectomics.stages.output.slabs import EXPORT_COPIES
from connectomics.volumes.source import READ_ERRORS, Source, reason
from connectomics.volumes.volume import VolumeInfo

FORMATS = OUTPUT_FORMATS.names()


def output_format(name: str) -> OutputFormat:
    """The format of a name; a ConfigError that names those there are, if there is none."""
    found: OutputFormat = OUTPUT_FORMATS.load(name)
    return found


def export_path(folder: Path, stem: str, format: str) -> Path:
    """The final name of an output.

    Examples
    --------
    >>> export_path(Path("out"), "a_seg", "tiff").as_posix()
    'out/a_seg.tif'
    """
    return folder / (stem + output_format(format).suffix)


def formats_holding(formats: Sequence[str], channels: int, dtype: np.dtype[Any]) -> tuple[str, ...]:
    """Those of the formats that can hold voxels of such a type.

    Examples
    --------
    >>> formats_holding(["h5", "png"], 1, np.dtype(np.uint32))
    ('h5',)
    """
    voxel = VolumeInfo((channels, 1, 1, 1), dtype, (1, 1, 1), (1.0, 1.0, 1.0))
    return tuple(format for format in formats if not output_format(format).refusal(voxel, None))


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
    why = output_format(format).refusal(info, budget_bytes)
    if why:
        raise OutputError(f"{path}: {why}")


def export_file(
    source: WholeVolume, place: Path, format: str, stamp: dict[str, object], path: Path | None = None
) -> None:
    """Write a volume as a file or a stack, verified and on the disk.

    Parameters
    ----------
    source
        The complete working store, or a small volume in memory.
    place
        Where it is written; what stands there is replaced, and nothing is left there where that fails.
    format
        The name of a ``FileFormat``.
    stamp
        JSON-able facts that ``read_stamp`` gives back.
    path
        Final name, for messages, where that is another.

    Raises
    ------
    OutputError
        If the format cannot hold the volume, the storage refuses, or reading back gives other voxels.
    """
    path = path or place
    require_exportable(source.info, path, format)
    kind = output_format(format)
    assert isinstance(kind, FileFormat), f"{format} is written block by block"
    whole = False
    try:
        discard(place)
        kind.write(source, place, stamp)
        _compare(source, place, kind, path)
        sync_tree(place)
        whole = True
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run "
            f"again; the computed blocks are kept in {source.path}."
        ) from error
    finally:
        if not whole:
            discard(place)


def _compare(source: WholeVolume, temporary: Path, kind: FileFormat, path: Path) -> None:
    """Read a written file back and compare every voxel, bit for bit, with the store."""
    info = source.info
    written = kind.open(Source(str(temporary), temporary, axes="zyx" if info.channels == 1 else "czyx"))
    try:
        expected = (info.shape, info.dtype)
        if (written.info.shape, written.info.dtype) != expected:
            raise OutputError(f"{path} reads back as {written.info.shape} {written.info.dtype}, expected {expected}.")
        for slab in kind.parts(info):
            if source.read(slab).tobytes() != written.read(slab).tobytes():
                raise OutputError(
                    f"{path} reads back with other voxels in {slab.start} to {slab.stop} than were "
                    f"written; check the disk and run again, the computed blocks are kept in {source.path}."
                )
    finally:
        written.close()


def multiscale_of(
    format: str, info: VolumeInfo, block_shape: Vec3, path: Path, *, labels: bool, levels: int | None = None
) -> Multiscale:
    """The pyramid of a volume in a chunked format.

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
    kind = output_format(format)
    assert isinstance(kind, ChunkedFormat), f"{format} is a file"
    return kind.multiscale(info, block_shape, labels=labels, levels=levels)


def largest_size(info: VolumeInfo, format: str, shard: Vec3, *, labels: bool, levels: int | None = None) -> OutputSize:
    """Upper bound of an output's size.

    Parameters
    ----------
    info
        The output: its chunks are those of the working store.
    format
        One that can hold it.
    shard
        Shape (z, y, x) of the working store's shards, which are the blocks of the run.
    labels, levels
        As for ``multiscale_of``.

    Raises
    ------
    OutputError
        If the format cannot hold such a volume.
    """
    kind = output_format(format)
    if isinstance(kind, FileFormat):
        return kind.largest_size(info)
    image = multiscale_of(format, info, shard, Path(format), labels=labels, levels=levels)
    return sum(map(image.level_size, image.levels), OutputSize(STAMP_BYTES + FILE_BYTES, 3))


def exporting_bytes(extent: Vec3, voxel_bytes: int, formats: Sequence[str]) -> int:
    """Most memory that writing and comparing exports takes."""
    section = extent[1] * extent[2] * voxel_bytes
    held = [output_format(format).held_bytes(section) for format in formats]
    return EXPORT_COPIES * min(extent[0] * section, max(held, default=UNIT_BYTES))


def read_stamp(path: Path, format: str) -> dict[str, object] | None:
    """The stamp of a finished output, or None where the output or its stamp is absent or unreadable."""
    try:
        stamp = output_format(format).stamp_of(path)
    except READ_ERRORS:
        return None
    return stamp if isinstance(stamp, dict) else None
