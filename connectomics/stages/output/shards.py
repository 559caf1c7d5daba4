"""Zarr v3 shards written part by part, so that a file may be far larger than what memory holds of it.

A shard is an index of its chunks, offset and length of each with a checksum over all, and then the chunks.
TensorStore makes a small shard in memory of each part; here its chunks are appended and its index is shifted.
``multiscale_zarr`` keeps its levels so.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from connectomics.core.files import make_folder, replacing
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.levels import grown
from connectomics.volumes.store import array_metadata
from connectomics.volumes.volume import Array, VolumeInfo

PART_BYTES = 8 << 20
"""Uncompressed size of what is encoded at once, at least one chunk of all channels."""
ABSENT = np.uint64((1 << 64) - 1)
"""Offset and length of a chunk that the shard lacks, because all its voxels are 0."""
CHECKSUM_BYTES = 4
Index = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """Writes the shards (z, y, x) of the array in ``folder``, whose metadata are ``store.array_metadata``."""

    folder: Path
    info: VolumeInfo
    shard_shape: Vec3

    @property
    def part_shape(self) -> Vec3:
        """(z, y, x) of the parts that ``write`` is best given: whole chunks."""
        voxel_bytes = self.info.channels * self.info.dtype.itemsize
        return grown(self.info.chunk_shape, self.shard_shape, voxel_bytes, PART_BYTES)

    def write(self, box: Box, parts: Iterable[tuple[Box, Array]]) -> None:
        """Write one shard; on return it is on the disk, whole. One without a chunk is no file.

        ``parts`` are boxes of whole chunks that fill the shard, with their voxels (c, z, y, x); all are clipped to the
        volume. Raises OSError if the disk refuses.
        """
        encoded = self._encoded(box, parts)
        first = next(encoded, None)
        if first is None:
            self._path(box).unlink(missing_ok=True)
            return
        make_folder(self._path(box).parent)
        index = np.full((self.info.channels, *self._chunks(self.shard_shape), 2), ABSENT, "<u8")
        with replacing(self._path(box)) as temporary, temporary.open("wb") as file:
            file.seek(index.nbytes + CHECKSUM_BYTES)
            for place, part, chunks in itertools.chain([first], encoded):
                stored = part[..., 0] != ABSENT
                part[stored, 0] += np.uint64(file.tell())
                index[place] = part
                file.write(chunks)
            file.seek(0)
            file.write(_with_checksum(index))

    def folders(self, box: Box) -> tuple[Path]:
        """Return the folder of the file of a shard."""
        return (self._path(box).parent,)

    def _encoded(
        self, box: Box, parts: Iterable[tuple[Box, Array]]
    ) -> Iterator[tuple[tuple[slice, ...], Index, memoryview]]:
        """Give the place in the shard's index, the own index from 0 on and the chunks of each part that has any."""
        for part, voxels in parts:
            counts = self._chunks(part.shape)
            shape = vec3([n * c for n, c in zip(counts, self.info.chunk_shape, strict=True)])
            made = _in_memory(array_metadata(dataclasses.replace(self.info, shape=voxels.shape), shape))
            made.write(voxels.reshape(made.shape)).result()
            shard = made.kvstore.read("c" + "/0" * made.rank).result()
            if shard.state != "value":
                continue
            index = np.frombuffer(shard.value, "<u8", 2 * self.info.channels * counts[0] * counts[1] * counts[2])
            head = index.nbytes + CHECKSUM_BYTES
            index = index.reshape(self.info.channels, *counts, 2).copy()
            index[index[..., 0] != ABSENT, 0] -= np.uint64(head)
            first = self._chunks(part.shift(vec3([-a for a in box.start])).start)
            place = (slice(None), *(slice(a, a + n) for a, n in zip(first, counts, strict=True)))
            yield place, index, memoryview(shard.value)[head:]

    def _chunks(self, shape: Vec3) -> Vec3:
        return vec3([-(-n // c) for n, c in zip(shape, self.info.chunk_shape, strict=True)])

    def _path(self, box: Box) -> Path:
        number = [a // n for a, n in zip(box.start, self.shard_shape, strict=True)]
        channel = ["0"] if self.info.channels > 1 else []
        return self.folder.joinpath("c", *channel, *map(str, number))


def _in_memory(metadata: dict[str, object]) -> Any:
    """TensorStore's handle of a new array that lies in memory."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": metadata}
    return ts.open(spec, create=True, context=ts.Context()).result()


def _with_checksum(index: Index) -> bytes:
    """The index as it stands in the file, with its CRC-32C."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [index.size]}}
    made = _in_memory({"shape": [index.size], "data_type": "uint64", "chunk_grid": grid, "codecs": codecs})
    made.write(index.ravel()).result()
    data: bytes = made.kvstore.read("c/0").result().value
    return data
