"""NAME.json beside a TIFF: the spacing nnU-Net's Tiff3DIO reads, against that reader itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_channels, open_volume
from connectomics.volumes.volume import VolumeInfo

VOXELS = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)


def written(folder: Path, name: str = "cell_0000.tif") -> str:
    tifffile.imwrite(folder / name, VOXELS, photometric="minisblack")
    return str(folder / name)


def test_spacing_and_voxels_are_those_of_tiff3dio(tmp_path: Path) -> None:
    names = [written(tmp_path), written(tmp_path, "cell_0001.tif")]
    (tmp_path / "cell.json").write_text(json.dumps({"spacing": [50, 8.5, 4]}))
    voxels, properties = Tiff3DIO().read_images(names)
    reader = open_channels(names)
    assert reader.info.spacing == tuple(properties["spacing"]) == (50.0, 8.5, 4.0)
    assert reader.info.voxel_size_nm is None
    np.testing.assert_array_equal(reader.read(Box.of_shape(reader.info.extent)), voxels)
    reader.close()


def test_a_segmentation_has_its_own_name(tmp_path: Path) -> None:
    name = written(tmp_path, "cell.tiff")
    (tmp_path / "cell.json").write_text(json.dumps({"spacing": [50, 8.5, 4]}))
    _, properties = Tiff3DIO().read_seg(name)
    reader = open_volume(name)
    assert reader.info.spacing == tuple(properties["spacing"])
    reader.close()


def test_a_numbered_volume_may_have_its_own_file(tmp_path: Path) -> None:
    name = written(tmp_path, "cell_0007.tif")
    (tmp_path / "cell_0007.json").write_text(json.dumps({"spacing": [3, 2, 1]}))
    reader = open_volume(name)
    assert reader.info.spacing == (3.0, 2.0, 1.0)
    reader.close()


@pytest.mark.parametrize("text", [None, "{}", "[1, 2, 3]", '{"pixels": [1, 2, 3]}', " " * (1 << 20) + "{}"])
def test_without_a_stated_spacing_there_is_none(tmp_path: Path, text: str | None) -> None:
    name = written(tmp_path)
    if text is not None:
        (tmp_path / "cell.json").write_text(text)
    reader = open_volume(name)
    assert reader.info.spacing is None
    reader.close()


def test_the_spacing_is_part_of_the_identity(tmp_path: Path) -> None:
    name, identities = written(tmp_path), []
    for spacing in ([3, 2, 1], [3, 2, 2]):
        (tmp_path / "cell.json").write_text(json.dumps({"spacing": spacing}))
        reader = open_volume(name)
        identities.append(reader.identity)
        reader.close()
    assert identities[0] != identities[1]


@pytest.mark.parametrize(
    "value", ["[1, 2]", "[1, 2, 0]", "[1, 2, -3]", "[1, 2, NaN]", "[[1], [2], [3]]", '["1", 2, 3]', "3", "null",
              "[true, 1, 1]", "[1e999, 1, 1]", str(list(range(99)))]
)  # fmt: skip
def test_an_impossible_spacing_is_refused(tmp_path: Path, value: str) -> None:
    name = written(tmp_path)
    (tmp_path / "cell.json").write_text(f'{{"spacing": {value}}}')
    with pytest.raises(VolumeError, match=r"cell_0000\.tif: cell\.json beside it states spacing .* three positive"):
        open_volume(name)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    name = written(tmp_path)
    (tmp_path / "cell.json").write_bytes(content)
    with pytest.raises(VolumeError, match=r"cannot read cell\.json"):
        open_volume(name)


def test_sections_of_a_stack_do_not_look_for_it(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "1.tif", VOXELS[0])
    (tmp_path / "1.json").write_text("{")
    reader = open_volume(str(tmp_path))
    assert reader.info.spacing is None
    reader.close()


def test_channels_of_different_spacing_are_refused(tmp_path: Path) -> None:
    names = [written(tmp_path, "a.tif"), written(tmp_path, "b.tif")]
    (tmp_path / "b.json").write_text('{"spacing": [1, 2, 3]}')
    for stated in (None, "[1, 2, 3]", "[1.000001, 2, 3]"):  # equal as numpy's allclose has it, which nnU-Net asks
        if stated:
            (tmp_path / "a.json").write_text(f'{{"spacing": {stated}}}')
        reader = open_channels(names)
        np.testing.assert_allclose(reader.info.spacing, (1, 2, 3), rtol=1e-5)
        reader.close()
    (tmp_path / "a.json").write_text('{"spacing": [1.001, 2, 3]}')
    with pytest.raises(VolumeError, match=r"b\.tif cannot be a channel.*spacing"):
        open_channels(names)


def test_a_volume_info_refuses_an_impossible_spacing() -> None:
    with pytest.raises(ValueError, match="spacing must be"):
        VolumeInfo((1, 2, 3, 4), np.dtype("u1"), (1, 1, 1), spacing=(1.0, 0.0, 1.0))
