"""Inference-only copies: the same network, identity and labels as the original, without a pickle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from connectomics.cli import program as cli
from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.core.fingerprint import sha256_of_file
from connectomics.models.checkpoint import load_model, read_spec
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest

from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, quick_folder, write_h5

KINDS: dict[str, dict[str, Any]] = {
    "plain 2d of three folds": {"dimensions": 2, "patch": (16, 16), "features": (4, 8), "folds": ("0", "1", "3")},
    "resenc 3d": {"dimensions": 3, "patch": (8, 8, 8), "architecture": "resenc", "reader": "Tiff3DIO", "channels": 2},
    "batch norm": {"dimensions": 2, "patch": (16, 16), "trainer": "nnUNetTrainerBN"},
    "not mirrored": {"dimensions": 2, "patch": (16, 16), "features": (4, 8), "mirror_axes": ()},
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_model(tmp_path_factory.mktemp("originals"), **options, seed=seed)
        for seed, (name, options) in enumerate(KINDS.items())
    }


@pytest.fixture
def original(originals: dict[str, Path]) -> Path:
    return originals["plain 2d of three folds"]


def converted(path: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    convert_model(ModelRequest(path, **options), folder)
    return folder


def assert_same_networks(copy: Path, original: Path, **options: Any) -> None:
    ours, theirs = load_model(ModelRequest(copy, **options)), load_model(ModelRequest(original, **options))
    window = torch.randn(1, ours.spec.channels, *ours.spec.patch_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for one, other in zip(ours.networks, theirs.networks, strict=True):
            assert torch.equal(one(window), other(window))
    assert ours.spec == dataclasses.replace(
        theirs.spec, files=ours.spec.files, weights_sha256=sha256_of_file(copy / "manifest.json")
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_is_the_original(originals: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = converted(originals[name], tmp_path / "copy")
    assert_same_networks(copy, originals[name])
    assert read_spec(copy) == load_model(ModelRequest(copy)).spec


@pytest.mark.parametrize("name", ["vnc_mito_2d", "vnc_mito_3d", "vnc_multi_2d"])
def test_copies_of_trained_models(shared_data: Path, tmp_path: Path, name: str) -> None:
    root = shared_data / "models" / name
    assert_same_networks(converted(root, tmp_path / "copy"), root)


def test_it_holds_safetensors_and_json_only(original: Path, tmp_path: Path) -> None:
    copy = converted(original, tmp_path / "copy")
    names = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    weights = [f"fold_{fold}/weights.safetensors" for fold in (0, 1, 3)]
    assert names == ["dataset.json", *weights, "manifest.json", "plans.json"]
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["files"] == {name: sha256_of_file(copy / name) for name in names if name != "manifest.json"}
    assert manifest["original"] == [
        [f"fold_{fold}/checkpoint_final.pth", sha256_of_file(original / f"fold_{fold}/checkpoint_final.pth")]
        for fold in (0, 1, 3)
    ]
    assert manifest["original_sha256"] == read_spec(original).sha256
    for name in ("plans.json", "dataset.json"):
        assert json.loads((copy / name).read_text()) == json.loads((original / name).read_text())
    modes = {path.stat().st_mode for path in copy.rglob("*") if path.is_file()}
    assert len(modes) == 1  # whoever may read the JSON may read the weights


def test_another_program_reads_the_weights(original: Path, tmp_path: Path) -> None:
    """safetensors' own loader finds the checkpoint's tensors, each stored once."""
    copy = converted(original, tmp_path / "copy", folds=("1",))
    theirs = torch.load(original / "fold_1" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    ours = load_file(copy / "fold_1" / "weights.safetensors")
    assert ours.keys() < theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in theirs.values()}) == len(ours)


def test_equal_models_give_equal_bytes(original: Path, tmp_path: Path) -> None:
    """So whoever has the original can tell whether a copy is one, by converting again."""
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", original))
    first, second = converted(original, tmp_path / "first"), converted(packed, tmp_path / "second")
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_folds_are_chosen_when_converting_and_when_loading(original: Path, tmp_path: Path) -> None:
    copy = converted(original, tmp_path / "copy")
    for folds in (("3", "0"), ("1",)):
        assert_same_networks(copy, original, folds=folds)
    chosen = converted(original, tmp_path / "chosen", folds=("3", "0"))
    assert read_spec(chosen).sha256 == read_spec(ModelRequest(original, folds=("3", "0"))).sha256
    for folds in ((), ("7",), ("0", "0")):
        with pytest.raises(ModelError, match=r"model\.folds names .*expected each once out of 0, 1, 3"):
            read_spec(ModelRequest(copy, folds=folds))


def test_other_checkpoints(original: Path, tmp_path: Path) -> None:
    root = shutil.copytree(original, tmp_path / "model")
    for fold in root.glob("fold_*"):
        (fold / "checkpoint_final.pth").rename(fold / "checkpoint_best.pth")
    copy = converted(root, tmp_path / "copy", checkpoint_name="checkpoint_best.pth")
    spec = read_spec(copy)
    assert spec.checkpoint_name == "checkpoint_best.pth"
    assert spec == read_spec(ModelRequest(copy, checkpoint_name="checkpoint_best.pth"))
    with pytest.raises(
        ModelError, match=r"converted from checkpoint_best\.pth, but .* asks for checkpoint_latest\.pth"
    ):
        read_spec(ModelRequest(copy, checkpoint_name="checkpoint_latest.pth"))


def test_a_bare_checkpoint_and_stated_json(original: Path, tmp_path: Path) -> None:
    plans = json.loads((original / "plans.json").read_text()) | {"plans_name": "Other"}
    (tmp_path / "stated.json").write_text(json.dumps(plans))
    bare = original / "fold_1" / "checkpoint_final.pth"
    copy = converted(bare, tmp_path / "copy", plans=tmp_path / "stated.json")
    spec = read_spec(copy)
    assert (spec.plans_name, spec.folds) == ("Other", ("1",))
    assert spec.sha256 == read_spec(ModelRequest(bare, plans=tmp_path / "stated.json")).sha256
    with pytest.raises(ModelError, match="plans and dataset description within"):
        read_spec(ModelRequest(copy, plans=tmp_path / "stated.json"))


def edit_checkpoint(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_wrapped_half_precision_views_keep_their_bits(original: Path, tmp_path: Path) -> None:
    root = shutil.copytree(original, tmp_path / "model")
    file = root / "fold_0" / "checkpoint_final.pth"

    def change(content: dict[str, Any]) -> None:
        weights = content["network_weights"]
        key = "decoder.seg_layers.0.weight"
        content["network_weights"] = {f"module.{name}": tensor.half() for name, tensor in weights.items()}
        both = torch.stack([weights[key], weights[key] + 1])
        content["network_weights"][f"module.{key}"] = both[1]  # a part of a larger storage
        content["network_weights"]["module.decoder.seg_layers.0.bias"] = both[0, :, 0, 0, 0]  # ... and another one

    edit_checkpoint(file, change)
    assert_same_networks(converted(root, tmp_path / "copy", folds=("0",)), root, folds=("0",))


def test_a_fold_name_that_leads_outside_is_refused(original: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.pth"
    shutil.copy(original / "fold_0" / "checkpoint_final.pth", file)
    edit_checkpoint(file, lambda content: content["init_args"].update(fold="../../outside"))
    with pytest.raises(ModelError, match=r"the fold is named '\.\./\.\./outside'"):
        converted(file, tmp_path / "a" / "copy")
    assert not list(tmp_path.rglob("*outside*"))


def test_what_cannot_be_used_is_not_converted(original: Path, tmp_path: Path) -> None:
    copy = converted(original, tmp_path / "copy")
    with pytest.raises(ModelError, match="is a converted model already"):
        converted(copy, tmp_path / "again")
    root = shutil.copytree(original, tmp_path / "model")
    file = root / "fold_0" / "checkpoint_final.pth"
    edit_checkpoint(file, lambda c: c["network_weights"]["decoder.seg_layers.0.bias"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"fold_0/checkpoint_final\.pth: the weight .* not finite"):
        converted(root, tmp_path / "not_finite")
    edit_checkpoint(file, lambda c: c["init_args"].update(plans=print))
    with pytest.raises(UnsafeModelError, match=r"asks for '__builtin__\.print'"):
        converted(root, tmp_path / "unsafe")


def test_a_copy_that_does_not_read_back_is_refused(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from connectomics.models import conversion

    true = conversion.state_of
    monkeypatch.setattr(conversion, "state_of", lambda m, e: {k: v.clone() + 1 for k, v in true(m, e).items()})
    converted(original, tmp_path / "plus_one")  # all tensors agree with what was to be written
    monkeypatch.setattr(
        conversion,
        "write_copy",
        lambda folder, *rest, **named: shutil.copytree(tmp_path / "plus_one", folder, dirs_exist_ok=True),
    )
    monkeypatch.setattr(conversion, "state_of", true)
    with pytest.raises(ModelError, match="does not read back"):
        converted(original, tmp_path / "copy")


def test_the_command_line_converts_and_finds_results_of_the_original(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quick_folder() as place:
        image = write_h5(place / "v.h5", em_like((2, 24, 32)))
        assert cli.main(["convert", str(original), str(place / "new" / "copy"), "model.folds=[0,1]"]) == 0
        printed = capsys.readouterr().out
        assert str(place / "new" / "copy") in printed
        assert sha256_of_file(place / "new" / "copy" / "manifest.json") in printed
        assert cli.main(["convert", str(original), str(place / "new" / "copy")]) == 3
        assert "is there already" in capsys.readouterr().err
        assert [path.name for path in (place / "new").iterdir()] == ["copy"]
        copy = place / "new" / "copy"
        assert cli.main(infer_words(original, place / "theirs", image, "model.folds=[0,1]")) == 0
        assert cli.main(infer_words(copy, place / "ours", image)) == 0
        assert final_names(place / "ours") == final_names(place / "theirs") == {"v_labels.h5"}
        with h5py.File(place / "ours" / "v_labels.h5") as ours, h5py.File(place / "theirs" / "v_labels.h5") as theirs:
            assert np.array_equal(ours["main"][()], theirs["main"][()])
            assert np.unique(ours["main"][()]).size > 1
        capsys.readouterr()
        assert cli.main(infer_words(copy, place / "theirs", image)) == 0
        assert "skipped       1" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["convert", str(original), str(tmp_path / "file" / "copy")]) == 3
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "absent"), str(tmp_path / "copy")]) == 3
    assert "no such file or folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pinned_copy_is_pinned_by_its_manifest(original: Path, tmp_path: Path) -> None:
    copy = converted(original, tmp_path / "copy")
    digest = sha256_of_file(copy / "manifest.json")
    assert read_spec(ModelRequest(copy, sha256=digest)).weights_sha256 == digest
    with pytest.raises(ModelError, match=r"model\.sha256 expects"):
        read_spec(ModelRequest(copy, sha256=read_spec(original).weights_sha256))
