"""The working store: an OME-Zarr 0.5 group with one sharded Zarr v3 array, one shard for each block's core.

Stages write finished cores into it and read them back; the final outputs are made from it. A
shard is one file that TensorStore writes under a temporary name and renames, so it is whole or absent.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from connectomics.core.errors import MissingShardError, OutputError, VolumeError
from connectomics.core.files import replacing
from connectomics.core.fingerprint import sha256_of_file
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.formats.chunked import ChunksOnDisk, touched
from connectomics.volumes.formats.zarr import open_array, open_zarr
from connectomics.volumes.levels import Level, multiscale
from connectomics.volumes.source import READ_ERRORS, Source, reason
from connectomics.volumes.stored import StoredVolume
from connectomics.volumes.volume import Array, VolumeInfo

ARRAY = "0"
ATTRIBUTES = "connectomics"
METADATA = "zarr.json"


class Store:
    """A volume that is read and written shard by shard; made by ``create_store`` and ``open_store``."""

    def __init__(self, path: Path, reader: StoredVolume, array: Any, attributes: dict[str, object]) -> None:
        self._path = path
        self._reader = reader
        self._array = array
        self._attributes = attributes
        self._disk = ChunksOnDisk(path)
        self._shard_shape = vec3(array.chunk_layout.write_chunk.shape[-3:])
        self._told_shape = self._shard_shape
        chunk_shape = vec3(array.chunk_layout.read_chunk.shape[-3:])
        self._info = dataclasses.replace(reader.info, chunk_shape=chunk_shape)
        self._expected: Callable[[Vec3], bool] | None = None

    @property
    def path(self) -> Path:
        """Folder of the group."""
        return self._path

    @property
    def info(self) -> VolumeInfo:
        """Shape, dtype and physical frame; ``chunk_shape`` is the inner chunk of a shard."""
        return self._info

    @property
    def shard_shape(self) -> Vec3:
        """(z, y, x) of what one file holds, or see ``told_in``; shards at the far faces are clipped."""
        return self._told_shape

    def told_in(self, shard_shape: Vec3, chunk_shape: Vec3) -> Store:
        """The same store, which tells those who make final outputs of it to do so in these shards and chunks."""
        other = copy.copy(self)
        other._told_shape = shard_shape
        other._info = dataclasses.replace(self._info, chunk_shape=chunk_shape)
        return other

    @property
    def attributes(self) -> dict[str, object]:
        """What ``create_store`` was given to keep with the volume."""
        return dict(self._attributes)

    @property
    def identity(self) -> dict[str, object]:
        """Names, sizes and modification times of all files, folded."""
        return self._reader.identity

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new (c, z, y, x) array; 0 where no shard was written yet.

        Raises VolumeError if ``box`` is not inside the volume, or a shard is damaged or, see ``expect``, absent.
        """
        voxels = self._reader.read(box)
        if self._expected is not None:
            self._require_shards(box, self._expected)
        return voxels

    def expect(self, expected: Callable[[Vec3], bool]) -> None:
        """From now on an absent shard is an error where the function says, of its index (z, y, x), that it was written.

        It is looked for after it was read: what is there then was there before.
        """
        self._expected = expected

    def _require_shards(self, box: Box, expected: Callable[[Vec3], bool]) -> None:
        first = [a // n for a, n in zip(box.start, self._shard_shape, strict=True)]
        last = [-(-b // n) for b, n in zip(box.stop, self._shard_shape, strict=True)]
        for index in itertools.product(*map(range, first, last)):
            file = self._file(index)
            if expected(vec3(index)) and not file.exists():
                raise MissingShardError(
                    f"no shard {file}, though it was written: the working store was removed or damaged meanwhile; run "
                    "again, what is missing is computed again"
                )

    def write(self, box: Box, array: Array) -> None:
        """Write whole shards; on return they are on the disk.

        Parameters
        ----------
        box
            One or more whole shards, clipped to the volume.
        array
            (c, z, y, x) of the store's dtype.

        Raises
        ------
        OutputError
            If the storage refuses; the message names the path and the box.
        """
        expected = (self._info.channels, *box.shape)
        if array.shape != expected or array.dtype != self._info.dtype:
            raise ValueError(f"expected {expected} {self._info.dtype}, got {array.shape} {array.dtype}")
        if not self._is_whole_shards(box):
            raise ValueError(f"{box} does not consist of whole shards of {self._shard_shape} in {self._info.extent}")
        index = box.slices if self._array.rank == 3 else (slice(None), *box.slices)
        try:
            self._array[index].write(array[0] if self._array.rank == 3 else array).result()
            self._disk.keep({self._file(number).parent for number in touched(box, self._shard_shape)})
        except READ_ERRORS as error:
            raise OutputError(
                f"cannot write voxels {box.start} to {box.stop} of {self._path}: {reason(error)}. Free "
                "disk space or mend the permission, then run again; finished blocks are kept."
            ) from error

    def shard_path(self, box: Box) -> Path:
        """The file of ``box``, which must be exactly one shard clipped to the volume; it may be absent."""
        index = [start // size for start, size in zip(box.start, self._shard_shape, strict=True)]
        last = [-(-stop // size) for stop, size in zip(box.stop, self._shard_shape, strict=True)]
        if not self._is_whole_shards(box) or any(b - a != 1 for a, b in zip(index, last, strict=True)):
            raise ValueError(f"{box} is not one shard of {self._shard_shape} in {self._info.extent}")
        return self._file(index)

    def _file(self, number: Sequence[int]) -> Path:
        channel = ["0"] if self._array.rank == 4 else []
        return self._path.joinpath(ARRAY, "c", *channel, *map(str, number))

    def checksum(self, box: Box) -> str:
        """sha256 of the file of ``box``, exactly one shard clipped to the volume; a VolumeError if it is absent."""
        file = self.shard_path(box)
        try:
            return sha256_of_file(file)
        except OSError as error:
            why = "it was not written" if isinstance(error, FileNotFoundError) else reason(error)
            raise VolumeError(f"no shard {file} for voxels {box.start} to {box.stop}: {why}.") from error

    def close(self) -> None:
        """Release the storage; closing twice is harmless."""
        self._reader.close()

    def _is_whole_shards(self, box: Box) -> bool:
        if box.voxels == 0 or not Box.of_shape(self._info.extent).contains(box):
            return False
        edges = zip(box.start, box.stop, self._shard_shape, self._info.extent, strict=True)
        return all(a % size == 0 and (b % size == 0 or b == end) for a, b, size, end in edges)


def create_store(path: Path, info: VolumeInfo, *, shard_shape: Vec3, attributes: dict[str, object]) -> Store:
    """Make an empty working store at ``path``, which must not exist.

    Parameters
    ----------
    path
        Folder to be made.
    info
        Its ``chunk_shape`` must divide ``shard_shape``; one channel is stored as (z, y, x), more as
        (c, z, y, x).
    shard_shape
        (z, y, x) of one file.
    attributes
        JSON-able facts kept with the volume.

    Raises
    ------
    OutputError
        If the path is taken or cannot be written.
    """
    if any(shard % chunk for shard, chunk in zip(shard_shape, info.chunk_shape, strict=True)):
        raise ValueError(f"chunks of {info.chunk_shape} do not divide shards of {shard_shape}")
    if path.exists() or path.is_symlink():
        raise OutputError(f"cannot make a working store at {path}: the name is taken; open or remove it.")
    try:
        with replacing(path) as temporary:
            (temporary / ARRAY).mkdir(parents=True)
            (temporary / METADATA).write_text(
                json.dumps(group_metadata(path.stem, info, [Level(info.extent)], attributes), indent=2, allow_nan=False)
            )
            (temporary / ARRAY / METADATA).write_text(json.dumps(array_metadata(info, shard_shape), indent=2))
    except OSError as error:
        raise OutputError(
            f"cannot make a working store at {path}: {reason(error)}. Choose another output folder, or mend this one "
            "and run again."
        ) from error
    return open_store(path)


def open_store(path: Path) -> Store:
    """Open a working store for reading and writing, keeping what it holds; an OutputError if that cannot be done."""
    try:
        attributes = json.loads((path / METADATA).read_text())["attributes"][ATTRIBUTES]
        reader = open_zarr(Source(str(path), path, ARRAY))
        array = open_array(path / ARRAY, 3, writable=True)
    except (VolumeError, *READ_ERRORS) as error:
        raise OutputError(
            f"cannot open the working store {path}: {reason(error).rstrip('.')}; remove it to begin anew."
        ) from error
    return Store(path, reader, array, attributes)


def discard_locks(path: Path) -> None:
    """Remove the lock files that killed writers left in the store at ``path``; nobody may be writing to it."""
    for lock in path.joinpath(ARRAY).rglob("*.__lock"):
        lock.unlink(missing_ok=True)


def group_metadata(
    name: str, info: VolumeInfo, levels: Sequence[Level], attributes: dict[str, object]
) -> dict[str, object]:
    """``zarr.json`` of an OME-Zarr 0.5 group with an image's levels, and what this program keeps with it."""
    ome = {"version": "0.5", "multiscales": [multiscale(name, info, levels)]}
    return {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome, ATTRIBUTES: attributes}}


def array_metadata(info: VolumeInfo, shard_shape: Vec3) -> dict[str, object]:
    """``zarr.json`` of a sharded array of all the channels; ``info.chunk_shape`` divides ``shard_shape``."""
    several = info.channels > 1
    size = info.dtype.itemsize
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    compressor = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 3,
            "shuffle": "shuffle" if size > 1 else "noshuffle",
            "typesize": size,
            "blocksize": 0,
        },
    }
    sharding = {
        "chunk_shape": [1] * several + list(info.chunk_shape),
        "codecs": [little, compressor],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "start",
    }
    shard = [info.channels] * several + list(shard_shape)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(info.shape if several else info.extent),
        "data_type": info.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0 if info.dtype.kind in "iu" else 0.0,
        "dimension_names": list("czyx" if several else "zyx"),
        "attributes": {},
    }
