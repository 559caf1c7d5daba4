"""``connectomics verify`` passes where nnU-Net agrees and fails, saying where, when anything was tampered with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from connectomics.cli import main

from nnunet_models import make_model
from parity_table import displaced, scene, train_second_stage

CPU = ["system.device=cpu", "system.num_cpus=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a volume of three sections, and the labels that a run wrote."""
    folder = tmp_path_factory.mktemp("world")
    model = make_model(folder / "model", dimensions=2, patch=(32, 32), classes=3, folds=("0", "1"), seed=2)
    volume = folder / "v.h5"
    with h5py.File(volume, "w") as file:
        file["main"] = (scene(1, (3, 90, 110), 4)[0][0] * 255).astype(np.uint8)
    words = [f"inference.volume_mode.file_list=['{volume}']", f"inference.data.output_path={folder}", "model.folds=[0]"]
    assert main(["infer-volume", "--checkpoint", str(model), *CPU, *words]) == 0
    return model, volume, folder / "v_labels.h5"


def verified(tmp_path: Path, *words: str) -> tuple[int, dict[str, object]]:
    path = tmp_path / "certificate.json"
    code = main(["verify", *words, "--certificate", str(path), *CPU])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_an_untouched_model_passes(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, volume, output = world
    words = [str(model), str(volume), "model.folds=[0]", "--threshold", "1e-3"]
    for given in ([], [str(output)]):
        code, certificate = verified(tmp_path, *words, *given)
        assert code == 0
        assert certificate["passed"] is True
        samples = certificate["samples"]
        assert [s["scope"] for s in samples] == ["case"] * 3  # type: ignore[attr-defined]
        assert {"connectomics", "nnunetv2", "torch"} <= set(certificate["versions"])  # type: ignore[call-overload]


def test_both_networks_take_as_many_threads_as_are_stated(
    world: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, volume, _ = world
    seen, forward, before = set(), nn.Conv2d.forward, torch.get_num_threads()

    def counted(self: nn.Conv2d, values: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return forward(self, values)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    torch.set_num_threads(3)
    try:
        assert verified(tmp_path, str(model), str(volume), "model.folds=[0]")[0] in (0, 3)
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_another_model_fails(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, volume, output = world
    code, certificate = verified(tmp_path, str(model), str(volume), str(output), "model.folds=[1]")
    assert (code, certificate["passed"]) == (3, False)


@pytest.mark.parametrize(
    "word", ["inference.sliding_window.overlap=0.1", "inference.test_time_augmentation.flip_axes=[1]"]
)
def test_another_setting_fails(world: tuple[Path, Path, Path], tmp_path: Path, word: str) -> None:
    model, volume, _ = world
    code, certificate = verified(tmp_path, str(model), str(volume), "model.folds=[0]", word)
    assert (code, certificate["passed"]) == (3, False)
    assert certificate["deviations"]


def test_one_tampered_window_fails_and_is_located(
    world: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, volume, output = world
    tampered = tmp_path / "tampered.h5"
    with h5py.File(output) as before, h5py.File(tampered, "w") as after:
        labels = before["main"][:]
        labels[1, 40:72, 16:48] = (labels[1, 40:72, 16:48] + 1) % 3
        after["main"] = labels
    words = [str(model), str(volume), str(tampered), "model.folds=[0]", "--threshold", "1e-3"]
    code, certificate = verified(tmp_path, *words)
    assert code == 3
    before_it, hit, after_it = certificate["samples"]  # type: ignore[misc]
    assert max(before_it["differ"], after_it["differ"]) < 10
    assert abs(hit["differ"] - 32 * 32) < 10
    assert hit["where"]["start"][0] == 1
    assert hit["where"]["start"][1:] <= [40, 16]
    assert hit["where"]["stop"][1:] >= [72, 48]
    assert "differences lie in z 1-1" in capsys.readouterr().out


def test_a_large_volume_is_compared_on_its_middle(tmp_path: Path) -> None:
    model = make_model(tmp_path, dimensions=3, patch=(8, 16, 16), classes=3, reader="SimpleITKIO", seed=2)
    volume = tmp_path / "v.h5"
    with h5py.File(volume, "w") as file:
        file["main"] = (scene(1, (20, 40, 30), 4)[0][0] * 255).astype(np.uint8)
    words = [str(model), str(volume), "--max-voxels", "8000", "--threshold", "1e-2"]
    code, certificate = verified(tmp_path, *words)
    assert code == 0
    (sample,) = certificate["samples"]  # type: ignore[misc]
    assert sample["scope"] == "crop"
    assert sample["box"] == {"start": [5, 10, 7], "stop": [15, 30, 22]} or sample["voxels"] <= 8000
    with h5py.File(tmp_path / "labels.h5", "w") as file:
        file["main"] = np.zeros((20, 40, 30), np.uint8)
    assert verified(tmp_path, *words, str(tmp_path / "labels.h5"))[0] == 3


@pytest.mark.parametrize("words", [[], ["inference.resample=plan", "inference.spacing=[1.3,0.9,4.6]"]])
def test_transposed_plans_are_told_the_spacing_of_the_volume(tmp_path: Path, words: list[str]) -> None:
    model = make_model(
        tmp_path,
        dimensions=3,
        patch=(8, 16, 16),
        classes=3,
        reader="SimpleITKIO",
        spacing=(4.0, 1.0, 1.0),
        axis_order=(2, 0, 1),
        seed=4,
    )
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = (scene(1, (20, 26, 12), 4)[0][0] * 255).astype(np.uint8)
    code, _ = verified(tmp_path, str(model), str(tmp_path / "v.h5"), "--threshold", "1e-2", *words)
    assert code == 0


@pytest.mark.parametrize("given", ["model", "volume"])
def test_a_second_stage_is_verified_with_its_first(tmp_path: Path, given: str) -> None:
    common: dict[str, object] = {"dimensions": 3, "patch": (8, 16, 16), "classes": 3, "reader": "SimpleITKIO"}
    first = make_model(tmp_path / "first", name="3d_lowres", seed=5, spacing=(2.0, 1.0, 1.0), **common)  # type: ignore[arg-type]
    second = make_model(
        tmp_path / "second",
        previous_stage="3d_lowres",
        give_weights=train_second_stage,
        **common,  # type: ignore[arg-type]
    )
    image, classes = scene(1, (12, 20, 24), 4)
    for name, array in (("v", image[0] * 255), ("labels", displaced(classes)), ("wrong", displaced(classes)[::-1])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["main"] = array.astype(np.uint8)
    previous = f"model.previous_stage='{first if given == 'model' else tmp_path / 'labels.h5'}'"
    words = [str(second), str(tmp_path / "v.h5"), "--threshold", "1e-2", "inference.resample=plan"]
    words += ["inference.spacing=[1.3,0.9,1.1]", "inference.test_time_augmentation.enabled=false"]
    assert verified(tmp_path, *words, previous)[0] == 0
    place = f"inference.data.output_path={tmp_path}/out"
    volume = f"inference.volume_mode.file_list=['{tmp_path}/v.h5']"
    other = f"model.previous_stage='{tmp_path / 'wrong.h5'}'"
    assert main(["infer-volume", "--checkpoint", str(second), *CPU, *words[4:], volume, place, other]) == 0
    assert verified(tmp_path, *words, previous, str(tmp_path / "out" / "v_labels.h5"))[0] == 3
    assert verified(tmp_path, *words)[0] == 2


def test_an_output_of_another_shape_is_refused(
    world: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, volume, _ = world
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file["main"] = np.zeros((3, 9, 9), np.uint8)
    assert verified(tmp_path, str(model), str(volume), str(tmp_path / "small.h5"))[0] == 3
    assert "give the labels of this volume" in capsys.readouterr().err
    assert verified(tmp_path, str(model), str(volume), "a.h5", "b.h5")[0] == 2


@pytest.mark.parametrize(
    ("model", "fold"),
    [
        ("vnc_mito_2d", "0"),
        pytest.param("vnc_multi_2d", "all", marks=pytest.mark.long),
        pytest.param("vnc_mito_3d", "0", marks=pytest.mark.long),
    ],
)
def test_the_shared_models_pass(shared_data: Path, tmp_path: Path, model: str, fold: str) -> None:
    sections = [np.asarray(Image.open(shared_data / "em" / "vnc" / "raw" / f"{z:02d}.png")) for z in range(12, 16)]
    image = np.stack(sections)[:1, :700, :800] if model.endswith("2d") else np.stack(sections)[:, 300:700, 300:600]
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["main"] = image
    words = [str(shared_data / "models" / model), str(tmp_path / "em.h5"), f"model.folds=[{fold}]"]
    words.append("inference.test_time_augmentation.enabled=false")
    if model.endswith("3d"):
        words += ["inference.resample=plan", "inference.spacing=[45,4.6,4.6]"]
    code, certificate = verified(tmp_path, *words)
    assert (code, certificate["passed"]) == (0, True)


def test_reproduce_prints_a_command_that_makes_the_same_bytes(
    world: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    _, _, output = world
    assert main(["reproduce", str(output)]) == 0
    program, *words = shlex.split(capsys.readouterr().out)
    assert program == "connectomics"
    assert main([*words, f"inference.data.output_path={tmp_path}"]) == 0
    assert (tmp_path / output.name).read_bytes() == output.read_bytes()
    (tmp_path / "v_labels.run" / "provenance.json").unlink()
    assert main(["reproduce", str(tmp_path / output.name)]) == 3
    assert "restore the RUN folder" in capsys.readouterr().err
    (tmp_path / "other_labels.h5").write_bytes(b"")
    assert main(["reproduce", str(tmp_path / "other_labels.h5")]) == 3


def test_reproduce_refuses_the_record_of_another_result(
    world: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, output = world
    (tmp_path / output.name).write_bytes(output.read_bytes())
    record = output.parent / "v_labels.run" / "provenance.json"
    changed = json.loads(record.read_text()) | {"result_keys": {"labels": "0"}}
    (tmp_path / "v_labels.run").mkdir()
    (tmp_path / "v_labels.run" / "provenance.json").write_text(json.dumps(changed))
    assert main(["reproduce", str(tmp_path / output.name)]) == 3
    assert "another result" in capsys.readouterr().err


def test_an_ensemble_is_verified_model_by_model(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, volume, _ = world
    assert verified(tmp_path, str(model), str(volume), f"model.ensemble=['{model}']") == (2, {})


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two channels that NibabelIOWithReorient reads, and two cases, one of the plan's spacing."""
    folder = tmp_path_factory.mktemp("two")
    model = make_model(
        folder, dimensions=3, patch=(8, 16, 16), classes=2, channels=2, reader="SimpleITKIO", spacing=(2.0, 1.0, 1.0)
    )
    plans = json.loads((model / "plans.json").read_text()) | {"image_reader_writer": "NibabelIOWithReorient"}
    (model / "plans.json").write_text(json.dumps(plans))
    (folder / "images").mkdir()
    affine = np.array([[0, 1.3, 0, 5], [0, 0, -1.0, 1], [0.9, 0, 0, 0], [0, 0, 0, 1.0]])
    for channel, image in enumerate(scene(2, (12, 20, 22), 4)[0]):
        stored = (250 * image.transpose(2, 1, 0)).astype(np.uint8)
        for name, frame in (("plain", np.diag([1.0, 1.0, 2.0, 1.0])), ("turned", affine)):
            nibabel.save(nibabel.Nifti1Image(stored, frame), folder / "images" / f"{name}_{channel:04d}.nii.gz")
    return model, folder / "images"


@pytest.mark.parametrize(
    "given",
    ["plain_0000.nii.gz", "plain_*.nii.gz", "[{0}/plain_0000.nii.gz,{0}/plain_0001.nii.gz]", "list.txt", "both"],
)
def test_channels_in_files_are_named_as_for_infer_volume(
    two_channels: tuple[Path, Path], tmp_path: Path, given: str
) -> None:
    model, images = two_channels
    files = [str(images / f"plain_{channel:04d}.nii.gz") for channel in (0, 1)]
    (tmp_path / "list.txt").write_text("\n".join(files))
    place = tmp_path if given == "list.txt" else images
    words = files if given == "both" else [given.format(images) if given[0] == "[" else str(place / given)]
    code, certificate = verified(tmp_path, str(model), *words, "--threshold", "1e-2")
    assert (code, certificate["volume"]) == (0, files[0])
    (sample,) = certificate["samples"]  # type: ignore[misc]
    assert sample["voxels"] == 12 * 20 * 22


def test_several_volumes_are_refused_by_name(
    two_channels: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = two_channels
    assert verified(tmp_path, str(model), str(images / "*.nii.gz"))[0] == 2
    said = capsys.readouterr().err
    assert "verify compares one volume, but" in said
    named = said.partition(" names 2 (")[2].partition(",")[0]
    assert verified(tmp_path, str(model), named, "--threshold", "1e-2")[0] == 0


def test_what_from_nnunet_wrote_is_held_against_nnunet_as_it_was_asked_then(
    two_channels: tuple[Path, Path], tmp_path: Path
) -> None:
    """A turned volume of another spacing than the plan's: axes and resampling are those of the model's reader."""
    model, images = two_channels
    words = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert main(["from-nnunet", *words, "--disable_progress_bar", "system.num_cpus=1"]) == 0
    for name in ("turned", "plain"):
        given = [str(model), str(images / f"{name}_0000.nii.gz"), str(tmp_path / "out" / f"{name}.nii.gz")]
        code, certificate = verified(tmp_path, *given, "--threshold", "1e-2")
        assert (code, certificate["passed"]) == (0, True)
    (tmp_path / "out" / "connectomics").rename(tmp_path / "out" / "elsewhere")  # nothing says who wrote them now
    given = [str(model), str(images / "turned_0000.nii.gz"), str(tmp_path / "out" / "turned.nii.gz")]
    assert verified(tmp_path, *given, "--threshold", "1e-2")[0] == 3


def test_resenc_models_of_old_plans_need_no_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plans name a module that has moved; nnU-Net searches for it in modules that import timm and torchvision."""
    model = make_model(tmp_path, dimensions=2, patch=(32, 32), classes=3, architecture="resenc", seed=2)
    plans = json.loads((model / "plans.json").read_text())
    new = plans["configurations"]["2d"].pop("architecture")["arch_kwargs"]
    plans["configurations"]["2d"] |= {
        "UNet_class_name": "ResidualEncoderUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 12,
        "n_conv_per_stage_encoder": new["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": new["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [2, 2],
        "pool_op_kernel_sizes": new["strides"],
        "conv_kernel_sizes": new["kernel_sizes"],
    }
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["init_args"]["plans"] = plans
    torch.save(content, path)
    (model / "plans.json").write_text(json.dumps(plans))
    for name in ("timm", "timm.layers", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for name in [n for n in sys.modules if n.startswith("dynamic_network_architectures.architectures.")]:
        if not name.endswith(".unet"):
            monkeypatch.delitem(sys.modules, name)
    Image.fromarray((scene(1, (1, 60, 70), 4)[0][0, 0] * 255).astype(np.uint8)).save(tmp_path / "a.png")
    assert verified(tmp_path, str(model), str(tmp_path / "a.png"), "--threshold", "1e-2")[0] == 0


def test_rounding_in_nnunets_sums_is_told_from_disagreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that float32 sums give where half precision rounds otherwise agree; other labels do not."""
    kind = {"dimensions": 3, "patch": (8, 16, 16), "classes": 3, "reader": "SimpleITKIO", "mirror_axes": (0, 1)}
    model = make_model(tmp_path, seed=2, **kind)  # type: ignore[arg-type]
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["main"] = (scene(1, (20, 40, 30), 4)[0][0] * 255).astype(np.uint8)
    words = [str(model), str(tmp_path / "v.h5"), "--threshold", "1e-6"]
    code, certificate = verified(tmp_path, *words)
    (sample,) = certificate["samples"]  # type: ignore[misc]
    assert sample["differ"] > 1e-6 * sample["voxels"], "the volume shows no rounding, so the test shows nothing"
    assert sample["float32"]["differ"] == 0
    assert (code, certificate["passed"]) == (0, True)
    verdict = (
        f"agrees with nnU-Net: {sample['differ']} labels differ from nnU-Net as it ships, 0 from nnU-Net with float32"
    )
    assert str(certificate["verdict"]).startswith(verdict)
    assert verdict in capsys.readouterr().out
    code, certificate = verified(tmp_path, *words, "inference.test_time_augmentation.flip_axes=[1]")
    (sample,) = certificate["samples"]  # type: ignore[misc]
    assert (code, certificate["passed"]) == (3, False)
    assert sample["float32"]["differ"] > 0
    assert str(certificate["verdict"]).startswith("DOES NOT AGREE with nnU-Net: ")


def test_crops_of_the_shared_five_class_model_agree(shared_data: Path, tmp_path: Path) -> None:
    section = np.asarray(Image.open(shared_data / "em" / "vnc" / "raw" / "12.png"))
    for number, (y, x) in enumerate(((100, 100), (400, 300), (700, 800))):
        Image.fromarray(section[y : y + 96, x : x + 96]).save(tmp_path / f"{number}.png")
        words = [str(shared_data / "models" / "vnc_multi_2d"), str(tmp_path / f"{number}.png")]
        code, certificate = verified(tmp_path, *words)
        (sample,) = certificate["samples"]  # type: ignore[misc]
        assert (code, certificate["passed"]) == (0, True)
        assert sample["float32"] is None or sample["float32"]["differ"] == 0
