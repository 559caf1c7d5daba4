"""The working store: readable by zarr-python, whole shards only, everything kept over a crash."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from connectomics.core.errors import MissingShardError, OutputError, VolumeError
from connectomics.core.geometry import BlockGrid, Box
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import Store, create_store, discard_locks, open_store
from connectomics.volumes.volume import VolumeInfo

RNG = np.random.default_rng(3)
EXTENT = (10, 50, 40)
SHARD = (4, 32, 32)
INFO = VolumeInfo((1, *EXTENT), np.dtype("uint16"), (2, 16, 16), (40.0, 4.0, 5.0), (20.0, 0.0, 2.5))


def filled(path: Path, info: VolumeInfo = INFO) -> tuple[Store, np.ndarray]:
    voxels = RNG.integers(0, 250, info.shape).astype(info.dtype)
    store = create_store(path, info, shard_shape=SHARD, attributes={"run": "abc"})
    for block in BlockGrid(info.extent, SHARD):
        store.write(block.core, voxels[(slice(None), *block.core.slices)])
    return store, voxels


def test_zarr_python_reads_labels_with_their_ome_metadata(tmp_path: Path) -> None:
    store, voxels = filled(tmp_path / "labels.zarr")
    group = zarr.open_group(tmp_path / "labels.zarr", mode="r")
    array = group["0"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:]), voxels[0])
    assert array.shards == SHARD and array.chunks == (2, 16, 16)
    assert array.metadata.dimension_names == ("z", "y", "x")  # type: ignore[union-attr]  # v3 metadata
    (multiscale,) = group.attrs["ome"]["multiscales"]
    assert group.attrs["ome"]["version"] == "0.5"
    assert [(a["name"], a["unit"]) for a in multiscale["axes"]] == [(a, "nanometer") for a in "zyx"]
    (dataset,) = multiscale["datasets"]
    assert dataset["path"] == "0"
    assert dataset["coordinateTransformations"] == [
        {"type": "scale", "scale": [40.0, 4.0, 5.0]},
        {"type": "translation", "translation": [20.0, 0.0, 2.5]},
    ]
    assert group.attrs["connectomics"] == {"run": "abc"} == store.attributes
    store.close()


def test_zarr_python_reads_probabilities(tmp_path: Path) -> None:
    info = VolumeInfo((3, *EXTENT), np.dtype("float32"), (2, 16, 16))
    store, voxels = filled(tmp_path / "p.zarr", info)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    np.testing.assert_array_equal(np.asarray(group["0"][:]), voxels)
    (multiscale,) = group.attrs["ome"]["multiscales"]
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None] * 4
    assert store.info == info
    assert store.checksum(Box((0, 0, 0), SHARD)) == store.checksum(Box((0, 0, 0), SHARD))
    store.close()


def test_info_is_what_was_asked_and_survives_reopening(tmp_path: Path) -> None:
    store, voxels = filled(tmp_path / "a.zarr")
    assert store.info == INFO and store.shard_shape == SHARD and store.path == tmp_path / "a.zarr"
    store.close()
    store.close()
    again = open_store(tmp_path / "a.zarr")
    assert again.info == INFO and again.shard_shape == SHARD and again.attributes == {"run": "abc"}
    np.testing.assert_array_equal(again.read(Box.of_shape(EXTENT)), voxels)
    assert again.identity == open_volume(f"{tmp_path / 'a.zarr'}::0").identity
    again.close()


def test_unwritten_shards_read_as_zero_and_have_no_checksum(tmp_path: Path) -> None:
    store = create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    box = Box((4, 32, 32), (8, 50, 40))
    assert not store.read(box).any()
    with pytest.raises(VolumeError, match="was not written") as caught:
        store.checksum(box)
    assert str(tmp_path / "a.zarr") in str(caught.value)
    assert not store.shard_path(box).exists()
    store.write(box, np.zeros((1, *box.shape), np.uint16))
    assert store.shard_path(box).exists()
    store.close()


def test_an_absent_shard_is_an_error_where_it_was_written(tmp_path: Path) -> None:
    store, voxels = filled(tmp_path / "labels.zarr")
    store.expect(lambda index: index != (0, 0, 0))
    np.testing.assert_array_equal(store.read(Box.of_shape(EXTENT)), voxels)
    for index in ((0, 0, 0), (1, 1, 0)):
        (tmp_path / "labels.zarr/0/c" / "/".join(map(str, index))).unlink()
    assert not store.read(Box((0, 0, 0), (4, 32, 32))).any(), "nothing was written there"
    with pytest.raises(MissingShardError, match=r"no shard .*c/1/1/0, though it was written"):
        store.read(Box((3, 30, 0), (5, 34, 2)))
    store.close()


def test_checksum_is_the_sha256_of_the_shard_file(tmp_path: Path) -> None:
    store, voxels = filled(tmp_path / "a.zarr")
    box = Box((8, 32, 0), (10, 50, 32))
    file = tmp_path / "a.zarr" / "0" / "c" / "2" / "1" / "0"
    assert store.checksum(box) == hashlib.sha256(file.read_bytes()).hexdigest()
    before = store.checksum(box)
    voxels[:, 9, 40, 3] += 1
    store.write(box, voxels[(slice(None), *box.slices)])
    assert store.checksum(box) != before
    store.close()


@pytest.mark.parametrize(
    "box",
    [
        Box((1, 0, 0), (4, 32, 32)),
        Box((0, 0, 0), (4, 32, 31)),
        Box((0, 0, 0), (4, 32, 64)),
        Box((0, 0, 0), (0, 32, 32)),
        Box((8, 0, 0), (12, 32, 32)),
    ],
)
def test_only_whole_shards_are_written(tmp_path: Path, box: Box) -> None:
    store = create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    with pytest.raises(ValueError, match="whole shards"):
        store.write(box, np.zeros((1, *box.shape), np.uint16))
    with pytest.raises(ValueError, match="not one shard"):
        store.checksum(box)
    store.close()


def test_several_shards_at_once_are_written_but_have_no_single_checksum(tmp_path: Path) -> None:
    store = create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    voxels = RNG.integers(0, 9, INFO.shape).astype(np.uint16)
    store.write(Box.of_shape(EXTENT), voxels)
    np.testing.assert_array_equal(store.read(Box.of_shape(EXTENT)), voxels)
    with pytest.raises(ValueError, match="not one shard"):
        store.checksum(Box.of_shape(EXTENT))
    store.close()


def test_another_dtype_or_shape_is_refused(tmp_path: Path) -> None:
    store = create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    box = Box((0, 0, 0), SHARD)
    with pytest.raises(ValueError, match="uint8"):
        store.write(box, np.zeros((1, *SHARD), np.uint8))
    with pytest.raises(ValueError, match="expected"):
        store.write(box, np.zeros(SHARD, np.uint16))
    store.close()


def test_an_existing_name_and_unfitting_chunks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(OutputError, match="taken"):
        create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    with pytest.raises(ValueError, match="do not divide"):
        create_store(tmp_path / "b.zarr", INFO, shard_shape=(4, 24, 32), attributes={})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make"):
        create_store(tmp_path / "file" / "c.zarr", INFO, shard_shape=SHARD, attributes={})


@pytest.mark.parametrize("damage", ["absent", "no attributes", "not json", "array gone"])
def test_what_is_no_store_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zarr"
    if damage != "absent":
        create_store(path, INFO, shard_shape=SHARD, attributes={}).close()
    if damage == "no attributes":
        (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    if damage == "not json":
        (path / "zarr.json").write_text("{")
    if damage == "array gone":
        (path / "0" / "zarr.json").unlink()
    with pytest.raises(OutputError, match=r"a\.zarr"):
        open_store(path)


def test_a_failing_write_names_path_and_box(tmp_path: Path) -> None:
    store = create_store(tmp_path / "a.zarr", INFO, shard_shape=SHARD, attributes={})
    (tmp_path / "a.zarr" / "0" / "c").write_text("a file where TensorStore needs a folder")
    with pytest.raises(OutputError, match=r"voxels \(0, 0, 0\) to \(4, 32, 32\) of .*a\.zarr"):
        store.write(Box((0, 0, 0), SHARD), np.ones((1, *SHARD), np.uint16))
    store.close()


def test_stale_locks_of_killed_writers_are_removed(tmp_path: Path) -> None:
    store, voxels = filled(tmp_path / "a.zarr")
    store.close()
    lock = tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0.__lock"
    lock.write_bytes(os.urandom(100_000))
    again = open_store(tmp_path / "a.zarr")
    assert lock.exists(), "another process may be writing"
    discard_locks(again.path)
    assert not lock.exists()
    box = Box((0, 0, 0), SHARD)
    again.write(box, voxels[(slice(None), *box.slices)])
    np.testing.assert_array_equal(again.read(Box.of_shape(EXTENT)), voxels)
    again.close()


WRITER = """
import sys, numpy as np
from pathlib import Path
from connectomics.core.geometry import BlockGrid
from connectomics.volumes.store import open_store
store = open_store(Path(sys.argv[1]))
grid = list(BlockGrid(store.info.extent, store.shard_shape))
print("begin", flush=True)
while True:
    for i, block in enumerate(grid):
        array = np.random.default_rng(i).integers(0, 65535, (1, *block.core.shape), dtype=np.uint16)
        store.write(block.core, array)
        print(i, store.checksum(block.core), flush=True)
"""


def test_what_a_killed_writer_reported_is_on_disk(tmp_path: Path) -> None:
    info = VolumeInfo((1, 16, 64, 64), np.dtype("uint16"), (2, 16, 16))
    path = tmp_path / "a.zarr"
    create_store(path, info, shard_shape=SHARD, attributes={}).close()
    grid = list(BlockGrid(info.extent, SHARD))
    for attempt in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        uncovered = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=uncovered) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(5 + 7 * attempt)]
            os.kill(process.pid, signal.SIGKILL)
            lines += process.stdout.readlines()
        store = open_store(path)
        for i, checksum in (line.split() for line in lines[1:] if line.endswith("\n")):
            block = grid[int(i)]
            assert store.checksum(block.core) == checksum
            expected = np.random.default_rng(int(i)).integers(0, 65535, (1, *SHARD), dtype=np.uint16)
            np.testing.assert_array_equal(store.read(block.core), expected)
        store.close()
