"""Inputs that nnU-Net takes although they are odd: ``from-nnunet`` beside nnU-Net's own reading, in float32.

Channels of different types and nearly equal spacings, headers without a unit, labels and channels written by hand,
endings in upper case, folds that name labels otherwise, infinities that CTNormalization clips.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from connectomics.cli import main

from nnunet_models import make_model
from oracle import make_predictor, predict_files

SHARE = 1e-4
EXTENT = (10, 20, 18)
SECTION = (1, 40, 52)


def grey(seed: int, shape: tuple[int, ...], dtype: str = "u1", top: float = 255) -> Any:
    values = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return ((values - values.min()) / np.ptp(values) * top).astype(dtype)


@pytest.fixture(scope="module")
def section_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("s"), dimensions=2, patch=(32, 32), classes=3, folds=("0", "1"))


@pytest.fixture(scope="module")
def volume_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("v"),
        dimensions=3,
        patch=(8, 16, 16),
        classes=3,
        channels=2,
        reader="SimpleITKIO",
        spacing=(2.0, 1.0, 1.0),
        scheme=["CTNormalization", "NoNormalization"],
    )


def changed(model: Path, folder: Path, name: str = "dataset.json", **values: object) -> Path:
    """A copy of a model with other values in a JSON file, or keys removed where the value is None."""
    copy = shutil.copytree(model, folder / model.name)
    content = json.loads((copy / name).read_text()) | values
    (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


def same(model: Path, folder: Path, ending: str, load: Callable[[Path], Any], folds: str = "0") -> None:
    """Label files of ``folder/images`` by both programs; every file of nnU-Net's is there and equal."""
    images, theirs, ours = (folder / name for name in ("images", "theirs", "ours"))
    theirs.mkdir()
    predict_files(make_predictor(model, folds.split()), images, theirs)
    words = ["from-nnunet", "-i", str(images), "-o", str(ours), "-m", str(model), "-f", *folds.split()]
    assert main([*words, "-device", "cpu", "--disable_progress_bar", "system.num_cpus=1"]) == 0
    expected = {path.name: load(path) for path in theirs.iterdir() if path.name.endswith(ending)}
    assert expected
    for name, labels in expected.items():
        found = load(ours / name)
        assert (found.shape, found.dtype) == (labels.shape, labels.dtype)
        assert len(np.unique(labels)) > 1
        assert (found != labels).mean() <= SHARE


def png(path: Path) -> Any:
    return np.asarray(Image.open(path))


def nifti(path: Path) -> Any:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def write_itk(array: Any, path: Path, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))


def images_of(folder: Path) -> Path:
    (folder / "images").mkdir()
    return folder / "images"


def test_channels_of_other_types_spacings_within_tolerance_and_no_unit(volume_model: Path, tmp_path: Path) -> None:
    images = images_of(tmp_path)
    write_itk(grey(1, EXTENT, "i2"), images / "types_0000.nii.gz")
    write_itk(grey(2, EXTENT, "f4", 1), images / "types_0001.nii.gz")
    write_itk(grey(3, EXTENT, "f4"), images / "nounit_0000.nii.gz")
    plain = nibabel.Nifti1Image(grey(4, EXTENT[::-1], "f4", 1), np.diag([-1, -1, 2.0, 1]))
    plain.header.set_xyzt_units("unknown")
    nibabel.save(plain, images / "nounit_0001.nii.gz")
    write_itk(grey(5, EXTENT, "f4"), images / "near_0000.nii.gz", (1.0, 1.0, 2.0))
    write_itk(grey(6, EXTENT, "u1", 1), images / "near_0001.nii.gz", (1.0 + 4e-6, 1.0, 2.0))
    same(volume_model, tmp_path, ".nii.gz", nifti)


def test_channels_of_clearly_different_spacing_are_refused_as_by_nnunet(
    volume_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = images_of(tmp_path)
    for channel, x in enumerate((1.0, 1.01)):
        write_itk(grey(channel, EXTENT, "f4"), images / f"a_{channel:04d}.nii.gz", (x, 1.0, 2.0))
    with pytest.raises(RuntimeError):
        predict_files(make_predictor(volume_model, ["0"]), images, tmp_path)
    words = ["from-nnunet", "-i", str(images), "-o", str(tmp_path / "o"), "-m", str(volume_model), "-f", "0"]
    assert main([*words, "-device", "cpu", "--disable_progress_bar"]) == 3
    assert "all channels must agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reader", ["SimpleITKIO", *(pytest.param(other, marks=pytest.mark.long) for other in ("NibabelIO", "Tiff3DIO"))]
)
def test_infinities_that_ct_normalisation_clips(volume_model: Path, tmp_path: Path, reader: str) -> None:
    """SimpleITK's NIfTI reader makes zeros of them, the other readers give them to nnU-Net, which clips."""
    model = changed(volume_model, tmp_path / "m", "plans.json", image_reader_writer=reader)
    ending = ".tif" if reader == "Tiff3DIO" else ".nii.gz"
    model = changed(model, tmp_path / "n", file_ending=ending)
    images = images_of(tmp_path)
    for case, x in (("a", 1.3), ("b", 1.0)):  # a is resampled, so ranges of sections are used, too
        for channel, top in enumerate((255, 1)):
            image = grey(channel, EXTENT, "f4", top)
            if channel == 0:
                image[2:4, 3:9, 5:7], image[6, 1, 2:15] = np.inf, -np.inf
            if reader == "Tiff3DIO":
                tifffile.imwrite(images / f"{case}_{channel:04d}.tif", image, photometric="minisblack")
                (images / f"{case}.json").write_text(json.dumps({"spacing": [2.0, 1.0, x]}))
            else:
                write_itk(image, images / f"{case}_{channel:04d}.nii.gz", (x, 1.0, 2.0))
    same(model, tmp_path, ending, nifti if ending == ".nii.gz" else tifffile.imread)


def test_what_is_no_number_is_0_where_simpleitk_reads(volume_model: Path, tmp_path: Path) -> None:
    images = images_of(tmp_path)
    image = grey(1, EXTENT, "f4")
    image[0], image[3, 4:9, 5], image[4, 4:9, 5] = np.nan, np.nan, -np.inf
    write_itk(image, images / "a_0000.nii.gz")
    write_itk(image, images / "a_0001.nii.gz")
    same(volume_model, tmp_path, ".nii.gz", nifti)


@pytest.mark.parametrize("channel", [0, 1])
def test_what_no_normalisation_mends_is_refused(
    volume_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], channel: int
) -> None:
    model = changed(volume_model, tmp_path / "m", "plans.json", image_reader_writer="NibabelIO")
    images = images_of(tmp_path)
    for number in (0, 1):
        image = grey(number, EXTENT, "f4", 1)
        if number == channel:
            image[1, 2, 3] = np.nan if channel == 0 else np.inf
        write_itk(image, images / f"a_{number:04d}.nii.gz")
    words = ["from-nnunet", "-i", str(images), "-o", str(tmp_path / "o"), "-m", str(model), "-f", "0"]
    assert main([*words, "-device", "cpu", "--disable_progress_bar"]) == 3
    assert "NaN or infinite values in voxels (z, y, x) (1, 2, 3) to (2, 3, 4)" in capsys.readouterr().out


LABELS: dict[str, dict[str, object]] = {
    "text": {"labels": {"background": "0", "a": "1", "b": "2"}},
    "floats": {"labels": {"background": 0.0, "a": 1.0, "b": 2.0}},
    "lists of one": {"labels": {"background": 0, "a": ["1"], "b": [2.0]}},
    "channels from 1": {"channel_names": {"1": "EM"}},
    "channels by name": {"channel_names": {"EM": "grey"}},
    "channels as a list": {"channel_names": ["EM"]},
    "modality as a list": {"modality": ["EM"], "channel_names": None},
}


@pytest.mark.parametrize("stated", LABELS.values(), ids=LABELS)
def test_datasets_written_by_hand(section_model: Path, tmp_path: Path, stated: dict[str, object]) -> None:
    Image.fromarray(grey(1, SECTION)[0]).save(images_of(tmp_path) / "a_0000.png")
    same(changed(section_model, tmp_path, **stated), tmp_path, ".png", png)


def test_regions_whose_values_are_text_or_floats(tmp_path: Path) -> None:
    labels: dict[str, Any] = {"background": 0, "all": [1, 2], "inner": 2}
    made = make_model(tmp_path / "m", dimensions=2, patch=(32, 32), labels=labels, regions_class_order=[1, 2])
    model = changed(made, tmp_path / "c", labels={"background": 0, "all": ["1", 2.0], "inner": "2"})
    Image.fromarray(grey(1, SECTION)[0]).save(images_of(tmp_path) / "a_0000.png")
    same(model, tmp_path, ".png", png)


def test_folds_that_name_their_labels_otherwise(section_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(section_model, tmp_path / section_model.name)
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["init_args"]["dataset_json"]["labels"] = {"background": 0, "mitochondria": 1, "label_2": "2"}
    torch.save(content, path)
    Image.fromarray(grey(1, SECTION)[0]).save(images_of(tmp_path) / "a_0000.png")
    same(model, tmp_path, ".png", png, "0 1")


@pytest.mark.parametrize("ending", [".PNG", ".Bmp", ".TIF", ".tiff"])
def test_endings_of_single_images(section_model: Path, tmp_path: Path, ending: str) -> None:
    model = changed(section_model, tmp_path, file_ending=ending)
    Image.fromarray(grey(1, SECTION)[0]).save(images_of(tmp_path) / f"a_0000{ending}")
    same(model, tmp_path, ending, png)


def test_an_ending_in_upper_case_of_stacks(tmp_path: Path) -> None:
    made = make_model(tmp_path, dimensions=3, patch=(8, 16, 16), classes=3, reader="Tiff3DIO")
    model = changed(made, tmp_path / "upper", file_ending=".TIFF")
    tifffile.imwrite(images_of(tmp_path) / "a_0000.TIFF", grey(1, EXTENT), photometric="minisblack")
    same(model, tmp_path, ".TIFF", tifffile.imread)
    assert json.loads((tmp_path / "ours" / "a.json").read_text()) == json.loads(
        (tmp_path / "theirs/a.json").read_text()
    )


def test_files_with_the_ending_in_another_case_are_named(
    section_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = images_of(tmp_path) / "a_0000.PNG"
    Image.fromarray(grey(1, SECTION)[0]).save(image)
    words = ["from-nnunet", "-i", str(image.parent), "-o", str(tmp_path / "o"), "-m", str(section_model), "-f", "0"]
    assert main([*words, "-device", "cpu"]) == 2
    assert "it has .PNG, so rename these files to *.png" in capsys.readouterr().err
    image.rename(image.with_suffix(".png"))
    assert main([*words, "-device", "cpu", "--disable_progress_bar"]) == 0


def test_one_trained_fold_and_the_best_checkpoint_are_offered(
    section_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words that the message gives are followed, with from-nnunet's arguments and as configuration."""
    model = shutil.copytree(section_model, tmp_path / "Dataset004_EM" / section_model.name)
    shutil.rmtree(model / "fold_1")
    Image.fromarray(grey(1, SECTION)[0]).save(images_of(tmp_path) / "a_0000.png")
    words = ["from-nnunet", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "o"), "-m", str(model.parent)]
    words += ["-device", "cpu", "--disable_progress_bar"]
    for given in ([], ["-chk", "checkpoint_latest.pth"]):
        assert main([*words, *given]) != 0
        offered = capsys.readouterr().err.partition("(with from-nnunet ")[2].partition(")")[0].split()
        assert offered == ["-f", "0"]
        assert main([*words, *offered]) == 0
    final = model / "fold_0" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_best.pth"))
    capsys.readouterr()
    for command in (words, ["inspect", str(model.parent)]):
        assert main(command) != 0
        said = capsys.readouterr().err.partition("set ")[2].partition(" (with from-nnunet ")
        offered = said[2].partition(")")[0].split() if command is words else said[0].split()
        assert "checkpoint_best.pth" in " ".join(offered)
        assert main([*command, *offered]) == 0
