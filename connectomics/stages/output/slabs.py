"""The parts in which a volume is read to be written as a file, so that memory holds a slab of it at most."""

from __future__ import annotations

from collections.abc import Iterator

from connectomics.core.geometry import BlockGrid, Box
from connectomics.volumes.levels import grown
from connectomics.volumes.volume import VolumeInfo

SLAB_BYTES = 64 << 20
"""What is held at once; of TIFF, larger sections are written in tiles."""
EXPORT_COPIES = 4  # of what is held at once: as read, as written or encoded, and both again when it is compared


def section_bytes(info: VolumeInfo) -> int:
    """Size of one section with all its channels."""
    return info.channels * info.extent[1] * info.extent[2] * info.dtype.itemsize


def fits_slab(nbytes: int) -> bool:
    """Whether so many bytes may be held at once."""
    return nbytes <= SLAB_BYTES


def whole_chunks(info: VolumeInfo) -> Iterator[Box]:
    """Boxes of whole chunks."""
    shape = grown(info.chunk_shape, info.extent, info.channels * info.dtype.itemsize, SLAB_BYTES)
    return (block.core for block in BlockGrid(info.extent, shape))


def sections(info: VolumeInfo) -> Iterator[Box]:
    """Whole sections, as many as a chunk is deep unless that is too much memory; parts of those that are larger."""
    _, height, width = info.extent
    if not fits_slab(section_bytes(info)):
        return whole_chunks(info)
    depth = max(1, min(info.chunk_shape[0], SLAB_BYTES // section_bytes(info)))
    return (block.core for block in BlockGrid(info.extent, (depth, height, width)))
