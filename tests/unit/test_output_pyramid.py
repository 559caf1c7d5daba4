"""Chunked outputs: programs of others read every level, which is what single windows give, whoever was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models.v04.image
import ome_zarr_models.v05.image
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.core.errors import OutputError, QuarantineError, VolumeError
from connectomics.core.files import TEMPORARY
from connectomics.core.geometry import Block, BlockGrid, Box
from connectomics.execution.task import BlockRecord, Task
from connectomics.stages.output import pyramid as pyramid_stage
from connectomics.stages.output import shards
from connectomics.stages.output.downsample import mean, mode
from connectomics.stages.output.export import (
    FORMATS,
    export_path,
    multiscale_of,
    output_format,
    read_stamp,
    require_exportable,
)
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.output.formats import n5, precomputed, zarr2
from connectomics.stages.output.formats import zarr as zarr3
from connectomics.stages.output.formats.contract import ChunkedFormat
from connectomics.stages.output.formats.level_array import LevelArray
from connectomics.stages.output.pyramid import LevelTask
from connectomics.testing.output_format import export_store
from connectomics.volumes.levels import plan_levels
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import Store, create_store, open_store
from connectomics.volumes.volume import VolumeInfo

from pyramids import READERS, coarser

SHARD = (4, 32, 32)
METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json", "info", "connectomics.json")
SIZE = (40.0, 4.0, 5.0)
KEY = "ab" * 32
STAMP: dict[str, object] = {"facts": {"unit µ": [1, 2.5, None]}}
PYRAMIDS = tuple(form for form in FORMATS if isinstance(output_format(form), ChunkedFormat))
CASES = [
    ("labels", (1, 5, 34, 17), "uint8"),
    ("labels", (1, 3, 33, 17), "uint64"),
    ("probabilities", (3, 3, 20, 17), "float32"),
    ("probabilities", (1, 2, 20, 37), "float16"),
    ("probabilities", (2, 3, 20, 17), "uint8"),
]


def random_voxels(shape: tuple[int, ...], dtype: str, seed: int = 5) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return generator.random(shape).astype(dtype)
    return (generator.integers(0, 4, shape) * (2 if dtype == "uint8" else 40000)).astype(dtype)


def filled(
    path: Path, voxels: np.ndarray, origin: tuple[float, float, float] = (0.0, 0.0, 0.0), shard: Any = SHARD
) -> Store:
    info = VolumeInfo(voxels.shape, voxels.dtype, (2, 16, 16), SIZE, origin)  # type: ignore[arg-type]  # four axes
    store = create_store(path, info, shard_shape=shard, attributes={"run": "abc"})
    for block in BlockGrid(info.extent, shard):
        store.write(block.core, voxels[(slice(None), *block.core.slices)])
    return store


def export(
    folder: Path, store: Store, name: str, form: str, *, pyramid: bool = True, executor: Any = None, key: str = KEY
) -> Path:
    export_store(store, FinalOutput(name, "a_seg", key, (form,), pyramid), folder, STAMP, executor)
    return export_path(folder, "a_seg", form)


def small_units(monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    """Several blocks a level even of small volumes."""
    for module, name in (
        (zarr3, "Zarr3Levels"),
        (zarr2, "Zarr2Levels"),
        (n5, "N5Levels"),
        (precomputed, "PrecomputedLevels"),
    ):
        made = vars(module)[name]
        monkeypatch.setattr(module, name, lambda *words, made=made: made(*words, unit_bytes=unit_bytes))


@pytest.mark.parametrize("form", PYRAMIDS)
@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_programs_of_others_read_every_level(
    tmp_path: Path, form: str, name: str, shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, 8192)
    voxels = random_voxels(shape, dtype)
    (tmp_path / "work").mkdir()
    store = filled(tmp_path / "work" / f"{name}.zarr", voxels)
    info = store.info
    path = export(tmp_path, store, name, form)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["work", path.name])
    assert not list(path.rglob("*__lock"))
    assert (tmp_path / "work" / f"{name}.zarr").exists(), "other formats may be made of it"
    expected = voxels.astype("float32") if dtype == "float16" and form in ("n5", "precomputed") else voxels
    levels = plan_levels(info)
    assert len(levels) > 1
    for k, level in enumerate(levels):
        if k > 0:
            expected = coarser(expected, level.step, level.phase, labels=name == "labels")
        read = READERS[form](path, k)
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read.reshape(expected.shape), expected)
        assert read.ndim == (3 if shape[0] == 1 and form != "precomputed" else 4)
    assert read_stamp(path, form) == {**STAMP, "result_key": KEY}
    ours = open_volume(str(path))
    assert (ours.info.shape, ours.info.voxel_size_nm) == (shape, SIZE)
    ours.close()


@pytest.mark.parametrize("form", PYRAMIDS)
def test_each_level_lies_where_its_voxels_are(tmp_path: Path, form: str) -> None:
    (tmp_path / "work").mkdir()
    origin = (80.0, 12.0, 35.0)  # (2, 3, 7) voxels
    store = filled(tmp_path / "work" / "labels.zarr", random_voxels((1, 9, 70, 70), "uint8"), origin)
    path = export(tmp_path, store, "labels", form)
    inner = {"zarr": "{}", "zarr2": "{}", "n5": "s{}", "precomputed": "{}"}[form]
    for k, factor in enumerate([(1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8)]):
        level = open_volume(f"{path}::{inner.format(k)}").info
        assert level.voxel_size_nm == tuple(f * s for f, s in zip(factor, SIZE, strict=True))
        if form == "precomputed":  # a corner, and windows from the origin of the coordinates on
            expected = tuple(o // (f * s) * f * s for o, f, s in zip(origin, factor, SIZE, strict=True))
        else:
            expected = tuple(o + (f - 1) / 2 * s for o, f, s in zip(origin, factor, SIZE, strict=True))
        assert level.origin_nm == expected


def test_precomputed_windows_count_from_the_origin(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    voxels = random_voxels((1, 9, 45, 38), "uint32")
    path = export(
        tmp_path, filled(tmp_path / "work" / "labels.zarr", voxels, (80.0, 12.0, 35.0)), "labels", "precomputed"
    )
    expected = coarser(voxels, (1, 2, 2), (0, 1, 1), labels=True)
    assert expected.shape == (1, 9, 23, 20)
    np.testing.assert_array_equal(READERS["precomputed"](path, 1), expected)


@pytest.mark.parametrize(
    ("form", "model"), [("zarr", ome_zarr_models.v05.image.Image), ("zarr2", ome_zarr_models.v04.image.Image)]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_ngff_models_accept_it(tmp_path: Path, form: str, model: Any, channels: int) -> None:
    (tmp_path / "work").mkdir()
    voxels = random_voxels((channels, 5, 60, 70), "uint8")
    path = export(tmp_path, filled(tmp_path / "work" / "labels.zarr", voxels), "labels", form)
    image = model.from_zarr(zarr.open_group(path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales if form == "zarr" else image.attributes.multiscales
    assert multiscale.name == "a_seg"
    assert [dataset.path for dataset in multiscale.datasets] == ["0", "1", "2", "3"]
    assert multiscale.datasets[2].coordinateTransformations[0].scale[-3:] == [40.0, 16.0, 20.0]
    assert multiscale.datasets[2].coordinateTransformations[1].translation[-3:] == [0.0, 6.0, 7.5]


@pytest.mark.parametrize("form", PYRAMIDS)
def test_without_a_pyramid_there_is_one_level(tmp_path: Path, form: str) -> None:
    (tmp_path / "work").mkdir()
    voxels = random_voxels((1, 4, 50, 40), "uint8")
    path = export(tmp_path, filled(tmp_path / "work" / "labels.zarr", voxels), "labels", form, pyramid=False)
    np.testing.assert_array_equal(READERS[form](path, 0).reshape(voxels.shape), voxels)
    assert len([p for p in path.iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("form", PYRAMIDS)
@pytest.mark.parametrize(("name", "shape", "dtype"), [("labels", (1, 24, 192, 256), "uint8"), CASES[2]])
def test_files_stay_under_one_a_block(tmp_path: Path, form: str, name: str, shape: Any, dtype: str) -> None:
    """Metadata included; where all is less than a unit each level is one file, however many the blocks are."""
    (tmp_path / "work").mkdir()
    voxels = random_voxels(shape, dtype)
    store = filled(tmp_path / "work" / f"{name}.zarr", voxels)
    blocks, levels = len(BlockGrid(store.info.extent, SHARD)), len(plan_levels(store.info))
    assert blocks in (288, 1)
    path = export(tmp_path, store, name, form)
    files = [p for p in path.rglob("*") if p.is_file()]
    assert len([p for p in files if p.name not in METADATA]) == levels
    assert len(files) <= 2 * levels + 2
    assert len(files) < blocks or blocks == 1


@pytest.mark.parametrize(
    ("extent", "shard", "unit_bytes"),
    [
        ((12, 128, 122), SHARD, 1 << 14),
        ((50, 33, 20), (1, 32, 32), 1),
        ((1, 1000, 60), (1, 16, 64), 1),
        ((60, 60, 60), (16, 16, 16), 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [((24, 192, 250), SHARD, 1 << 16), ((100, 33, 20), (1, 32, 32), 1)]
        ),
    ],
)
def test_a_zarr_has_fewer_files_than_blocks_however_large_these_are(
    tmp_path: Path, extent: Any, shard: Any, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than a unit, too, where only their number counts; shards are whole blocks, and zarr-python reads all."""
    small_units(monkeypatch, unit_bytes)
    (tmp_path / "work").mkdir()
    voxels = random_voxels((1, *extent), "uint8")
    info = VolumeInfo(voxels.shape, voxels.dtype, (1, 16, 16), SIZE)  # type: ignore[arg-type]  # four axes
    store = create_store(tmp_path / "work" / "labels.zarr", info, shard_shape=shard, attributes={})
    grid = BlockGrid(extent, shard)
    for block in grid:
        store.write(block.core, voxels[(slice(None), *block.core.slices)])
    path = export(tmp_path, store, "labels", "zarr")
    assert len([p for p in path.rglob("*") if p.is_file()]) < 0.6 * len(grid)
    group = zarr.open_group(path, mode="r")
    first = group["0"]
    assert isinstance(first, zarr.Array) and first.shards is not None
    assert all(n % b == 0 or n >= e for n, b, e in zip(first.shards, shard, extent, strict=True))
    expected = voxels
    for k, level in enumerate(plan_levels(info)):
        if k > 0:
            lacking = [-n % s for n, s in zip(expected.shape[1:], level.step, strict=True)]
            expected = mode(np.pad(expected, [(0, 0), *((0, n) for n in lacking)], mode="edge"), level.step)
        np.testing.assert_array_equal(np.asarray(group[str(k)][:]), expected[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Failing:
    """An executor that breaks after so many blocks of all levels together, in an order of its own."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.done: list[tuple[str, str]] = []

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord]:
        for block in reversed([block for block in blocks if block is not None]):
            if self.left == 0:
                raise VolumeError("the disk is gone")
            self.left -= 1
            self.done.append((task.name, block.key))
            yield task.process(block)


@pytest.mark.parametrize("form", PYRAMIDS)
def test_interruptions_and_the_cut_into_blocks_do_not_change_a_byte(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, 4096)
    voxels = random_voxels((1, 5, 40, 36), "uint32")
    finals, levels = [], []
    for shard in (SHARD, (8, 64, 16)):
        folder = tmp_path / f"{shard}"
        (folder / "work").mkdir(parents=True)
        path = export(folder, filled(folder / "work" / "labels.zarr", voxels, shard=shard), "labels", form)
        finals.append(contents(path))
        levels.append([READERS[form](path, k).tobytes() for k in range(3)])
    assert levels[0] == levels[1]
    assert finals[0] == finals[1] or form == "zarr", "its shards are whole blocks"

    work = tmp_path / "work"
    work.mkdir()
    store = filled(work / "labels.zarr", voxels)
    seen: list[tuple[str, str]] = []
    for after in (0, 1, 2):
        executor = Failing(after)
        with pytest.raises(VolumeError, match="the disk is gone"):
            export(tmp_path, store, "labels", form, executor=executor)
        assert not export_path(tmp_path, "a_seg", form).exists()
        seen += executor.done
        store.close()
        store = open_store(work / "labels.zarr")
    (place,) = work.glob(f"staging.*/labels.final.{form}")
    (place / f".left{TEMPORARY}").touch()  # by another machine's killed process
    last = Failing(-1)
    path = export(tmp_path, store, "labels", form, executor=last)
    assert contents(path) == finals[0]
    assert len(seen) == 3 and len(set(seen + last.done)) == len(seen + last.done), "no block is made twice"


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import pytest
import test_output_pyramid as tests
from connectomics.volumes.store import open_store
from connectomics.stages.output.pyramid import LevelTask
folder, form, after, later_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
tests.small_units(pytest.MonkeyPatch(), 4096)
process, calls = LevelTask.process, []
def kill():
    time.sleep(later_s)
    os.kill(os.getpid(), signal.SIGKILL)
def watched(self, block):
    calls.append(block)
    if len(calls) == after:
        threading.Thread(target=kill).start()
    return process(self, block)
LevelTask.process = watched
tests.export(folder, open_store(folder / "work" / "labels.zarr"), "labels", form)
"""


def killed_and_continued(folder: Path, form: str, moments: Iterable[tuple[int, float]]) -> None:
    """SIGKILL so many seconds after a run's n-th block has begun, again and again; at last the undisturbed bytes."""
    voxels = random_voxels((1, 9, 100, 90), "uint32")
    for name in ("whole", "killed"):
        (folder / name / "work").mkdir(parents=True)
        store = filled(folder / name / "work" / "labels.zarr", voxels)
    whole = export(folder / "whole", open_store(folder / "whole" / "work" / "labels.zarr"), "labels", form)
    place = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for after, later_s in moments:
        words = [sys.executable, "-c", KILLED, str(folder / "killed"), form, str(after), str(later_s)]
        ended = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not export_path(folder / "killed", "a_seg", form).exists()
    path = export(folder / "killed", open_store(store.path), "labels", form)
    assert contents(path) == contents(whole)


def test_killed_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 4096)
    killed_and_continued(tmp_path, "precomputed", [(4, 0.003)])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", PYRAMIDS)
def test_killed_while_it_writes_at_many_moments(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 4096)
    generator = np.random.default_rng(1)
    moments = [(int(generator.integers(1, 3)), float(generator.random()) / 100) for _ in range(8)]
    killed_and_continued(tmp_path, form, moments)


@pytest.mark.parametrize(
    ("form", "damage"), [("zarr", "flipped"), ("zarr2", "missing"), ("n5", "flipped"), ("precomputed", "flipped")]
)
def test_a_recorded_block_that_is_damaged_is_made_again(
    tmp_path: Path, form: str, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_units(monkeypatch, 4096)
    voxels = random_voxels((1, 5, 40, 36), "uint32")
    (tmp_path / "work").mkdir()
    store = filled(tmp_path / "work" / "labels.zarr", voxels)
    with pytest.raises(VolumeError):
        export(tmp_path, store, "labels", form, executor=Failing(3))
    (place,) = tmp_path.glob(f"work/staging.*/labels.final.{form}")
    names = {"zarr": "0/c/**/*", "zarr2": "0/*/*/*", "n5": "s0/*/*/*", "precomputed": "*_*/*.shard"}
    files = sorted(p for p in place.glob(names[form]) if p.is_file())
    if damage == "missing":
        files[-1].unlink()
    else:
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2 :] = bytes(255 - byte for byte in content[len(content) // 2 :])
        files[-1].write_bytes(content)
    path = export(tmp_path, open_store(store.path), "labels", form)
    assert "missing or damaged on disk and it is made again" in caplog.text
    np.testing.assert_array_equal(READERS[form](path, 0).reshape(voxels.shape), voxels)
    np.testing.assert_array_equal(
        READERS[form](path, 1).reshape(1, 5, 20, 18), coarser(voxels, (1, 2, 2), (0, 0, 0), labels=True)
    )


@pytest.mark.parametrize("form", PYRAMIDS)
def test_a_disk_that_gives_other_voxels_is_noticed(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    store = filled(tmp_path / "work" / "labels.zarr", random_voxels((1, 4, 40, 40), "uint8"))
    read = LevelArray.read

    def flipping(self: LevelArray, box: Box) -> np.ndarray:
        voxels = read(self, box)
        voxels[0, 0, 0, 0] ^= 1
        return voxels

    monkeypatch.setattr(LevelArray, "read", flipping)
    with pytest.raises(QuarantineError, match="reads back with other voxels"):
        export(tmp_path, store, "labels", form)
    assert not export_path(tmp_path, "a_seg", form).exists()


@pytest.mark.parametrize("form", PYRAMIDS)
def test_what_stood_there_is_replaced_and_damaged_stamps_are_none(tmp_path: Path, form: str) -> None:
    for value in (2, 0):
        (tmp_path / f"{value}").mkdir()
        voxels = np.full((1, 3, 20, 20), value, np.uint8)
        path = export(tmp_path, filled(tmp_path / f"{value}" / "labels.zarr", voxels), "labels", form, key=f"{value}")
        assert (READERS[form](path, 0) == value).all()
    name = {"zarr": "zarr.json", "zarr2": ".zattrs", "n5": "attributes.json", "precomputed": "connectomics.json"}
    file = path / name[form]
    whole = file.read_text()
    for damaged in (whole[:20], "[1]", *(["{}", '{"connectomics": [1]}'] if form != "precomputed" else [])):
        file.write_text(damaged)
        assert read_stamp(path, form) is None
    file.unlink()
    assert read_stamp(path, form) is None
    shutil.rmtree(path)
    assert read_stamp(path, form) is None


def test_n5_says_what_bigdataviewer_and_neuroglancer_look_for(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    voxels = random_voxels((1, 10, 50, 41), "uint8")
    path = export(tmp_path, filled(tmp_path / "work" / "labels.zarr", voxels), "labels", "n5")
    group = json.loads((path / "attributes.json").read_text())
    assert group["downsamplingFactors"] == [[1, 1, 1], [2, 2, 1], [4, 4, 1]]
    assert group["pixelResolution"] == {"unit": "nm", "dimensions": [5.0, 4.0, 40.0]}
    level = json.loads((path / "s1" / "attributes.json").read_text())
    assert level["downsamplingFactors"] == [2, 2, 1] and level["dimensions"] == [21, 25, 10]
    assert level["transform"]["translate"] == [0.0, 2.0, 2.5]


def test_precomputed_ids_are_compressed_segmentation_in_shards(tmp_path: Path) -> None:
    for name, dtype, kind, encoding in (
        ("labels", "uint64", "segmentation", "compressed_segmentation"),
        ("labels", "uint8", "segmentation", "raw"),
        ("probabilities", "float32", "image", "raw"),
    ):
        folder = tmp_path / f"{name}{dtype}"
        (folder / "work").mkdir(parents=True)
        store = filled(folder / "work" / f"{name}.zarr", random_voxels((1, 10, 50, 41), dtype))
        info = json.loads((export(folder, store, name, "precomputed") / "info").read_text())
        assert (info["type"], info["data_type"]) == (kind, dtype)
        assert {scale["encoding"] for scale in info["scales"]} == {encoding}
        assert info["scales"][1]["resolution"] == [10.0, 8.0, 40.0]
        assert info["scales"][0]["sharding"]["@type"] == "neuroglancer_uint64_sharded_v1"


def test_precomputed_needs_a_voxel_size() -> None:
    info = VolumeInfo((1, 4, 40, 40), np.dtype("uint8"), (2, 16, 16))
    with pytest.raises(OutputError, match=r"set inference\.voxel_size_nm"):
        multiscale_of("precomputed", info, SHARD, Path("a"), labels=True)
    assert len(multiscale_of("n5", info, SHARD, Path("a"), labels=True).levels) == 3


def test_png_of_sections_beyond_the_budget_is_refused() -> None:
    info = VolumeInfo((1, 4, 100_000, 100_000), np.dtype("uint8"), (1, 512, 512))
    with pytest.raises(OutputError, match=r"about 40\.00 GB, the memory budget is 8\.00 GB; use tiff"):
        require_exportable(info, Path("a_png"), "png", 8 * 10**9)
    require_exportable(info, Path("a.tif"), "tiff", 8 * 10**9)


@pytest.mark.parametrize(
    ("extent", "chunk", "size", "factors"),
    [
        ((20, 2000, 1500), (1, 512, 512), None, [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
        ((200, 200, 100), (64, 64, 64), None, [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((1, 200, 100), (1, 64, 64), (1.0, 8.0, 8.0), [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
        ((200, 300, 300), (64, 64, 64), (4.0, 8.0, 8.0), [(1, 1, 1), (2, 1, 1), (4, 2, 2), (8, 4, 4), (16, 8, 8)]),
        ((9, 300, 20), (8, 64, 64), (40.0, 8.0, 4.0), [(1, 1, 1), (1, 1, 2), (1, 2, 4), (1, 4, 8), (2, 8, 16)]),
        ((64, 64, 64), (64, 64, 64), (8.0, 8.0, 8.0), [(1, 1, 1)]),
    ],
)
def test_planned_factors(extent: Any, chunk: Any, size: Any, factors: list[tuple[int, int, int]]) -> None:
    levels = plan_levels(VolumeInfo((1, *extent), np.dtype("uint8"), chunk, size))
    assert [level.factor for level in levels] == factors
    for level in levels:
        assert level.extent == tuple(-(-n // f) for n, f in zip(extent, level.factor, strict=True))
    assert all(n <= c for n, c in zip(levels[-1].extent[1:], chunk[1:], strict=True))


def test_two_voxels_beside_the_origin_stay_two() -> None:
    info = VolumeInfo((1, 2, 2, 2), np.dtype("uint8"), (1, 1, 1), (8.0, 8.0, 8.0))
    assert len(plan_levels(info, (-1, -1, -1))) == 1
    assert [level.extent for level in plan_levels(info, (-2, -1, 0))] == [(2, 2, 2), (1, 2, 1)]


STEPS = st.tuples(*[st.integers(1, 2)] * 3)


@given(step=STEPS, shape=st.tuples(*[st.integers(1, 3)] * 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_windows_one_by_one(step: Any, shape: Any, seed: int) -> None:
    extent = [n * s for n, s in zip(shape, step, strict=True)]
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, (2, *extent)).astype(np.uint16)
    np.testing.assert_array_equal(mode(labels, step), coarser(labels, step, (0, 0, 0), labels=True))
    for values in (labels, generator.random((1, *extent)).astype(np.float32)):
        np.testing.assert_array_equal(mean(values, step), coarser(values, step, (0, 0, 0), labels=False))


@given(
    extent=st.tuples(*[st.integers(1, 9)] * 3),
    offset=st.tuples(*[st.integers(-3, 5)] * 3),
    unit=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_any_cut_of_a_level_gives_the_same(extent: Any, offset: Any, unit: Any, seed: int) -> None:
    """In memory, whatever the blocks and wherever the volume begins: windows one by one."""
    voxels = np.random.default_rng(seed).integers(0, 3, (1, *extent)).astype(np.uint8)
    info = VolumeInfo(voxels.shape, voxels.dtype, (1, 1, 1), (8.0, 8.0, 8.0))
    levels = plan_levels(info, offset)
    if len(levels) == 1:
        return
    level = levels[1]
    made = Memory(np.full((1, *level.extent), 255, np.uint8), unit)
    task = LevelTask("level 1", Memory(voxels, unit), Box.of_shape(extent), level, made, (2, 1, 2), True)  # type: ignore[arg-type]
    for block in task.grid:
        assert task.whole(task.process(block))
    np.testing.assert_array_equal(made.voxels, coarser(voxels, level.step, level.phase, labels=True))


@pytest.mark.parametrize("form", PYRAMIDS)
def test_memory_holds_a_block(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read or written at once is a unit or a piece."""
    unit_bytes = 8 * 2 * 16 * 16
    monkeypatch.setattr(pyramid_stage, "PIECE_BYTES", unit_bytes)
    monkeypatch.setattr(shards, "PART_BYTES", unit_bytes)
    small_units(monkeypatch, unit_bytes)
    largest: list[int] = []

    def watched(read: Any) -> Any:
        def call(self: Any, box: Box) -> Any:
            largest.append(box.voxels)
            return read(self, box)

        return call

    def parts_watched(write: Any) -> Any:
        def call(self: Any, box: Box, parts: Iterable[tuple[Box, np.ndarray]]) -> None:
            def watched() -> Iterator[tuple[Box, np.ndarray]]:
                for part, voxels in parts:
                    largest.append(voxels.size)
                    yield part, voxels

            write(self, box, watched())

        return call

    (tmp_path / "work").mkdir()
    store = filled(tmp_path / "work" / "labels.zarr", random_voxels((1, 8, 100, 90), "uint8"))
    for kind in (Store, LevelArray):
        monkeypatch.setattr(kind, "read", watched(vars(kind)["read"]))
    monkeypatch.setattr(LevelArray, "write", parts_watched(LevelArray.write))
    export(tmp_path, store, "labels", form)
    assert len(largest) > 40
    assert max(largest) <= unit_bytes


class Memory:
    """A level in memory."""

    def __init__(self, voxels: np.ndarray, unit: Any) -> None:
        self.voxels, self.shape, self.dtype = voxels, voxels.shape, voxels.dtype
        self.unit_shape = self.chunk_shape = self.part_shape = unit

    def read(self, box: Box) -> np.ndarray:
        return self.voxels[(slice(None), *box.slices)].copy()

    def write(self, box: Box, parts: Iterable[tuple[Box, np.ndarray]]) -> None:
        for part, voxels in parts:
            self.voxels[(slice(None), *part.slices)] = voxels
