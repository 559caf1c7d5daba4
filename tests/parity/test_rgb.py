"""Colour images: the labels are those nnU-Net gives on what its own reader reads from the same file."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image
from skimage import io

from connectomics.cli import main

import oracle
from nnunet_models import make_model
from parity_table import ParityCase, patch_of, scene, train
from small_jobs import infer_words, quick_folder

MODEL = "nnUNetTrainer__nnUNetPlans__2d"
EXTENT = (40, 61)
Write = Callable[[Path, np.ndarray], object]


def colours(channels: int, seed: int) -> np.ndarray:
    """An image (y, x, c) of the three classes that the models know."""
    planes = scene(channels, (1, *EXTENT), seed)[0][:, 0]
    return np.ascontiguousarray((255 * planes).astype(np.uint8).transpose(1, 2, 0))


def pillow(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path)


def palette(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).quantize(200).save(path)


def sixteen_bits(path: Path, image: np.ndarray) -> None:
    path.write_bytes(imagecodecs.png_encode(image.astype(np.uint16) * 257))


def planes(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(path, image.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")


def deflated(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(path, image, photometric="rgb", compression="zlib")


FILES: dict[str, tuple[int, str, Write]] = {  # channels, ending, writer
    "rgb": (3, ".png", pillow),
    "palette": (3, ".png", palette),
    "rgb16": (3, ".png", sixteen_bits),
    "rgba": (4, ".png", pillow),
    "bmp": (3, ".bmp", pillow),
    "tif": (3, ".tif", pillow),
    "planes": (3, ".tif", planes),
    "deflated": (3, ".tif", deflated),
    "tif_alpha": (4, ".tif", pillow),
}


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    """Models of three and of four colours, for each ending; every file in a folder of its own."""
    with quick_folder() as folder:
        for channels in (3, 4):
            case = ParityCase(2, "plain", channels, "whole", True, "RescaleTo01Normalization", "uint8")
            made = make_model(
                folder / str(channels),
                dimensions=2,
                channels=channels,
                classes=3,
                patch=patch_of(case),
                scheme="RGBTo01Normalization",
                give_weights=functools.partial(train, case=case),
            )
            for ending in (".png", ".bmp", ".tif"):
                target = folder / f"{channels}{ending}" / MODEL
                shutil.copytree(made, target)
                dataset = json.loads((made / "dataset.json").read_text())
                names = dict(zip("0123", "RGBA"[:channels], strict=False))
                (target / "dataset.json").write_text(
                    json.dumps(dataset | {"channel_names": names, "file_ending": ending})
                )
        for seed, (name, (channels, ending, write)) in enumerate(FILES.items()):
            (folder / name).mkdir()
            write(folder / name / f"{name}_0000{ending}", colours(channels, seed))
        yield folder


def expected_labels(model: Path, path: Path) -> np.ndarray:
    """nnU-Net's labels (y, x) of a file read by its own reader."""
    torch.set_num_threads(1)
    image, properties = NaturalImage2DIO().read_images([str(path)])
    labels: np.ndarray = oracle.predict(oracle.make_predictor(model, ["0"]), image, spacing=properties["spacing"])
    assert len(np.unique(labels)) == 3
    return labels[0]


def inferred(model: Path, output: Path, volume: Path, stem: str) -> np.ndarray:
    assert main(infer_words(model, output, volume)) == 0
    with h5py.File(output / f"{stem}_labels.h5") as file:
        return np.asarray(file["main"])


@pytest.mark.parametrize("name", list(FILES))
def test_a_colour_image_is_labelled_as_nnunet_labels_it(world: Path, tmp_path: Path, name: str) -> None:
    channels, ending, _ = FILES[name]
    model, path = world / f"{channels}{ending}" / MODEL, world / name / f"{name}_0000{ending}"
    expected = expected_labels(model, path)
    words = ["-i", str(path.parent), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *words, "system.num_cpus=1"]) == 0
    np.testing.assert_array_equal(io.imread(tmp_path / "out" / f"{name}{ending}"), expected)
    plain = tmp_path / f"plain{ending}"
    shutil.copy(path, plain)
    for file, stem in ((path, name), (plain, "plain")):
        np.testing.assert_array_equal(inferred(model, tmp_path / f"inferred_{stem}", file, stem)[0], expected)


@pytest.mark.parametrize("names", [["a", "b", "c"], [f"s_{i:04d}" for i in range(3)]])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_folder_of_colour_images_is_a_stack(world: Path, tmp_path: Path, ending: str, names: list[str]) -> None:
    model, stack = world / f"3{ending}" / MODEL, tmp_path / "stack"
    stack.mkdir()
    for seed, name in enumerate(names):
        pillow(stack / f"{name}{ending}", colours(3, seed))
    labels = inferred(model, tmp_path / "out", stack, "stack")
    np.testing.assert_array_equal(labels, [expected_labels(model, stack / f"{name}{ending}") for name in names])


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_other_colours_are_refused(world: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """nnU-Net's reader or network breaks on each of them."""
    path, model = tmp_path / "in" / "a_0000.png", world / "3.png" / MODEL
    path.parent.mkdir()
    Image.fromarray(colours(4, 1)).convert(mode).save(path)
    with pytest.raises((AssertionError, LookupError, RuntimeError)):
        expected_labels(model, path)
    count = len(mode)
    assert main(infer_words(model, tmp_path / "out", path)) == 3
    assert f"has {count} channels, the model expects 3" in capsys.readouterr().out
    words = ["-i", str(path.parent), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *words]) == 3
    said = "holds 2 channels, but" if mode == "LA" else f"has {count} channels, the model expects 3 (R, G, B)"
    assert said in capsys.readouterr().out
