"""Exported zips: written by nnunetv2's own export, loaded like the folder they came from, and nothing stays behind."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import zipfile
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest
import torch

from connectomics.core.errors import ModelError, ResourceError
from connectomics.models import archive
from connectomics.models.checkpoint import load_model, read_spec
from connectomics.models.locate import ModelRequest

from nnunet_models import DATASET_NAME, make_model

FOLDER = "nnUNetTrainer__nnUNetPlans__2d"


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_results with one dataset: a 2D and a 3D training with everything an export looks for."""
    place = tmp_path_factory.mktemp("results")
    common = {"features": (4, 8), "folds": ("0", "1", "2")}
    make_model(place / DATASET_NAME, dimensions=2, patch=(16, 16), **common)
    make_model(place / DATASET_NAME, dimensions=3, patch=(8, 8, 8), reader="Tiff3DIO", **common)
    for root in (place / DATASET_NAME).iterdir():
        (root / "dataset_fingerprint.json").write_text("{}")
        for fold in root.glob("fold_*"):
            shutil.copy(fold / "checkpoint_final.pth", fold / "checkpoint_best.pth")
            (fold / "progress.png").touch()
            (fold / "validation").mkdir()
            (fold / "validation" / "summary.json").write_text("{}")
    return place


def export(results: Path, target: Path, *configurations: str, folds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """What nnUNetv2_export_model_to_zip writes."""
    with mock.patch.dict(os.environ, nnUNet_results=str(results)), contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.model_sharing.model_export import export_pretrained_model

        checkpoints = ("checkpoint_final.pth", "checkpoint_best.pth")
        export_pretrained_model(
            DATASET_NAME, str(target), configurations=configurations, folds=folds, save_checkpoints=checkpoints
        )
    return target


@pytest.fixture(scope="session")
def exported(results: Path) -> Path:
    return export(results, results / "one.zip", "2d")


@pytest.fixture(scope="session")
def both(results: Path) -> Path:
    return export(results, results / "both.zip", "2d", "3d_fullres")


@pytest.fixture(autouse=True)
def private_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files go to a folder of the test's own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def logits(path: Path) -> list[torch.Tensor]:
    loaded = load_model(ModelRequest(path))
    window = torch.randn(1, 1, *loaded.spec.patch_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return [network(window) for network in loaded.networks]


def test_a_zip_is_the_folder_it_was_made_from(results: Path, exported: Path, tmp_path: Path) -> None:
    folder = results / DATASET_NAME / FOLDER
    assert read_spec(exported) == read_spec(folder)
    for ours, theirs in zip(logits(exported), logits(folder), strict=True):
        assert torch.equal(ours, theirs)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_folds_and_checkpoints_are_chosen_in_a_zip(results: Path, exported: Path) -> None:
    folder = results / DATASET_NAME / FOLDER
    for options in ({"folds": ("2", "0")}, {"checkpoint_name": "checkpoint_best.pth"}):
        assert read_spec(ModelRequest(exported, **options)) == read_spec(ModelRequest(folder, **options))
    assert read_spec(exported / FOLDER / "fold_1").folds == ("1",)
    with pytest.raises(ModelError, match=r"no .*fold_7/checkpoint_final.*found there: fold_0/checkpoint_best\.pth"):
        read_spec(ModelRequest(exported, folds=("7",)))
    with pytest.raises(ModelError, match=r"no .*fold_X/checkpoint_latest.*found there: fold_0/checkpoint_best\.pth"):
        read_spec(ModelRequest(exported, checkpoint_name="checkpoint_latest.pth"))


def test_only_what_is_needed_is_unpacked(exported: Path) -> None:
    with archive.unpacked(ModelRequest(exported, folds=("1",))) as there:
        names = sorted(path.relative_to(there.path).as_posix() for path in there.path.rglob("*") if path.is_file())
    assert names == ["dataset.json", "fold_1/checkpoint_final.pth", "plans.json"]


def test_one_of_several_models_is_named(results: Path, both: Path) -> None:
    with pytest.raises(ModelError, match=r"holds 2 models .*name one, such as .*both\.zip/nnUNetTrainer__nnUNetPlans"):
        read_spec(both)
    name = "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert read_spec(both / name) == read_spec(results / DATASET_NAME / name)
    assert read_spec(both / DATASET_NAME / FOLDER).configuration == "2d"
    with pytest.raises(ModelError, match=r"no training folder 3d_lowres with .*found: Dataset901_Small/nnUNetTrainer"):
        read_spec(both / "3d_lowres")


def test_fold_all_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    root = make_model(tmp_path / "all", dimensions=2, patch=(16, 16), features=(4, 8), folds=("all",))
    packed = Path(shutil.make_archive(str(tmp_path / "bare"), "zip", root))
    assert read_spec(packed) == read_spec(root)


def test_messages_name_the_zip_and_not_the_temporary_folder(exported: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(damaged, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, b"{]" if info.filename.endswith("plans.json") else source.read(info))
    with pytest.raises(ModelError) as caught:
        load_model(ModelRequest(damaged))
    assert f"{damaged}/{DATASET_NAME}/{FOLDER}/plans.json: broken JSON" in str(caught.value)
    assert "temporary" not in str(caught.value)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_disk_too_small_is_said_before_anything_is_unpacked(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda folder: usage(9, 0, 9))
    with pytest.raises(ResourceError, match=r"needs \d+ bytes in .*9 are free.*TMPDIR"):
        read_spec(exported)


def test_a_disk_that_fills_up_is_a_sentence(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    with pytest.raises(ModelError, match=r"one\.zip: .*No space left on device"):
        read_spec(exported)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_zip_packed_by_finder_is_the_folder(results: Path, tmp_path: Path) -> None:
    """Finder adds a tree __MACOSX with a file ._NAME beside each file, and .DS_Store."""
    packed = tmp_path / "finder.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted((results / DATASET_NAME / FOLDER).rglob("*")):
            name = path.relative_to(results).as_posix()
            if path.is_file():
                archive.write(path, name)
                parent, _, own = name.rpartition("/")
                archive.writestr(f"__MACOSX/{parent}/._{own}", b"\0\5\26\7")
                archive.writestr(f"{parent}/._{own}", b"\0\5\26\7")
        archive.writestr(f"{DATASET_NAME}/.DS_Store", b"Bud1")
    assert read_spec(packed).weights_sha256 == read_spec(results / DATASET_NAME / FOLDER).weights_sha256
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "unzipped")
    assert read_spec(tmp_path / "unzipped").weights_sha256 == read_spec(packed).weights_sha256


def test_a_folder_above_is_its_only_training(results: Path, tmp_path: Path) -> None:
    expected = read_spec(results / DATASET_NAME / FOLDER)
    shutil.copytree(results / DATASET_NAME / FOLDER, tmp_path / "a" / DATASET_NAME / FOLDER)
    for folder in (tmp_path / "a", tmp_path / "a" / DATASET_NAME):
        assert read_spec(folder).sha256 == expected.sha256
        assert read_spec(ModelRequest(folder, folds=("1",))).folds == ("1",)
    with pytest.raises(ModelError, match="no fold_X folder"):
        read_spec(tmp_path)  # three levels above
    with pytest.raises(ModelError, match=f"holds 2 trained models .*{FOLDER}") as caught:
        read_spec(results)
    named = Path(str(caught.value).partition("such as ")[2])
    assert read_spec(named).configuration in ("2d", "3d_fullres")
