"""Image stacks: pixels as skimage gives them to nnU-Net, files grouped into sections, decoded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.io import imread

from connectomics.core.geometry import Box
from connectomics.volumes.formats import images
from connectomics.volumes.opening import open_volume

RNG = np.random.default_rng(8)


def pillow(mode: str) -> Image.Image:
    gray = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    if mode in ("I;16", "F", "I"):
        dtype = {"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
        return Image.fromarray(RNG.integers(0, 60000, (20, 30)).astype(dtype))
    if mode == "1":
        return Image.fromarray(gray > 100)
    if mode in ("RGB", "RGBA"):
        return Image.fromarray(RNG.integers(0, 256, (20, 30, len(mode)), dtype=np.uint8))
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray[::-1].copy())])
    if mode == "P":
        return Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).quantize(17)
    if mode == "CMYK":
        return Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert("CMYK")
    return Image.fromarray(gray)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "png") for mode in ("1", "L", "LA", "P", "I;16", "RGB", "RGBA")]
    + [
        ("L", "jpg"),
        ("RGB", "jpg"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
        ("L", "bmp"),
        ("P", "bmp"),
        ("RGB", "bmp"),
    ]
    + [("L", "tif"), ("RGB", "tif"), ("F", "tif"), ("I;16", "tif"), ("I", "tif")],
)
def test_pixels_are_those_of_skimage(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    pillow(mode).save(path)
    expected = imread(path)
    expected = expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0)
    for uri in (path, tmp_path):
        reader = open_volume(str(uri))
        assert reader.info.shape == (expected.shape[0], 1, 20, 30)
        np.testing.assert_array_equal(reader.read(Box((0, 0, 0), (1, 20, 30)))[:, 0], expected)
        assert reader.info.dtype == (np.uint8 if expected.dtype.kind == "b" else expected.dtype)
        reader.close()


def test_sixteen_bit_palette_with_transparency(tmp_path: Path) -> None:
    image = pillow("P")
    image.save(tmp_path / "a.png", transparency=3)
    reader = open_volume(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(
        reader.read(Box((0, 0, 0), (1, 20, 30)))[:, 0], np.moveaxis(imread(tmp_path / "a.png"), -1, 0)
    )
    reader.close()


def test_a_file_is_known_by_its_content_not_its_suffix(tmp_path: Path) -> None:
    gray = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "a.jpg", format="png")
    tifffile.imwrite(tmp_path / "b.png", gray)
    for name in ("a.jpg", "b.png"):
        reader = open_volume(str(tmp_path / name))
        np.testing.assert_array_equal(reader.read(Box((0, 0, 0), (1, 20, 30)))[0, 0], gray)
        reader.close()


def test_images_larger_than_pillows_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow("L").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    reader = open_volume(str(tmp_path / "a.png"))
    assert reader.read(Box((0, 0, 0), (1, 20, 30))).shape == (1, 1, 20, 30)
    reader.close()


def written(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        Image.fromarray(np.full((4, 6), i, np.uint8)).save(folder / name)


@pytest.mark.parametrize(
    ("names", "axes", "expected"),
    [
        (["s1.png", "s2.png", "s10.png"], None, [[0, 1, 2]]),
        (["a_0000.png", "a_0001.png"], None, [[0], [1]]),
        (["a_0000.png", "a_0001.png"], "zyx", [[0, 1]]),
        (["a_0000.png", "a_0001.png"], "cyx", [[0], [1]]),
        (["1.png", "2.png"], "cyx", [[0], [1]]),
        (["a_0000.png", "a_0001.png", "b_0000.png", "b_0001.png"], None, [[0, 2], [1, 3]]),
        (["a2_0000.png", "a10_0000.png"], None, [[0, 1]]),
        (["a_0000.png", "a_0001.png", "b.png"], None, [[0, 1, 2]]),
        ([f"a_{z:04}.png" for z in range(5)], None, [[0, 1, 2, 3, 4]]),
        ([f"a_{z:04}.png" for z in range(5)], "czyx", [[0], [1], [2], [3], [4]]),
        (["a_0000.png"], "yx", [[0]]),
    ],
)
def test_files_become_sections_and_channels(
    tmp_path: Path, names: list[str], axes: str | None, expected: list[list[int]]
) -> None:
    written(tmp_path, names)
    reader = open_volume(str(tmp_path), axes=axes)
    assert reader.read(Box((0, 0, 0), (len(expected[0]), 1, 1)))[..., 0, 0].tolist() == expected
    reader.close()


def test_images_may_be_turned(tmp_path: Path) -> None:
    gray = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "1.png")
    for uri, axes in ((tmp_path, "zxy"), (tmp_path / "1.png", "xy")):
        reader = open_volume(str(uri), axes=axes)
        np.testing.assert_array_equal(reader.read(Box((0, 1, 2), (1, 6, 4)))[0, 0], gray.T[1:, 2:])
        reader.close()


@pytest.mark.parametrize("limit", [128 << 20, 0])
def test_stripes_of_a_section_decode_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    written(tmp_path, [f"{z}_{c:04}.png" for z in range(3) for c in range(2)])
    decode: Callable[..., np.ndarray] = images._decoded
    decoded: list[str] = []

    def watched(source: images.Source, path: Path) -> np.ndarray:
        decoded.append(path.name)
        return decode(source, path)

    monkeypatch.setattr(images, "_decoded", watched)
    monkeypatch.setattr(images.RecentArrays.__init__, "__defaults__", (limit,))
    reader = open_volume(str(tmp_path))
    for z in range(3):
        for y in range(4):
            reader.read(Box((z, y, 0), (z + 1, y + 1, 6)))
    reader.close()
    assert len(decoded) == len(set(decoded)) == 6


def test_real_sections_are_those_of_skimage(shared_data: Path) -> None:
    folder = shared_data / "em" / "vnc" / "raw"
    reader = open_volume(str(folder), voxel_size_nm=(50.0, 4.6, 4.6))
    assert reader.info.shape == (1, 16, 1024, 1024) and reader.info.dtype == np.uint8
    block = reader.read(Box((11, 100, 200), (13, 400, 300)))
    for z in (11, 12):
        np.testing.assert_array_equal(block[0, z - 11], imread(folder / f"{z:02}.png")[100:400, 200:300])
    reader.close()
