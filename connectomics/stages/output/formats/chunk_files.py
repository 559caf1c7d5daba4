"""Chunks that are files of their own, for ``n5`` and ``zarr2``: large ones, of which several are written at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from connectomics.core.geometry import Vec3
from connectomics.stages.output.size import FILE_BYTES, OutputSize, cells, packed
from connectomics.volumes.levels import Level, grown

CHUNK_BYTES = 16 << 20
"""Uncompressed size of a chunk."""


@dataclass(frozen=True, slots=True)
class ChunkFiles:
    """How the levels of a pyramid without shards are cut.

    Parameters
    ----------
    least
        Chunk of the working store (z, y, x), which these are grown from.
    voxel_bytes
        Of all channels, as stored.
    unit_bytes
        Uncompressed size of what is written at once.
    """

    least: Vec3
    voxel_bytes: int
    unit_bytes: int

    def chunk(self, level: Level) -> Vec3:
        """Shape (z, y, x) of the chunks of a level."""
        return grown(self.least, level.extent, self.voxel_bytes, min(CHUNK_BYTES, self.unit_bytes))

    def unit(self, level: Level) -> Vec3:
        """Shape (z, y, x) of what is written at once."""
        return grown(self.chunk(level), level.extent, self.voxel_bytes, self.unit_bytes)

    def size(self, level: Level) -> OutputSize:
        """Upper bound of a level with its metadata."""
        chunk = self.chunk(level)
        files = cells(level.extent, chunk)
        return OutputSize(packed(files * math.prod(chunk) * self.voxel_bytes, files) + FILE_BYTES, files + 1)
