"""Folders as nnU-Net reads and writes them, against nnunetv2's own lists and readers."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
from PIL import Image

from connectomics.core.errors import ConfigError, OutputError, VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.formats.images import open_image
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.nnunet import folder as nnunet_folder
from connectomics.volumes.nnunet.folder import (
    FileKind,
    copy_descriptions,
    list_cases,
    require_single_image,
    stated_spacing,
    write_labels,
    write_spacing,
)
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import VolumeReader

from small_jobs import em_like, write_h5, write_png

PNG = FileKind("NaturalImage2DIO", ".png")


def labels_of(folder: Path, extent: tuple[int, int, int], largest: int) -> VolumeReader:
    array = np.random.default_rng(1).integers(0, largest, extent).astype(np.uint16)
    array[-1, -1, -1] = largest
    return open_volume(str(write_h5(folder / "labels.h5", array)))


def test_cases_are_those_nnunet_lists(tmp_path: Path) -> None:
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    for name in ("b_0000", "a_0001", "a_0000", "a_0000_0000", "B_0000", "a.b_0000", "10_0000", "9_0000"):
        write_png(tmp_path / f"{name}.png", (4, 4))
    (tmp_path / "notes.txt").touch()
    theirs = create_lists_from_splitted_dataset_folder(str(tmp_path), ".png", num_processes=1)
    assert [list(case.uris) for case in list_cases(tmp_path, PNG)] == theirs


def test_what_is_no_folder_of_cases(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be listed"):
        list_cases(tmp_path / "absent", PNG)
    with pytest.raises(ConfigError, match=r"holds no \*\.png"):
        list_cases(tmp_path, PNG)
    write_png(tmp_path / "a_0001.png")
    (case,) = list_cases(tmp_path, PNG)
    assert "found a_0001.png, expected a_0000.png" in case.problem
    write_png(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png has no channel number"):
        list_cases(tmp_path, PNG)


@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        ("NaturalImage2DIO", ".jpg"),
        ("Tiff3DIO", ".png"),
        ("SimpleITKIO", ".nrrd"),
        ("SimpleITKIOWithReorient", ".nii.gz"),
    ],
)
def test_other_files_are_refused(reader: str, ending: str) -> None:
    with pytest.raises(ConfigError, match=f"are {ending} read by {reader}"):
        FileKind(reader, ending)


def test_single_images_only(tmp_path: Path) -> None:
    for depth in (1, 3):
        path = tmp_path / f"s_{depth:04d}.tif"
        tifffile.imwrite(path, em_like((depth, 8, 9)), photometric="minisblack")
        source = VolumeSource("s", "s", (str(path),))
        if depth == 1:
            require_single_image(source)
            continue
        with pytest.raises(VolumeError, match="holds 3 sections"):
            require_single_image(source)


def test_grey_with_alpha_is_refused_as_nnunet_refuses_it(tmp_path: Path) -> None:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    path = tmp_path / "a_0000.png"
    Image.fromarray(em_like((8, 9, 2)), "LA").save(path)
    with pytest.raises(AssertionError):
        NaturalImage2DIO().read_images([str(path)])
    with pytest.raises(VolumeError, match=r"a_0000\.png: holds 2 channels, but .* takes grey, RGB or RGBA"):
        require_single_image(VolumeSource("a", "a", (str(path),)))


@pytest.mark.parametrize("text", ["", "[1]", '{"spacing": [1, 2]}', '{"spacing": [1, 0, 2]}', '{"spacing": "abc"}'])
def test_a_spacing_that_is_none(text: str, tmp_path: Path) -> None:
    source = VolumeSource("a", "a", (str(tmp_path / "a_0000.tif"),))
    assert stated_spacing(source, ".tif") is None
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(VolumeError, match=r"a\.json: does not state the spacing"):
        stated_spacing(source, ".tif")


def test_spacing_comes_back(tmp_path: Path) -> None:
    write_spacing(tmp_path / "a.json", (4.5, 1.0, 2.0))
    assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [4.5, 1.0, 2.0]}
    assert stated_spacing(VolumeSource("a", "a", (str(tmp_path / "a_0000.tiff"),)), ".tiff") == (4.5, 1.0, 2.0)


@pytest.mark.parametrize("largest", [2, 254, 255, 300])
@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_images_of_labels_are_nnunets(ending: str, largest: int, tmp_path: Path) -> None:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from skimage import io

    reader = labels_of(tmp_path, (1, 20, 31), min(largest, 254) if ending == ".bmp" else largest)  # BMP holds 8 bits
    labels = reader.read(Box.of_shape(reader.info.extent))[0]
    write_labels(reader, tmp_path / f"ours{ending}", FileKind("NaturalImage2DIO", ending))
    NaturalImage2DIO().write_seg(labels, str(tmp_path / f"theirs{ending}"), {})
    ours, theirs = (io.imread(tmp_path / f"{name}{ending}") for name in ("ours", "theirs"))
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("largest", [2, 255])
@pytest.mark.parametrize("ending", [".tif", ".tiff"])
def test_stacks_of_labels_are_nnunets(ending: str, largest: int, tmp_path: Path) -> None:
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    reader = labels_of(tmp_path, (5, 20, 31), largest)
    labels = reader.read(Box.of_shape(reader.info.extent))[0]
    write_labels(reader, tmp_path / f"ours{ending}", FileKind("Tiff3DIO", ending))
    Tiff3DIO().write_seg(labels, str(tmp_path / f"theirs{ending}"), {"spacing": [1, 2, 3]})
    ours, theirs = (tifffile.imread(tmp_path / f"{name}{ending}") for name in ("ours", "theirs"))
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [FileKind("Tiff3DIO", ".tif"), FileKind("NaturalImage2DIO", ".png")])
def test_a_file_that_reads_back_otherwise_never_appears(kind: FileKind, tmp_path: Path) -> None:
    reader = labels_of(tmp_path, (1, 20, 31), 3)
    other = open_image if kind.ending == ".png" else nnunet_folder.open_tiff
    wrong = write_png(tmp_path / "wrong.png", (20, 31)) if kind.ending == ".png" else tmp_path / "wrong.tif"
    if kind.ending == ".tif":
        tifffile.imwrite(wrong, em_like((1, 20, 31)), photometric="minisblack")
    stand_in = mock.Mock(side_effect=lambda source: other(nnunet_folder.Source(str(wrong), wrong, axes=source.axes)))
    with (
        mock.patch.object(nnunet_folder, other.__name__, stand_in),
        pytest.raises(OutputError, match="reads back with other voxels"),
    ):
        write_labels(reader, tmp_path / f"out{kind.ending}", kind)
    assert not (tmp_path / f"out{kind.ending}").exists()


def test_descriptions_are_copied_or_refused(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "output"
    for folder in (model, output):
        folder.mkdir()
    for name in ("dataset.json", "plans.json"):
        (model / name).write_text(f'"{name}"')
    copy_descriptions(model, output)
    copy_descriptions(model, output)
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        "dataset.json": '"dataset.json"',
        "plans.json": '"plans.json"',
    }
    with pytest.raises(OutputError, match="cannot be written"):
        copy_descriptions(model, tmp_path / "absent")
