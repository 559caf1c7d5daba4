"""Shards that are written part by part: zarr-python reads them, and TensorStore itself keeps the same chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr

from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.stages.output import shards
from connectomics.stages.output.shards import ShardWriter
from connectomics.volumes.store import METADATA, array_metadata
from connectomics.volumes.volume import VolumeInfo

CHUNK, SHARD = (2, 16, 16), (6, 32, 48)
SHAPES: list[tuple[int, int, int, int]] = [(1, 13, 50, 61), (3, 7, 33, 48)]


def empty_array(folder: Path, shape: tuple[int, int, int, int]) -> VolumeInfo:
    info = VolumeInfo(shape, np.dtype(np.uint16), CHUNK)
    folder.mkdir()
    (folder / METADATA).write_text(json.dumps(array_metadata(info, SHARD)))
    return info


def noise(shape: tuple[int, int, int, int]) -> Any:
    """With chunks of zeros, and a shard of them."""
    voxels = np.random.default_rng(2).integers(1, 1 << 16, shape, np.uint16)
    voxels[:, 2:4, :32, 16:] = 0
    voxels[:, 6:12, :32, :48] = 0
    return voxels


def parts_of(writer: ShardWriter, box: Box, voxels: Any) -> Iterator[tuple[Box, Any]]:
    for part in BlockGrid(box.shape, writer.part_shape):
        core = part.core.shift(box.start)
        yield core, np.ascontiguousarray(voxels[(slice(None), *core.slices)])


def by_tensorstore(folder: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec, open=True, read=True, write=True, context=ts.Context()).result()


def chunks_in(file: Path, channels: int) -> tuple[int, list[int]]:
    """Length of the file, and the lengths of the chunks by their number."""
    count = channels * int(np.prod(np.array(SHARD) // CHUNK))
    return file.stat().st_size, np.fromfile(file, "<u8", 2 * count)[1::2].tolist()


@pytest.mark.parametrize("part_bytes", [1, 8000, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_others_read_what_is_written_in_parts(
    tmp_path: Path, shape: tuple[int, int, int, int], part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", part_bytes)
    info, voxels = empty_array(tmp_path / "parts", shape), noise(shape)
    empty_array(tmp_path / "whole", shape)
    writer = ShardWriter(tmp_path / "parts", info, SHARD)
    assert (writer.part_shape == CHUNK) == (part_bytes == 1)
    for block in BlockGrid(info.extent, SHARD):
        writer.write(block.core, parts_of(writer, block.core, voxels))
    by_tensorstore(tmp_path / "whole").write(voxels if shape[0] > 1 else voxels[0]).result()
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "parts", mode="r")[:]), np.squeeze(voxels))
    names = [sorted(p.relative_to(folder) for p in folder.rglob("c/**/*")) for folder in tmp_path.iterdir()]
    assert names[0] == names[1], "a shard of zeros is no file, and nothing temporary is left"
    for name in names[0]:
        if (tmp_path / "parts" / name).is_file():
            assert chunks_in(tmp_path / "parts" / name, shape[0]) == chunks_in(tmp_path / "whole" / name, shape[0])


def test_the_index_is_guarded_by_its_checksum(tmp_path: Path) -> None:
    info, voxels = empty_array(tmp_path / "a", SHAPES[0]), noise(SHAPES[0])
    writer, box = ShardWriter(tmp_path / "a", info, SHARD), Box((0, 0, 0), SHARD)
    writer.write(box, parts_of(writer, box, voxels))
    file = tmp_path / "a" / "c" / "0" / "0" / "0"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(ValueError, match="Digest mismatch"):
        by_tensorstore(tmp_path / "a")[:2, :16, :16].read().result()


def test_what_was_there_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    info, voxels = empty_array(tmp_path / "a", SHAPES[0]), noise(SHAPES[0])
    writer, box = ShardWriter(tmp_path / "a", info, SHARD), Box((0, 0, 0), SHARD)
    file = tmp_path / "a" / "c" / "0" / "0" / "0"

    def torn() -> Iterator[tuple[Box, Any]]:
        yield next(parts_of(writer, box, voxels))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        writer.write(box, torn())
    assert not list(file.parent.iterdir())
    writer.write(box, parts_of(writer, box, voxels))
    before = file.read_bytes()
    with pytest.raises(OSError, match="the disk is gone"):
        writer.write(box, torn())
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    writer.write(box, parts_of(writer, box, np.zeros_like(voxels)))
    assert not list(file.parent.iterdir())


def test_a_shard_may_be_larger_than_what_is_held(tmp_path: Path) -> None:
    """64 MB in parts of 8, which all lie in the same memory."""
    extent: Vec3 = (64, 1024, 1024)
    info = VolumeInfo((1, *extent), np.dtype(np.uint8), (1, 512, 512))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / METADATA).write_text(json.dumps(array_metadata(info, extent)))
    writer = ShardWriter(tmp_path / "a", info, extent)
    grid, held = BlockGrid(extent, writer.part_shape), np.empty(shards.PART_BYTES, np.uint8)
    assert len(grid) == 8

    def parts() -> Iterator[tuple[Box, Any]]:
        for number, part in enumerate(grid):
            held[:] = number + 1
            yield part.core, held.reshape(1, *part.core.shape)

    writer.write(Box((0, 0, 0), extent), parts())
    written = by_tensorstore(tmp_path / "a")
    for number, part in enumerate(grid):
        assert (written[part.core.slices].read().result() == number + 1).all()
