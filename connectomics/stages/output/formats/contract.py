"""What an output format is: one record in a file of its own, which ``core.features`` names and ``export`` asks.

A format is a file (or a stack of images), written at once, or chunked: a pyramid that is filled block by block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from connectomics.core.geometry import Box, Vec3
from connectomics.stages.output.formats.level_array import LevelArray
from connectomics.stages.output.size import OutputSize
from connectomics.stages.output.slabs import SLAB_BYTES
from connectomics.volumes.levels import Level
from connectomics.volumes.source import Source
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

UNIT_BYTES = 32 << 20
"""Uncompressed size of what is written at once, a shard where the format has them; OME-Zarr 0.5 has larger ones."""
STAMP_FILE = "connectomics.json"


def nothing_against(info: VolumeInfo, budget_bytes: int | None) -> str:
    """Find no reason why a volume could not be written."""
    return ""


def a_slab(section_bytes: int) -> int:
    """Hold a slab, however large a section is."""
    return SLAB_BYTES


class WholeVolume(Protocol):
    """What a file is written from: a complete working store, or a small volume in memory.

    ``path`` is the folder of the work, for messages; ``info.chunk_shape`` is that of the output's chunks.
    """

    @property
    def path(self) -> Path: ...

    @property
    def info(self) -> VolumeInfo: ...

    def read(self, box: Box) -> Array:
        """Voxels of a box as a new (c, z, y, x) array."""
        ...


@dataclass(frozen=True, slots=True)
class FileFormat:
    """An output that one writer makes at once: a file or a stack of images.

    Parameters
    ----------
    suffix
        Of the final name.
    write
        Write a complete volume at a path that is free, with a stamp, holding a part at a time; may raise OSError.
    open
        Open what was written, for comparing; the request states its axes: zyx of one channel, else czyx.
    parts
        Boxes that fill the volume, in which it is compared.
    stamp_of
        What ``write`` kept, as it was given; errors are those of reading files and JSON.
    largest_size
        Upper bound of the output of such a volume.
    refusal
        Why such a volume cannot be written, with the memory there is where that is bounded; else an empty text.
    held_bytes
        Most bytes of voxels that are held at once, where a section takes so many.
    """

    suffix: str
    write: Callable[[WholeVolume, Path, dict[str, object]], None]
    open: Callable[[Source], VolumeReader]
    parts: Callable[[VolumeInfo], Iterator[Box]]
    stamp_of: Callable[[Path], object]
    largest_size: Callable[[VolumeInfo], OutputSize]
    refusal: Callable[[VolumeInfo, int | None], str] = nothing_against
    held_bytes: Callable[[int], int] = a_slab


class Multiscale(Protocol):
    """A pyramid in one format: the layout of a folder that does not hold it yet, or does."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Return the levels, from level 0 on."""
        ...

    def files(self) -> dict[str, str]:
        """Metadata by name below the folder, of which it is made while empty; a name that ends in / is a folder."""
        ...

    def open(self, folder: Path, level: int) -> LevelArray:
        """A level, for reading and writing."""
        ...

    def stamped(self, stamp: dict[str, object], name: str) -> tuple[str, str]:
        """The file that completes the metadata, and its text: the facts that ``stamp_of`` gives back, the name."""
        ...

    def level_size(self, level: Level) -> OutputSize:
        """Upper bound of a level with its metadata."""
        ...


class PlanPyramid(Protocol):
    """Plan the levels of a volume, at most so many; the arguments are those of ``export.multiscale_of``."""

    def __call__(self, info: VolumeInfo, block_shape: Vec3, *, labels: bool, levels: int | None) -> Multiscale: ...


@dataclass(frozen=True, slots=True)
class ChunkedFormat:
    """An output that is a folder of chunks, written block by block, with coarser levels.

    Parameters
    ----------
    suffix, stamp_of, refusal, held_bytes
        As of ``FileFormat``.
    multiscale
        Plan the pyramid of a volume that the format can hold.
    """

    suffix: str
    multiscale: PlanPyramid
    stamp_of: Callable[[Path], object]
    refusal: Callable[[VolumeInfo, int | None], str] = nothing_against
    held_bytes: Callable[[int], int] = a_slab


OutputFormat = FileFormat | ChunkedFormat


def stamp_in(file: Path, *keys: str) -> object:
    """The value at these keys of a JSON file."""
    found: Any = json.loads(file.read_text())
    for key in keys:
        found = found[key]
    return found
