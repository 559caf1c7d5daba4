"""``from-nnunet``: what is refused, what is noted, and that one bad case leaves the others be."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from connectomics.assembly import shared_sample
from connectomics.cli import main
from connectomics.commands import from_nnunet
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.predict.precision_check import Agreement, FastContract

import oracle
from nnunet_models import make_model
from small_jobs import em_like, quick_folder, write_png


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        for reader, channels in (("NaturalImage2DIO", 3), ("Tiff3DIO", 1)):
            make_model(
                place / reader,
                dimensions=2 if channels == 3 else 3,
                channels=channels,
                patch=(16, 16) if channels == 3 else (4, 8, 8),
                features=(4, 8),
                reader=reader,
            )
        yield place


def model_in(folder: Path, reader: str = "NaturalImage2DIO") -> Path:
    (found,) = (folder / reader).iterdir()
    return found


def words(folder: Path, images: Path, output: Path, *more: str, reader: str = "NaturalImage2DIO") -> list[str]:
    model = ["-m", str(model_in(folder, reader)), "-f", "0", "-device", "cpu"]
    return ["from-nnunet", "-i", str(images), "-o", str(output), *model, *more, "system.num_cpus=1"]


def test_colours_are_channels_and_a_bad_case_leaves_the_others_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    write_png(images / "grey_0000.png")
    (images / "broken_0000.png").write_bytes(b"\x89PNG no more")
    colours = em_like((24, 32, 3), 4)
    Image.fromarray(colours).save(images / "colour_0000.png")
    assert main(words(folder, images, tmp_path / "out")) == 3
    streams = capsys.readouterr()
    assert "done          1\nskipped       0\nfailed        2" in streams.out
    assert "failed: broken" in streams.out
    assert "has 1 channels, the model expects 3" in streams.out
    manager = InferenceManager.from_checkpoint(model_in(folder), ["system.device=cpu", "system.num_cpus=1"])
    expected = manager.predict(np.moveaxis(colours, -1, 0)[:, None]).labels
    assert (np.asarray(Image.open(tmp_path / "out" / "colour.png")) == expected[0]).all()
    assert not (tmp_path / "out" / "grey.png").exists()


def test_no_case_is_begun_after_the_disk_is_full(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        tifffile.imwrite(tmp_path / f"{name}_0000.tif", em_like((5, 10, 11)))
        (tmp_path / f"{name}.json").write_text('{"spacing": [1, 1, 1]}')
    written: list[Path] = []

    def full(labels: object, target: Path, *more: object) -> None:
        written.append(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(from_nnunet, "write_labels", full)
    assert main(words(folder, tmp_path, tmp_path / "out", reader="Tiff3DIO")) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert [path.name for path in written] == ["a.tif"]
    assert "failed 3" in said and "failed: a: [Errno 28] No space left on device" in said
    assert said.count("not begun, because the disk of the results refused") == 2


def test_a_wrong_spacing_fails_its_case(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "in_0000.tif", em_like((5, 10, 11)))
    output = tmp_path / "out"
    arguments = words(folder, tmp_path, output, "--disable_progress_bar", reader="Tiff3DIO")
    (tmp_path / "in.json").write_text('{"spacing": [0, 1, 1]}')
    assert main(arguments) == 3
    assert "does not state the spacing" in capsys.readouterr().out
    (tmp_path / "in.json").write_text('{"spacing": [1, 1, 1]}')
    assert main([*arguments, "--verbose", "-nps", "4", "--not_on_device"]) == 0
    said = capsys.readouterr().err
    for word in ("nps", "verbose", "not_on_device"):
        assert f"note: {word} changes nothing here" in said
    assert (output / "in.tif").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-step_size", "1.5"], "-step_size is 1.5, expected"),
        (["-step_size", "0"], "-step_size is 0, expected"),
        (["-part_id", "1"], "-part_id is 1 and -num_parts 1"),
        (["-num_parts", "2", "-part_id", "-1"], "-part_id is -1"),
        (["-prev_stage_predictions", "x"], "-prev_stage_predictions x: is no folder"),
        (["-prev_stage_predictions", "."], "the model is no second stage of a cascade"),
        (["-d", "4"], "both name the model"),
        (["-f", "first"], "a fold is a number"),
    ],
)
def test_wrong_arguments(
    more: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "a_0000.png")
    assert main(words(folder, tmp_path, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--frobnicate"], ["-device", "tpu"], ["-num_parts", "x"]])
def test_arguments_nnunet_does_not_know_either(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words(folder, tmp_path, tmp_path / "out", *more))
    assert caught.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["from-nnunet", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "-device", "cpu"]
    assert main(place) == 2
    assert "no model is named" in capsys.readouterr().err
    model = ["-m", str(tmp_path / "model")]
    assert main([*place, *model]) == 3
    assert "there is no such folder; check -m" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert main([*place, *model]) == 3
    assert "plans.json: does not state image_reader_writer" in capsys.readouterr().err
    (tmp_path / "model" / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    (tmp_path / "model" / "dataset.json").write_text(json.dumps({"file_ending": 7}))
    assert main([*place, *model]) == 3
    assert "file_ending is '7', expected text" in capsys.readouterr().err
    (tmp_path / "model" / "dataset.json").write_text(json.dumps({"file_ending": ".nrrd"}))
    assert main([*place, *model]) == 2
    assert "are .nrrd read by SimpleITKIO" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["-device", "cuda"], ["-device", "mps"], ["--disable_tta"]])
def test_a_device_that_is_not_there(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing falls back to the CPU; without -device it is nnU-Net's default, cuda."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    write_png(tmp_path / "in" / "a_0000.png")
    arguments = words(folder, tmp_path / "in", tmp_path / "out")
    at = arguments.index("-device")
    assert main([*arguments[:at], *more, *arguments[at + 2 :]]) == 3
    name = "mps" if "mps" in more else "cuda"
    assert f"device '{name}' is not available: PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png"))


def test_folds_are_nnunets_default_and_missing_ones_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "in" / "a_0000.png")
    arguments = words(folder, tmp_path / "in", tmp_path / "out")
    at = arguments.index("-f")
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 3
    assert "fold_1/checkpoint_final.pth: there is no such file" in capsys.readouterr().err
    assert main([*arguments, "-chk", "checkpoint_best.pth"]) == 3
    assert "fold_0/checkpoint_best.pth: there is no such file" in capsys.readouterr().err


def test_spacings_are_those_of_the_files_axes_where_plans_transpose(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model",
        dimensions=3,
        patch=(4, 8, 8),
        features=(4, 8),
        reader="Tiff3DIO",
        spacing=(2.0, 1.0, 1.5),
        axis_order=(2, 0, 1),
    )
    image = em_like((5, 10, 11))
    spacings = {"fits": [1.0, 1.5, 2.0], "other": [2.0, 1.0, 1.5]}
    (tmp_path / "in").mkdir()
    for name, spacing in spacings.items():
        tifffile.imwrite(tmp_path / "in" / f"{name}_0000.tif", image)
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps({"spacing": spacing}))
    place = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *place, "system.num_cpus=1"]) == 0
    predictor = oracle.make_predictor(model, ["0"])
    for name, spacing in spacings.items():
        expected = oracle.predict(predictor, image[None], spacing=spacing)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / f"{name}.tif"), expected)
        assert len(np.unique(expected)) == 2


def test_planes_other_than_xy_are_resampled_where_sections_are_thick(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dimensions=2, patch=(16, 16), features=(4, 8), reader="Tiff3DIO")
    image = em_like((12, 10, 21))
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "v_0000.tif", image)
    (tmp_path / "in" / "v.json").write_text(json.dumps({"spacing": [1.7, 1.0, 1.0]}))
    place = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *place, "inference.planes=[xz]", "system.num_cpus=1"]) == 0
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))[None]
    expected = oracle.predict(oracle.make_predictor(model, ["0"]), turned, spacing=[1.0, 1.7, 1.0])
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "v.tif"), expected.transpose(1, 0, 2))
    assert len(np.unique(expected)) == 2


def test_cases_share_the_sample_of_fast_against_exact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(5):
        tifffile.imwrite(tmp_path / f"c{i}_0000.tif", em_like((5, 10, 11), i))
        (tmp_path / f"c{i}.json").write_text(json.dumps({"spacing": [1, 1, 1 + i % 2]}))
    measured: list[str] = []
    measure = FastContract.measure

    def noted(self: FastContract, *arguments: Any, **named: Any) -> Agreement:
        measured.append(named["name"])
        return measure(self, *arguments, **named)

    monkeypatch.setattr(FastContract, "measure", noted)
    monkeypatch.setattr(shared_sample, "SAMPLED_VOXELS", 2 * 550)
    fast = ["inference.precision=fast", "inference.max_disagreement=1"]
    assert main([*words(folder, tmp_path, tmp_path / "out", reader="Tiff3DIO"), *fast]) == 0
    assert len(measured) == len(set(measured)) < 5
    assert capsys.readouterr().err.count("for all volumes of this call") == 1
    stamps = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("connectomics/*.run/provenance.json")]
    assert len(stamps) == 5
    assert all({box[0] for box in stamp["agreement"]["boxes"]} == set(measured) for stamp in stamps)
