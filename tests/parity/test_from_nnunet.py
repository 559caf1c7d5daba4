"""``from-nnunet`` beside the real ``nnUNetv2_predict``: the same arguments, the same files, the same labels."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
from nnunetv2.utilities.file_path_utilities import get_output_folder
from PIL import Image
from skimage import io

from connectomics.cli import main
from connectomics.core.errors import ConfigError
from connectomics.models.installed import installed_model

import oracle
from nnunet_models import DATASET_NAME, make_model
from parity_table import ParityCase, displaced, patch_of, scene, train, train_second_stage
from small_jobs import quick_folder

SHARE = 1e-4  # labels that may differ from stock nnU-Net, which adds windows up in half precision
OURS_ALONE = {"connectomics"}
THEIRS_ALONE = {"predict_from_raw_data_args.json"}
SHARE_EXACT = 1e-5  # ... and from nnU-Net in float32, with its own statistics
PNG_WORDS = ["-d", "901", "-c", "2d", "-f", "0", "1", "-step_size", "0.3", "--disable_tta"]
TIFF_WORDS = ["-d", DATASET_NAME, "-c", "3d_fullres", "-f", "all"]
CASCADE_WORDS = ["-d", DATASET_NAME, "-c", "3d_cascade_fullres", "-f", "0", "--disable_tta"]
SPACINGS = {"x": (1.0, 2.0, 1.0), "y": (2.6, 0.9, 1.2)}  # z has no file, hence (1, 1, 1)


@dataclass(frozen=True, slots=True)
class World:
    """Models, images and what the real command made of them."""

    folder: Path

    def words(self, kind: str, output: str, *more: str) -> list[str]:
        return ["from-nnunet", "system.num_cpus=1", *self.stated(kind, output), *more]

    def stated(self, kind: str, output: str) -> list[str]:
        """What both commands are told."""
        stated = {"png": PNG_WORDS, "tif": TIFF_WORDS, "cascade": CASCADE_WORDS}[kind]
        images = self.folder / ("tif" if kind == "cascade" else kind)
        first = ["-prev_stage_predictions", str(self.folder / "first")] if kind == "cascade" else []
        return ["-i", str(images), "-o", str(self.folder / output), *stated, *first, "-device", "cpu"]

    def theirs(self, kind: str) -> Path:
        return self.folder / f"theirs_{kind}"

    @property
    def environment(self) -> dict[str, str]:
        names = ("nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed")
        return {name: str(self.folder / name) for name in names}


def _models(folder: Path) -> None:
    results = folder / "nnUNet_results" / DATASET_NAME
    for dimensions, channels, folds, reader in ((2, 2, ("0", "1"), "NaturalImage2DIO"), (3, 1, ("all",), "Tiff3DIO")):
        case = ParityCase(dimensions, "plain", channels, "whole", dimensions == 2, "ZScoreNormalization", "uint8")
        make_model(
            results,
            dimensions=dimensions,
            channels=channels,
            classes=3,
            patch=patch_of(case),
            folds=folds,
            reader=reader,
            mirror_axes=(0,),
            spacing=(1.0, 1.0) if dimensions == 2 else (1.0, 2.0, 1.0),
            axis_order=(0, 1, 2) if dimensions == 2 else (1, 0, 2),
            give_weights=functools.partial(train, case=case),
        )
    make_model(
        results,
        dimensions=3,
        classes=3,
        patch=(8, 16, 16),
        reader="Tiff3DIO",
        spacing=(1.0, 2.0, 1.0),
        axis_order=(1, 0, 2),
        previous_stage="3d_lowres",
        give_weights=train_second_stage,
    )


def _images(folder: Path) -> None:
    for kind in ("png", "tif", "first"):
        (folder / kind).mkdir()
    for seed, (name, extent) in enumerate({"b": (75, 101), "a": (99, 117), "c_0001": (64, 48)}.items()):
        for channel, image in enumerate(scene(2, (1, *extent), seed)[0]):
            Image.fromarray((250 * image[0]).astype(np.uint8)).save(folder / "png" / f"{name}_{channel:04d}.png")
    for seed, name in enumerate("xyz"):
        image, classes = scene(1, (17 + seed, 34, 36), seed)
        tifffile.imwrite(folder / "tif" / f"{name}_0000.tif", (250 * image[0]).astype(np.uint8))
        tifffile.imwrite(folder / "first" / f"{name}.tif", displaced(classes).astype(np.uint8))
    for name, spacing in SPACINGS.items():
        (folder / "tif" / f"{name}.json").write_text(json.dumps({"spacing": spacing}))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Both folders predicted by the real command, and models found by nnU-Net."""
    with quick_folder() as folder:
        found = World(folder)
        for place in found.environment.values():
            Path(place).mkdir()
        _models(folder)
        _images(folder)
        for kind, output in (("png", "png"), ("tif", "tif"), ("tif", "tif_exact"), ("cascade", "cascade")):
            words = [*found.stated(kind, found.theirs(output).name), "-npp", "1", "-nps", "1"]
            oracle.command(words, found.environment, exact=output in ("tif_exact", "cascade"))
        yield found


@pytest.fixture(autouse=True)
def _names(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["png", "tif", "cascade"])
def test_the_same_arguments_leave_the_same_files(kind: str, world: World) -> None:
    assert main(world.words(kind, f"ours_{kind}", "-npp", "2", "--disable_progress_bar")) == 0
    theirs, ours = world.theirs(kind), world.folder / f"ours_{kind}"
    assert names(ours) - OURS_ALONE == names(theirs) - THEIRS_ALONE
    labels = sorted(theirs.glob("*.png" if kind == "png" else "*.tif"))
    assert len(labels) == 3
    differ = voxels = 0
    for path in labels:
        expected, found = io.imread(path), io.imread(ours / path.name)
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
        assert len(np.unique(expected)) == 3
        differ += int((expected != found).sum())
        voxels += expected.size
    assert differ <= (SHARE_EXACT if kind == "cascade" else SHARE) * voxels
    for path in theirs.glob("*.json"):
        if path.name not in THEIRS_ALONE:
            assert json.loads(path.read_text()) == json.loads((ours / path.name).read_text()), path.name


def test_nnunet_in_float32_agrees(world: World) -> None:
    assert main(world.words("tif", "ours_tif", "--continue_prediction")) == 0
    differ = voxels = 0
    for path in world.theirs("tif_exact").glob("*.tif"):
        expected = tifffile.imread(path)
        differ += int((expected != tifffile.imread(world.folder / "ours_tif" / path.name)).sum())
        voxels += expected.size
    assert voxels > 0
    assert differ <= SHARE_EXACT * voxels


def test_the_previous_stage_was_needed(world: World) -> None:
    """A second stage without its first is refused; with another first stage the labels are others."""
    words = world.words("cascade", "ours_other")
    assert main([word for word in words if word not in ("-prev_stage_predictions", str(world.folder / "first"))]) == 2
    words[words.index("-prev_stage_predictions") + 1] = str(world.theirs("tif"))
    assert main(words) == 0
    expected = tifffile.imread(world.theirs("cascade") / "x.tif")
    assert (expected != tifffile.imread(world.folder / "ours_other" / "x.tif")).mean() > 10 * SHARE


def test_resampling_was_needed(world: World) -> None:
    """The comparison above can fail: without the stated spacing the labels are others."""
    folder = world.folder / "bare"
    folder.mkdir()
    (folder / "y_0000.tif").write_bytes((world.folder / "tif" / "y_0000.tif").read_bytes())
    words = world.words("tif", "ours_bare")
    words[words.index("-i") + 1] = str(folder)
    assert main(words) == 0
    expected = tifffile.imread(world.theirs("tif") / "y.tif")
    assert (expected != tifffile.imread(world.folder / "ours_bare" / "y.tif")).mean() > 10 * SHARE


def test_models_are_found_as_nnunet_finds_them(world: World) -> None:
    with oracle.folders_of(world.environment):
        theirs = [get_output_folder(dataset, "T", "P", "c") for dataset in ("901", DATASET_NAME)]
    ours = [installed_model(dataset, "c", "P", "T", world.environment) for dataset in ("901", DATASET_NAME)]
    assert ours == [Path(path) for path in theirs]


def test_models_that_cannot_be_found(tmp_path: Path) -> None:
    environment = {"nnUNet_results": str(tmp_path / "results"), "nnUNet_raw": str(tmp_path / "raw")}
    for dataset, said in (("x", "expected the number"), ("7", "found no folder for Dataset007")):
        with pytest.raises(ConfigError, match=said):
            installed_model(dataset, "2d", "P", "T", environment)
    for name in ("raw/Dataset007_A", "results/Dataset007_B"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="found Dataset007_A, Dataset007_B"):
        installed_model("7", "2d", "P", "T", environment)
    with pytest.raises(ConfigError, match="nnUNet_results is not set"):
        installed_model("7", "2d", "P", "T", {})


def test_parts_together_are_the_whole_and_finished_cases_are_left_alone(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    output = world.folder / "parts"
    assert main(world.words("png", "parts", "-num_parts", "2", "-part_id", "1")) == 0
    assert names(output) - OURS_ALONE == {"b.png", "dataset.json", "plans.json"}
    record = json.loads((output / "connectomics" / "b_labels.run" / "provenance.json").read_text())
    assert record["tile_step_size"] == 0.3  # not 0.30000000000000004, which may be a window more
    (output / "b.png").write_bytes(b"made by another program")
    capsys.readouterr()
    assert main(world.words("png", "parts", "--continue_prediction")) == 0
    assert "done          2\nskipped       1" in capsys.readouterr().out
    assert (output / "b.png").read_bytes() == b"made by another program"
    assert main(world.words("png", "parts", "--save_probabilities")) == 0
    streams = capsys.readouterr()
    assert "not as .npz" in streams.err
    assert set(np.unique(io.imread(output / "b.png"))) == {0, 1, 2}
    kept = output / "connectomics" / "b_labels_probabilities.h5"
    assert str(kept) in streams.out
    assert main(world.words("png", "parts", "--save_probabilities", "--c")) == 0
    assert "skipped       3" in capsys.readouterr().out
