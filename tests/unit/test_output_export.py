"""Final outputs: other libraries read them, they carry their stamp, and appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from connectomics.core.errors import ConfigError, OutputError
from connectomics.core.geometry import BlockGrid, Box
from connectomics.stages.output import slabs
from connectomics.stages.output.export import (
    FORMATS,
    export_file,
    export_path,
    formats_holding,
    read_stamp,
    require_exportable,
)
from connectomics.stages.output.formats import tiff
from connectomics.stages.output.formats.hdf5 import _Sink
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import Store, create_store
from connectomics.volumes.volume import VolumeInfo

from small_jobs import read_h5

FILES = ("h5", "tiff", "png")
RNG = np.random.default_rng(5)
SHARD = (4, 32, 32)
STAMP: dict[str, object] = {"result_key": "ab" * 32, "facts": {"unit µ": [1, 2.5, None]}}


def filled(path: Path, shape: tuple[int, int, int, int], dtype: str) -> tuple[Store, np.ndarray]:
    voxels = RNG.integers(0, 200, shape).astype(dtype)
    info = VolumeInfo(shape, np.dtype(dtype), (2, 16, 16), (40.0, 4.0, 5.0))
    store = create_store(path, info, shard_shape=SHARD, attributes={"run": "abc"})
    for block in BlockGrid(info.extent, SHARD):
        store.write(block.core, voxels[(slice(None), *block.core.slices)])
    return store, voxels


def by_others(path: Path, format: str) -> np.ndarray:
    if format == "h5":
        return read_h5(path)
    if format == "tiff":
        return np.asarray(tifffile.imread(path))
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])


def exported(tmp_path: Path, format: str, shape: tuple[int, int, int, int], dtype: str) -> tuple[Path, np.ndarray]:
    store, voxels = filled(tmp_path / "work.zarr", shape, dtype)
    path = export_path(tmp_path, "a_seg", format)
    export_file(store, path, format, STAMP)
    assert (tmp_path / "work.zarr").exists()
    return path, voxels


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 10, 50, 40), "uint8"),
        ((1, 4, 33, 3), "uint16"),
        ((1, 7, 20, 24), "uint32"),
        ((3, 5, 40, 37), "float32"),
    ],
)
def test_other_libraries_read_the_voxels(
    tmp_path: Path, format: str, shape: tuple[int, int, int, int], dtype: str
) -> None:
    if format == "png" and dtype not in ("uint8", "uint16"):
        pytest.skip("png holds labels of 8 and 16 bit only")
    path, voxels = exported(tmp_path, format, shape, dtype)
    read = by_others(path, format)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, voxels[0] if shape[0] == 1 else voxels)
    assert read_stamp(path, format) == STAMP
    ours = open_volume(str(path))
    assert ours.info.shape == shape
    assert ours.info.voxel_size_nm == (None if format == "png" else (40.0, 4.0, 5.0))
    np.testing.assert_array_equal(ours.read(Box.of_shape(ours.info.extent)), voxels)
    ours.close()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("format", ["h5", "tiff"])
def test_one_section_keeps_its_three_axes(tmp_path: Path, format: str) -> None:
    path, voxels = exported(tmp_path, format, (1, 1, 30, 20), "uint8")
    if format == "tiff":
        with tifffile.TiffFile(path) as tif:
            assert tif.series[0].get_shape(squeeze=False) == (1, 30, 20)
            assert len(tif.pages) == 1
    np.testing.assert_array_equal(by_others(path, format).reshape(voxels.shape), voxels)


def test_hdf5_conventions(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, "h5", (1, 10, 50, 40), "uint8")
    with h5py.File(path) as file:
        assert list(file) == ["main"]
        assert file["main"].chunks == (2, 16, 16) and file["main"].compression == "gzip"
        for holder in (file, file["main"]):
            np.testing.assert_array_equal(holder.attrs["voxel_size_nm"], (40.0, 4.0, 5.0))
            assert json.loads(holder.attrs["connectomics"]) == STAMP


def test_tiff_has_a_page_for_each_section_and_states_its_axes(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, "tiff", (3, 5, 40, 37), "float32")
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages) == 15 and tif.series[0].axes == "CZYX" and not tif.is_bigtiff
        assert tif.shaped_metadata[0]["voxel_size_nm"] == [40.0, 4.0, 5.0]


def test_large_tiff_is_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "CLASSIC_TIFF_BYTES", 100)
    path, _ = exported(tmp_path, "tiff", (1, 4, 33, 30), "uint8")
    with tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff


def test_png_names_are_padded_and_bytes_repeat(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 12, 20, 20), "uint16")
    for name in ("one", "two"):
        export_file(store, tmp_path / name, "png", STAMP)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == [f"{z:04}.png" for z in range(12)] + ["connectomics.json"]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.parametrize("format", ["h5", "tiff"])
def test_exports_repeat_byte_for_byte(tmp_path: Path, format: str) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 12, 50, 40), "uint16")
    for name in ("one", "two"):
        export_file(store, tmp_path / name, format, STAMP)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("format", FILES)
def test_what_stood_there_is_replaced(tmp_path: Path, format: str) -> None:
    path = export_path(tmp_path, "a", format)
    for value in ("first", "second"):
        store, voxels = filled(tmp_path / "work.zarr" / value, (1, 3, 20, 20), "uint8")
        export_file(store, path, format, {"result_key": value})
    np.testing.assert_array_equal(by_others(path, format), voxels[0])
    assert read_stamp(path, format) == {"result_key": "second"}


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint32"), (1, "float32"), (2, "uint8")])
def test_png_refuses_what_it_cannot_hold(tmp_path: Path, channels: int, dtype: str) -> None:
    store, _ = filled(tmp_path / "work.zarr", (channels, 2, 20, 20), dtype)
    path = tmp_path / "a_png"
    with pytest.raises(OutputError, match=r"another of inference\.output\.formats"):
        export_file(store, path, "png", STAMP)
    assert not path.exists()
    require_exportable(store.info, path, "tiff")


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint8"), (1, "uint16"), (1, "uint32"), (1, "float32"), (2, "uint8")]
)
def test_which_formats_hold_which_voxels(channels: int, dtype: str) -> None:
    holding = formats_holding(FORMATS, channels, np.dtype(dtype))
    small = channels == 1 and dtype in ("uint8", "uint16")
    assert holding == (FORMATS if small else tuple(f for f in FORMATS if f != "png"))


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(ConfigError, match="h5, zarr, tiff, png"):
        export_path(Path(), "a", "nifti")


def test_names() -> None:
    names = [export_path(Path("out"), "a.b_seg", f).name for f in FORMATS]
    assert names == [
        "a.b_seg.h5",
        "a.b_seg.zarr",
        "a.b_seg.tif",
        "a.b_seg_png",
        "a.b_seg.v2.zarr",
        "a.b_seg.n5",
        "a.b_seg.precomputed",
    ]


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("state", ["absent", "without stamp", "damaged", "not a mapping"])
def test_no_stamp_where_there_is_none(tmp_path: Path, format: str, state: str) -> None:
    path = export_path(tmp_path, "a", format)
    folder = format == "png"
    if state != "absent":
        store, _ = filled(tmp_path / "work.zarr", (1, 2, 20, 20), "uint8")
        export_file(store, path, format, STAMP)
    file = path / "connectomics.json" if folder else path
    if state == "damaged":
        file.write_bytes(file.read_bytes()[:40] if folder else b"garbage")
    if state == "without stamp":
        if format == "h5":
            with h5py.File(path, "a") as opened:
                del opened.attrs["connectomics"]
        elif format == "tiff":
            tifffile.imwrite(path, np.zeros((2, 20, 20), np.uint8))
        else:
            file.unlink()
    if state == "not a mapping":
        if format == "h5":
            with h5py.File(path, "a") as opened:
                opened.attrs["connectomics"] = "[1]"
        elif format == "tiff":
            tifffile.imwrite(path, np.zeros((2, 20, 20), np.uint8), metadata={"connectomics": [1]})
        else:
            file.write_text("[1]")
    assert read_stamp(path, format) is None


@pytest.mark.parametrize("format", ["h5", "tiff", "png"])
def test_other_voxels_read_back_are_noticed_before_the_name_appears(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 6, 40, 40), "uint8")
    path = export_path(tmp_path, "a", format)
    read, calls = Store.read, []

    def flipping(self: Store, box: Box) -> np.ndarray:
        block = read(self, box)
        calls.append(box)
        if len(calls) == 1:
            block[0, 0, 0, 0] ^= 1
        return block

    monkeypatch.setattr(Store, "read", flipping)
    with pytest.raises(OutputError, match="reads back with other voxels in"):
        export_file(store, path, format, STAMP)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["work.zarr"]


def test_another_shape_read_back_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 6, 40, 40), "uint8")

    def short(source: Store, path: Path, stamp: dict[str, object]) -> None:
        tifffile.imwrite(path, np.zeros((5, 40, 40), np.uint8), photometric="minisblack")

    monkeypatch.setattr(tiff, "TIFF", dataclasses.replace(tiff.TIFF, write=short))
    with pytest.raises(OutputError, match=r"reads back as \(1, 5, 40, 40\)"):
        export_file(store, tmp_path / "a.tif", "tiff", STAMP)


def test_memory_holds_a_slab_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 50 * 40)
    monkeypatch.setattr(tiff, "TILE", 32)
    store, _ = filled(tmp_path / "work.zarr", (1, 10, 50, 40), "uint8")
    read, largest = Store.read, []

    def watched(self: Store, box: Box) -> np.ndarray:
        largest.append(box.voxels)
        return read(self, box)

    monkeypatch.setattr(Store, "read", watched)
    for format in ("h5", "tiff", "png"):
        export_file(store, export_path(tmp_path, "a", format), format, STAMP)
    assert max(largest) <= 4 * 32 * 32


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 50, 41), "uint16"), ((2, 2, 33, 48), "float32"), ((1, 2, 16, 100), "uint8")]
)
def test_tiff_of_large_sections_is_tiled(
    tmp_path: Path, shape: tuple[int, int, int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1100)
    monkeypatch.setattr(tiff, "TILE", 16)
    read, largest = Store.read, []

    def watched(self: Store, box: Box) -> np.ndarray:
        block = read(self, box)
        largest.append(block.nbytes)
        return block

    monkeypatch.setattr(Store, "read", watched)
    path, voxels = exported(tmp_path, "tiff", shape, dtype)
    assert max(largest) <= 2 * 2 * 16 * 16 * np.dtype(dtype).itemsize * shape[0]
    with tifffile.TiffFile(path) as tif:
        assert tif.pages.first.is_tiled and len(tif.pages) == shape[0] * shape[1]
    np.testing.assert_array_equal(tifffile.imread(path).reshape(shape), voxels)
    assert read_stamp(path, "tiff") == STAMP


def test_hdf5_takes_no_space_for_pieces_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2 * 16 * 16)
    info = VolumeInfo((1, 8, 64, 64), np.dtype("uint8"), (2, 16, 16))
    store = create_store(tmp_path / "work.zarr", info, shard_shape=SHARD, attributes={})
    store.write(Box((4, 0, 32), (8, 32, 64)), np.ones((1, 4, 32, 32), np.uint8))
    export_file(store, tmp_path / "a.h5", "h5", STAMP)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["main"].id.get_num_chunks() == 8
        assert file["main"][:].sum() == 4 * 32 * 32 == file["main"][4:, :32, 32:].sum()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from connectomics.core.errors import OutputError
from connectomics.stages.output.export import export_file, export_path
from connectomics.volumes.store import open_store
folder = Path(sys.argv[1])
store = open_store(folder / "work.zarr")
export_file(store, folder / "warm.h5", "h5", {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), unlimited[1]))
path = export_path(folder, "a", sys.argv[2])
try:
    export_file(store, path, sys.argv[2], {})
except OutputError as error:
    assert str(path) in str(error) and "File too large" in str(error), error
    print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
"""


@pytest.mark.parametrize(("format", "limit"), [("h5", 30_000), ("h5", 0), ("tiff", 30_000), ("png", 3_000)])
def test_a_disk_that_takes_no_more_is_an_error_not_a_crash(tmp_path: Path, format: str, limit: int) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 20, 100, 100), "uint8")
    store.close()
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), format, str(limit)]
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith("COV")}  # its file would hit the limit
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=unmeasured)
    assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["warm.h5", "work.zarr"]


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "work.zarr", (1, 2, 20, 20), "uint8")
    for format in FILES:
        path = export_path(tmp_path / "absent", "a", format)
        with pytest.raises(OutputError, match="absent"):
            export_file(store, path, format, STAMP)


def test_the_file_below_hdf5_remembers_a_refused_truncation(tmp_path: Path) -> None:
    with _Sink(tmp_path / "a.h5") as sink:
        assert sink.write(b"voxels") == 6
        sink.require_written()
        assert sink.truncate(-1) == 0
        assert sink.write(b"more") == 4
        with pytest.raises(OSError, match="Invalid argument"):
            sink.require_written()
    assert (tmp_path / "a.h5").read_bytes() == b"voxels"
