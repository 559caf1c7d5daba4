"""Axes, voxel sizes and names: what a file says, and what the caller says instead."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_channels, open_volume
from connectomics.volumes.source import Source
from connectomics.volumes.stored import Layout, RecentArrays, layout_of, row_chunk

from chunk_writers import write_n5, write_precomputed

SIZES = {"c": 2, "z": 3, "y": 4, "x": 5}


def source(axes: str | None = None) -> Source:
    return Source("a.h5", Path("a.h5"), None, axes)


ORDERS = [
    "".join(order) for count in (2, 3, 4) for order in itertools.permutations("czyx", count) if {"y", "x"} <= set(order)
]


@pytest.mark.parametrize("letters", ORDERS)
def test_every_order_of_axes_is_turned_into_czyx(letters: str) -> None:
    stored = np.arange(np.prod([SIZES[a] for a in letters])).reshape([SIZES[a] for a in letters])
    layout = layout_of(source(letters), stored.shape, None)
    missing = [a for a in "czyx" if a not in letters]
    expected = np.einsum(f"{letters}->{''.join(a for a in 'czyx' if a in letters)}", stored)
    expected = np.expand_dims(expected, tuple("czyx".index(a) for a in missing))
    assert layout.shape == expected.shape
    box = Box((0, 1, 2), (layout.shape[1], 3, 5))
    np.testing.assert_array_equal(layout.arrange(stored[layout.index(box)]), expected[:, :, 1:3, 2:5])


@given(st.text("cxyztq?", min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_any_letters_give_a_layout_or_a_named_error(letters: str, shape: list[int]) -> None:
    try:
        layout = layout_of(source(letters), shape, None)
    except VolumeError as error:
        assert "a.h5" in str(error)
    else:
        assert len(letters) == len(shape) and min(shape) > 0
        assert int(np.prod(layout.shape)) == int(np.prod(shape))


def test_without_letters_the_number_of_axes_decides() -> None:
    assert layout_of(source(), (4, 5), None).letters == "yx"
    assert layout_of(source(), (3, 4, 5), None).letters == "zyx"
    assert layout_of(source(), (2, 3, 4, 5), None).letters == "czyx"
    assert layout_of(source(), (4, 5, 3), "yxc").letters == "yxc"
    assert layout_of(source("zyx"), (4, 5, 3), "yxc").letters == "zyx"


def test_single_time_points_and_unknown_axes_are_dropped() -> None:
    layout = layout_of(source(), (1, 1, 2, 4, 5), "t?cyx")
    assert layout.shape == (2, 1, 4, 5)
    block = np.arange(40).reshape(1, 1, 2, 4, 5)
    np.testing.assert_array_equal(layout.arrange(block), block.reshape(2, 1, 4, 5))


def test_chunks_are_clipped_to_the_volume() -> None:
    assert Layout("xyz", (5, 4, 3)).chunk((64, 2, 1)) == (1, 2, 5)
    assert row_chunk((9, 4000, 1024), 1) == (1, 1024, 1024)
    assert row_chunk((4, 10_000_000), 8) == (1, 10_000_000)


def test_recent_arrays_are_bounded_and_the_latest_is_kept() -> None:
    recent, decoded = RecentArrays(limit_bytes=250), []

    def read(key: int, size: int = 100) -> None:
        def decode() -> np.ndarray:
            decoded.append(key)
            return np.full(size, key, np.uint8)

        assert recent.get(key, decode)[0] == key

    for key in (1, 2, 1, 3, 1, 2):
        read(key)
    assert decoded == [1, 2, 3, 2]
    read(9, 1000)
    read(9, 1000)
    assert decoded == [1, 2, 3, 2, 9]
    recent.clear()
    read(9)
    assert decoded[-2:] == [9, 9]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"voxel_size_nm": (30, 4, 5), "resolution": (30, 4, 5)}, (30.0, 4.0, 5.0)),
        ({"resolution": [30, 4, 5]}, (30.0, 4.0, 5.0)),
        ({"element_size_um": (0.03, 0.004, 0.005)}, (30.0, 4.0, 5.0)),
        ({"resolution": (0, 0, 0)}, None),
        ({}, None),
    ],
)
def test_hdf5_voxel_size(tmp_path: Path, attributes: dict[str, Any], expected: object) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["main"] = np.zeros((2, 3, 4), np.uint8)
        for name, value in attributes.items():
            file["main"].attrs[name] = value
    reader = open_volume(str(path))
    assert reader.info.voxel_size_nm == (None if expected is None else pytest.approx(expected))
    reader.close()
    stated = open_volume(str(path), voxel_size_nm=(50.0, 6.0, 7.0))
    assert stated.info.voxel_size_nm == (50.0, 6.0, 7.0)
    stated.close()


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"voxel_size_nm": (30, 4, 5), "resolution": (1, 1, 1)}, "`resolution` of `/main` says"),
        ({"resolution": (30, 4)}, "`resolution` of `/main` is .*expected three numbers"),
        ({"resolution": "fine"}, "`resolution` of `/main` is 'fine'"),
        ({"resolution": ["a", "b", "c"]}, "expected three numbers"),
        ({"voxel_size_nm": (0, 4, 4)}, "expected three positive numbers"),
        ({"voxel_size_nm": (np.nan, 4, 4)}, "expected three positive numbers"),
    ],
)
def test_hdf5_voxel_sizes_that_cannot_be_used_are_refused(
    tmp_path: Path, attributes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["main"] = np.zeros((2, 3, 4), np.uint8)
        file["main"].attrs.update(attributes)
    with pytest.raises(VolumeError, match=words) as caught:
        open_volume(str(path))
    assert "inference.voxel_size_nm" in str(caught.value)
    stated = open_volume(str(path), voxel_size_nm=(50.0, 6.0, 7.0))  # the remedy
    assert stated.info.voxel_size_nm == (50.0, 6.0, 7.0)
    stated.close()


def imagej(resolution: tuple[float, float] | None, **metadata: object) -> dict[str, Any]:
    return {"imagej": True, "resolution": resolution, "metadata": {"axes": "ZYX", **metadata}}


def ome_tiff(sizes: dict[str, object]) -> dict[str, Any]:
    physical = {f"PhysicalSize{axis}": size for axis, size in sizes.items()}
    return {"ome": True, "metadata": {"axes": "ZYX", **physical}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (imagej((250, 200), spacing=0.03, unit="micron"), (30, 5, 4)),
        (imagej((0.25, 0.2), spacing=30, unit="nm"), (30, 5, 4)),
        (imagej((250, 200), spacing=0.03, unit="\\u00B5m"), (30, 5, 4)),
        (imagej((1, 1), spacing=1, unit="pixel"), None),
        (imagej(None, spacing=1, unit="nm"), (1, 1, 1)),
        (imagej((1, 1), unit="nm"), None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        (ome_tiff({"X": 4}), None),
        (ome_tiff({a: 0.004 for a in "XYZ"}), (4, 4, 4)),
        (ome_tiff({a: 40 for a in "XYZ"} | {f"{a}Unit": "Å" for a in "XYZ"}), (4, 4, 4)),
        (ome_tiff({a: 40 for a in "XYZ"} | {f"{a}Unit": "pixel" for a in "XYZ"}), None),
    ],
)
def test_tiff_voxel_size(tmp_path: Path, options: dict[str, Any], expected: object) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 3, 4), np.uint8), photometric="minisblack", **options)
    reader = open_volume(str(tmp_path / "a.tif"))
    assert reader.info.shape == (1, 2, 3, 4)
    assert reader.info.voxel_size_nm == (None if expected is None else pytest.approx(expected))
    reader.close()


def test_broken_ome_xml_leaves_the_voxel_size_unknown(tmp_path: Path) -> None:
    xml = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image></OME>'
    data = np.zeros((2, 3, 4), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", description=xml, metadata=None)
    reader = open_volume(str(tmp_path / "a.tif"))
    assert reader.info.shape == (1, 2, 3, 4) and reader.info.voxel_size_nm is None
    reader.close()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ('PhysicalSizeZ="30" PhysicalSizeY="5" PhysicalSizeX="4"', (30000, 5000, 4000)),
        ('PhysicalSizeZ="thick" PhysicalSizeY="5" PhysicalSizeX="4"', None),
    ],
)
def test_ome_sizes_without_unit_are_micrometres(tmp_path: Path, pixels: str, expected: object) -> None:
    sizes = 'SizeX="4" SizeY="3" SizeZ="2" SizeC="1" SizeT="1"'
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" {sizes} {pixels}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData/></Pixels></Image></OME>'
    )
    data = np.zeros((2, 3, 4), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", description=xml, metadata=None)
    reader = open_volume(str(tmp_path / "a.tif"))
    assert reader.info.voxel_size_nm == (None if expected is None else pytest.approx(expected))
    reader.close()


def multiscales(**changes: Any) -> dict[str, Any]:
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    steps = [{"type": "scale", "scale": [30, 4, 5]}]
    return {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]} | changes


@pytest.mark.parametrize(
    ("changes", "letters", "voxel_size_nm"),
    [
        ({}, "zyx", (30, 4, 5)),
        ({"axes": [{"name": a, "type": "space"} for a in "zyx"]}, "zyx", None),
        ({"axes": list("xyz")}, "xyz", None),
        ({"axes": [{"name": a, "unit": "angstrom"} for a in "zyx"]}, "zyx", (3, 0.4, 0.5)),
        ({"axes": [{"name": a, "unit": "nanometer"} for a in "cyx"]}, "cyx", None),
        ({"axes": None}, "zyx", None),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_axes_and_units(
    tmp_path: Path, changes: dict[str, Any], letters: str, voxel_size_nm: object, version: int
) -> None:
    entry = {k: v for k, v in multiscales(**changes).items() if v is not None}
    attributes = {"multiscales": [entry]} if version == 2 else {"ome": {"multiscales": [entry]}}
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version, attributes=attributes)
    group.create_array("0", data=np.zeros((2, 3, 4), np.uint8))
    reader = open_volume(str(tmp_path / "a.zarr"))
    assert reader.info.shape == layout_of(source(), (2, 3, 4), letters).shape
    assert reader.info.voxel_size_nm == (None if voxel_size_nm is None else pytest.approx(voxel_size_nm))
    reader.close()


def test_zarr_dimension_names_are_axes(tmp_path: Path) -> None:
    for name, dims, expected in (
        ("a", [*"xyz"], (1, 4, 3, 2)),
        ("b", ["dim_0", "dim_1", "dim_2"], (1, 2, 3, 4)),
        ("c", [None, "Y", "X"], (1, 2, 3, 4)),
    ):
        path = tmp_path / f"{name}.zarr"
        zarr.create_array(path, shape=(2, 3, 4), dtype="u1", zarr_format=3, dimension_names=dims)
        reader = open_volume(str(path))
        assert reader.info.shape == expected
        reader.close()


def test_names_of_axes_that_nobody_knows_are_refused_until_the_axes_are_stated(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.create_array(path, shape=(2, 3, 4), dtype="u1", zarr_format=3, dimension_names=[*"abc"])
    with pytest.raises(VolumeError, match="unknown kind of length 2"):
        open_volume(str(path))
    stated = open_volume(str(path), axes="zyx")
    assert stated.info.shape == (1, 2, 3, 4)
    stated.close()


def test_zarr_inner_group_with_multiscales(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.create_array("raw", data=np.zeros((2, 3, 4), np.uint8))
    labels = root.create_group("labels/mito", attributes={"multiscales": [multiscales()]})
    labels.create_array("0", data=np.ones((2, 3, 4), np.uint8))
    reader = open_volume(f"{tmp_path / 'a.zarr'}::labels/mito")
    assert reader.info.voxel_size_nm == (30.0, 4.0, 5.0)
    assert reader.read(Box((0, 0, 0), (1, 1, 1))).item() == 1
    reader.close()


def test_tiff_time_axis_may_be_stated_as_z_but_is_not_guessed(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(VolumeError, match="time axis of length 5"):
        open_volume(str(tmp_path / "a.tif"))


def test_a_bad_voxel_size_is_a_volume_error(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4), np.uint8))
    with pytest.raises(VolumeError, match="positive"):
        open_volume(str(tmp_path / "a.tif"), voxel_size_nm=(0.0, 1.0, 1.0))


def test_phantom_uris_are_delegated() -> None:
    reader = open_volume("phantom:2x32x40")
    assert reader.info.extent == (2, 32, 40)
    reader.close()


def test_channels_must_agree(tmp_path: Path) -> None:
    for name, shape in {"a": (2, 3, 4), "c": (2, 3, 5)}.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros(shape, "u1"), photometric="minisblack")
    with pytest.raises(VolumeError, match=r"c\.tif cannot be a channel beside"):
        open_channels([str(tmp_path / "a.tif"), str(tmp_path / "c.tif")])
    with pytest.raises(VolumeError, match="no volume"):
        open_channels([])


@pytest.mark.parametrize("kinds", [("u1", "u2"), ("i2", "f4"), ("f8", "u1"), ("i4", "f2", "u1")])
def test_channels_of_different_types_become_float32_as_in_nnunet(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    names = []
    for number, kind in enumerate(kinds):
        names.append(str(tmp_path / f"a_{number:04d}.tif"))
        values = np.random.default_rng(number).uniform(0, 200, (3, 4, 5)) * (1 if kind[0] == "u" else -1.37)
        tifffile.imwrite(names[-1], values.astype(kind), photometric="minisblack")
    reader = open_channels(names, axes="zyx")
    found = reader.read(Box.of_shape(reader.info.extent))
    assert found.dtype == reader.info.dtype == np.float32
    np.testing.assert_array_equal(found, Tiff3DIO().read_images(names)[0])
    reader.close()


@pytest.mark.parametrize("name", ["a.h5", "a.zarr", "a.png"])
def test_a_format_loads_only_its_own_libraries(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["main"] = np.zeros((2, 3, 4), np.uint8)
    zarr.create_array(tmp_path / "a.zarr", shape=(2, 3, 4), dtype="u1", zarr_format=3)
    tifffile.imwrite(tmp_path / "a.png", np.zeros((3, 4), np.uint8))
    code = (
        "import sys, json; from connectomics.volumes.opening import open_volume; open_volume(sys.argv[1]);"
        "print(json.dumps([m for m in ('h5py', 'tensorstore', 'tifffile', 'torch') if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert json.loads(result.stdout) == {"a.h5": ["h5py"], "a.zarr": ["tensorstore"], "a.png": ["tifffile"]}[name]


def test_without_mrcfile_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mrc").write_bytes(b"MAP ")
    monkeypatch.setitem(sys.modules, "mrcfile", None)
    with pytest.raises(VolumeError, match=r"pip install -e '\.\[mrc\]' -c constraints\.txt"):
        open_volume(str(tmp_path / "a.mrc"))


def test_mrc_without_sampling_has_no_voxel_size(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrc", np.zeros((2, 3, 4), np.int16)) as file:
        file.header.mz = 0
    reader = open_volume(str(tmp_path / "a.mrc"))
    assert reader.info.voxel_size_nm is None and reader.info.spacing is None
    reader.close()


FACTORS = {"downsamplingFactors": [2, 2, 1]}
NM = {"pixelResolution": {"dimensions": [4, 5, 30], "unit": "nm"}}
COSEM = {"axes": ["z", "y", "x"], "units": ["nm"] * 3, "scale": [30, 5, 4], "translate": [300, 50, 40]}


@pytest.mark.parametrize(
    ("own", "above", "size", "origin"),
    [
        ({}, {}, None, (0, 0, 0)),
        (NM, {}, (30, 5, 4), (0, 0, 0)),
        ({"resolution": [4, 5, 30], "offset": [40, 50, 300]}, {}, (30, 5, 4), (300, 50, 40)),
        ({"resolution": [4, 5, 30], "units": ["nm", "nm", "um"]}, {}, (30e3, 5, 4), (0, 0, 0)),
        ({"resolution": [4, 5, 30], "units": ["nm", "nm", ""]}, {}, None, (0, 0, 0)),
        ({"pixelResolution": [4, 5, 30]}, {}, None, (0, 0, 0)),
        ({"pixelResolution": {"dimensions": [4, 5, 30]}}, {}, None, (0, 0, 0)),
        (FACTORS, NM, (30, 10, 8), (0, 0, 0)),
        (NM | FACTORS, {}, None, (0, 0, 0)),
        (FACTORS, {}, None, (0, 0, 0)),
        ({"transform": COSEM}, {}, (30, 5, 4), (300, 50, 40)),
        ({"transform": COSEM | {"translate": None}}, NM, (30, 5, 4), (0, 0, 0)),
        ({"transform": {"axes": ["z", "y", "x"]}}, {}, None, (0, 0, 0)),
    ],
)
def test_n5_voxel_size(tmp_path: Path, own: Any, above: Any, size: object, origin: object) -> None:
    write_n5(tmp_path / "a.n5/c0/s1", np.zeros((4, 3, 2), np.uint8), block=(4, 4, 4), **own)
    (tmp_path / "a.n5/c0/attributes.json").write_text(json.dumps(above))
    reader = open_volume(f"{tmp_path / 'a.n5'}::c0/s1")
    assert reader.info.voxel_size_nm == (None if size is None else pytest.approx(size))
    assert reader.info.origin_nm == pytest.approx(origin)
    reader.close()


@pytest.mark.parametrize("prefix", ["precomputed://", "precomputed://file://", ""])
@pytest.mark.parametrize("inner", ["::1", "::8_10_60"])
def test_precomputed_scales_by_number_and_key(tmp_path: Path, prefix: str, inner: str) -> None:
    levels = {"4_5_30": np.zeros((4, 3, 2, 1), np.uint8), "8_10_60": np.full((2, 2, 1, 1), 7, np.uint8)}
    write_precomputed(tmp_path / "em", levels)
    reader = open_volume(f"{prefix}{tmp_path / 'em'}{inner}")
    assert reader.info.shape == (1, 1, 2, 2) and reader.info.voxel_size_nm == (60.0, 10.0, 8.0)
    assert (reader.read(Box((0, 0, 0), (1, 2, 2))) == 7).all()
    reader.close()


def test_the_prefix_names_folders_only(tmp_path: Path) -> None:
    (tmp_path / "em").write_bytes(b"x")
    with pytest.raises(VolumeError, match="a file, where precomputed://"):
        open_volume(f"precomputed://{tmp_path / 'em'}")
    with pytest.raises(VolumeError, match="not gs://"):
        open_volume("precomputed://gs://bucket/em")
