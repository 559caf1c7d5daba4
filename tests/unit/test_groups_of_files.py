"""Folders of images: what their names mean, grey that was saved as colour, and names that are unusual."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.listing import group
from connectomics.volumes.opening import open_volume as open_reader
from connectomics.volumes.volume import VolumeReader

OPENED: list[VolumeReader] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Whatever a test opens is closed behind it."""
    yield
    while OPENED:
        OPENED.pop().close()


def open_volume(uri: str, *, axes: str | None = None, channels: int | None = None) -> VolumeReader:
    OPENED.append(open_reader(uri, axes=axes, channels=channels))
    return OPENED[-1]


GREY = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)


def folder_of(folder: Path, *names: str, pixels: np.ndarray = GREY) -> Path:
    for name in names:
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (("slice_0010", "slice_0011", "slice_0012"), (1, 3, 12, 10)),
        (("slice_0001", "slice_0002"), (1, 2, 12, 10)),
        (("slice_0000", "slice_0001"), (2, 1, 12, 10)),
        (("a_0000", "a_0001", "b_0000", "b_0001"), (2, 2, 12, 10)),
        (("a_0000", "a_0002", "b_0000", "b_0002"), (1, 4, 12, 10)),
        (("a_0000", "b_0000"), (1, 2, 12, 10)),
        (tuple(f"s_{i:04}" for i in range(5)), (1, 5, 12, 10)),
    ],
)
def test_channels_need_suffixes_from_0_that_every_stem_shares(
    tmp_path: Path, names: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    assert open_volume(str(folder_of(tmp_path, *names))).info.shape == shape


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("s1", "s2", "s3"), ""),
        (("s0010", "s0020", "s0030"), ""),
        (("s1", "s2", "s5", "s6", "s8"), "leave out 3 to 4, 7,"),
        (("s1", "s2", "s2 (copy)", "s3"), r"copies are read as sections of their own: s2 \(copy\)"),
        (("s1", "s2", "s2 - Copy", "s3"), "copies are read as sections of their own: s2 - Copy"),
        (("s1", "s1_mask", "s2", "s2_mask"), "masks beside the images is read as sections, too: s1_mask, s2_mask"),
        (("s1_ch0", "s1_ch1", "s2_ch0", "s2_ch1"), "the names count 2 channels, but each file is read as a section"),
        (("s_0000", "s_0001"), "2 files are read as the channels of one section"),
    ],
)
def test_what_may_be_a_mistake_is_noted(tmp_path: Path, names: tuple[str, ...], said: str) -> None:

    notes = " | ".join(open_volume(str(folder_of(tmp_path, *names))).info.notes)
    assert re.search(said, notes) if said else notes == ""


def grey_as(kind: str) -> Image.Image:
    grey = Image.fromarray(GREY)
    if kind == "palette":
        image = Image.fromarray(GREY, mode="P")
        image.putpalette([n for i in range(256) for n in (255 - i,) * 3])
        return image
    return grey.convert(kind)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "palette"])
def test_grey_saved_as_colour_is_one_channel(tmp_path: Path, kind: str) -> None:
    grey_as(kind).save(tmp_path / "a.png")
    expected = 255 - GREY if kind == "palette" else GREY
    for path in (tmp_path / "a.png", tmp_path):
        volume = open_volume(str(path))
        assert volume.info.shape == (1, 1, 12, 10)
        np.testing.assert_array_equal(volume.read(Box.of_shape(volume.info.extent))[0, 0], expected)
    samples = {"RGBA": 4, "LA": 2}.get(kind, 3)
    assert open_volume(str(tmp_path / "a.png"), channels=samples).info.channels == samples
    assert open_volume(str(tmp_path), axes="czyx").info.channels == samples


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16), "compression": "zlib"}, {"planarconfig": "separate"}])
def test_grey_tiff_saved_as_colour_is_one_channel(tmp_path: Path, layout: dict[str, object]) -> None:
    pages = np.random.default_rng(0).integers(0, 255, (3, 40, 50), dtype=np.uint8)
    stored = np.stack([pages] * 3, axis=1 if "planarconfig" in layout else 3)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **layout)
    volume = open_volume(str(tmp_path / "a.tif"))
    np.testing.assert_array_equal(volume.read(Box((1, 3, 4), (3, 30, 31)))[0], pages[1:3, 3:30, 4:31])
    assert volume.info.shape == (1, 3, 40, 50)
    assert open_volume(str(tmp_path / "a.tif"), channels=3).info.channels == 3


def test_colour_stays_and_a_coloured_section_among_grey_ones_is_named(tmp_path: Path) -> None:
    colour = np.stack([GREY, GREY + 1, GREY], axis=-1)
    for i in range(20):
        Image.fromarray(np.stack([GREY] * 3, axis=-1)).save(tmp_path / f"s{i}.png")
    Image.fromarray(colour).save(tmp_path / "s3.png")
    volume = open_volume(str(tmp_path))
    assert volume.info.channels == 1
    with pytest.raises(VolumeError, match=r"s3\.png is in colour.*state inference\.axes with c"):
        volume.read(Box.of_shape(volume.info.extent))
    assert open_volume(str(tmp_path), axes="czyx").read(Box((3, 0, 0), (4, 12, 10)))[1, 0, 0, 0] == 1
    Image.fromarray(colour).save(tmp_path / "s0.png")
    assert open_volume(str(tmp_path)).info.channels == 3


@pytest.mark.parametrize("name", ["a::b.h5", "a\\b.h5", "-x.h5", "::.h5", f"{'n' * 237}.h5"])
def test_unusual_names_are_opened_with_and_without_an_inner_part(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / name, "w") as file:
        file["main"] = file["other"] = np.zeros((2, 3, 4), np.uint8)
    for uri in (str(tmp_path / name), f"{tmp_path / name}::other"):
        assert open_volume(uri).info.shape == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("em.czi", b"anything", r"CZI is not read; convert it: bioformats2raw em\.czi em\.zarr"),
        ("em", b"ZISRAWFILE" + bytes(90), "CZI is not read; convert it: bioformats2raw em em.zarr"),
        ("em.jp2", b"anything", r"JPEG 2000 is not read; convert it: opj_decompress -i em\.jp2 -o em\.tif"),
        ("em.nd2", b"anything", r"\.nd2"),
        ("em.npz", b"anything", "save the array alone with numpy.save"),
        ("em", b"anything", "unknown format 'without suffix'"),
    ],
)
def test_what_is_not_read_names_a_converter(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=said):
        open_volume(str(tmp_path / name))


def test_a_knossos_folder_names_a_converter(tmp_path: Path) -> None:
    (tmp_path / "knossos.conf").write_text("experiment name")
    with pytest.raises(VolumeError, match="webknossos convert-knossos"):
        open_volume(str(tmp_path))


def test_a_name_that_is_no_utf8_is_refused_before_work_begins() -> None:
    first, second = group(["caf\udce9.h5", "café.h5"], 1)
    assert re.search(r"^caf\\xe9\.h5: its name has bytes that are no UTF-8.*rename it$", first.problem)
    assert second.problem == ""
