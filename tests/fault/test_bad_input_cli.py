"""Broken volumes, checkpoints and configurations at the real command: one sentence, exit code, no partial file.

The tables of test_bad_models, test_bad_configuration and of the readers' own tests say more of each kind.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
from fork_server import Ended, ForkServer
from PIL import Image

from connectomics.cli import main

from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, quick_folder, write_h5, write_png

GOOD = em_like((2, 24, 32))
LONGEST = 600  # characters of a sentence


def cut(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tiff(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, GOOD, **options)
    return path


def stack(folder: Path, *shapes: tuple[int, int]) -> Path:
    for i, shape in enumerate(shapes):
        write_png(folder / f"{i}.png", shape, i)
    return folder


def zarr(folder: Path) -> Path:
    import zarr as library

    group = library.open_group(folder, mode="w", zarr_format=3)
    group.create_array("0", data=GOOD, chunks=(1, 24, 32))
    return folder


def with_damaged_chunk(folder: Path) -> Path:
    chunk = next(path for path in (folder / "0" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"no chunk")
    return folder


def locked(path: Path) -> Path:
    path.chmod(0)
    return path


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def nan(shape: tuple[int, ...], value: float) -> Any:
    volume = np.ones(shape, np.float32)
    volume[1, 20, 30] = value
    return volume


def h5_of(path: Path, datasets: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
    return path


def picture(path: Path, mode: str = "L") -> Path:
    grey = GOOD[0]
    pixels = grey if mode == "L" else np.stack([grey, 255 - grey, grey], axis=-1)  # with equal colours it would be grey
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


# stem of the volume: what makes it in a folder, giving its path or URI, and words its reason must hold
VOLUMES: dict[str, tuple[Callable[[Path], Path | str], tuple[str, ...]]] = {
    "h5_empty": (lambda f: written(f / "h5_empty.h5", ""), ("0 bytes",)),
    "h5_text": (lambda f: written(f / "h5_text.h5", "not HDF5"), ("h5_text.h5",)),
    "h5_cut": (lambda f: cut(write_h5(f / "h5_cut.h5", GOOD)), ("h5_cut.h5", "truncated")),
    "h5_without_dataset": (lambda f: h5_of(f / "h5_without_dataset.h5", {}), ("no dataset",)),
    "h5_two_datasets": (lambda f: h5_of(f / "h5_two_datasets.h5", {"a": GOOD, "b": GOOD}), ("a", "b", "::")),
    "h5_wrong_dataset": (lambda f: f"{write_h5(f / 'h5_wrong_dataset.h5', GOOD)}::raw", ("raw", "main")),
    "h5_text_dataset": (lambda f: write_h5(f / "h5_text_dataset.h5", np.full((24, 32), b"ab")), ("type",)),
    "h5_complex": (lambda f: write_h5(f / "h5_complex.h5", GOOD.astype(np.complex64)), ("complex64",)),
    "h5_one_axis": (lambda f: write_h5(f / "h5_one_axis.h5", GOOD.ravel()), ("1 axes",)),
    "h5_five_axes": (lambda f: write_h5(f / "h5_five_axes.h5", GOOD[None, None].repeat(2, 0)), ("5 axes",)),
    "h5_no_voxels": (lambda f: write_h5(f / "h5_no_voxels.h5", GOOD[:0]), ("without voxels",)),
    "h5_nan": (lambda f: write_h5(f / "h5_nan.h5", nan(GOOD.shape, np.nan)), ("(1, 20, 30)", "NaN")),
    "h5_infinite": (lambda f: write_h5(f / "h5_infinite.h5", nan(GOOD.shape, np.inf)), ("(1, 20, 30)",)),
    "h5_channels": (lambda f: write_h5(f / "h5_channels.h5", GOOD[:, None]), ("2 channels", "expects 1")),
    "png_empty": (lambda f: written(f / "png_empty.png", ""), ("0 bytes",)),
    "png_cut": (lambda f: cut(write_png(f / "png_cut.png")), ("png_cut.png",)),
    "png_text": (lambda f: written(f / "png_text.png", "not a picture"), ("png_text.png",)),
    "png_colour": (lambda f: picture(f / "png_colour.png", "RGB"), ("3 channels", "expects 1")),
    "jpg_text": (lambda f: written(f / "jpg_text.jpg", "not a picture"), ("jpg_text.jpg",)),
    "bmp_cut": (lambda f: cut(picture(f / "bmp_cut.bmp"), 0.9), ("bmp_cut.bmp", "Copy it again")),
    "tif_empty": (lambda f: written(f / "tif_empty.tif", ""), ("0 bytes",)),
    "tif_text": (lambda f: written(f / "tif_text.tif", "not TIFF"), ("tif_text.tif",)),
    "tif_cut": (lambda f: cut(tiff(f / "tif_cut.tif")), ("tif_cut.tif",)),
    "tif_compressed_cut": (
        lambda f: cut(tiff(f / "tif_compressed_cut.tif", compression="zlib"), 0.7),
        ("tif_compressed_cut.tif",),
    ),
    "stack_empty": (lambda f: new_folder(f / "stack_empty"), ("stack_empty",)),
    "stack_sizes": (lambda f: stack(f / "stack_sizes", (24, 32), (24, 33)), ("1.png", "33")),
    "stack_cut": (lambda f: cut(stack(f / "stack_cut", (24, 32), (24, 32)) / "1.png").parent, ("1.png",)),
    "zarr_empty": (lambda f: new_folder(f / "zarr_empty.zarr"), ("zarr_empty.zarr",)),
    "zarr_json": (
        lambda f: written(zarr(f / "zarr_json.zarr") / "0" / "zarr.json", "{").parents[1],
        ("zarr_json.zarr",),
    ),
    "zarr_chunk": (lambda f: with_damaged_chunk(zarr(f / "zarr_chunk.zarr")), ("zarr_chunk.zarr",)),
    "zarr_level": (lambda f: f"{zarr(f / 'zarr_level.zarr')}::7", ("7",)),
    "zarr_file": (lambda f: written(f / "zarr_file.zarr", "x"), ("promises a folder",)),
    "folder_named_h5": (lambda f: new_folder(f / "folder_named_h5.h5"), ("promises a file",)),
    "unknown": (lambda f: written(f / "unknown.xyz", "x"), ("unknown format '.xyz'",)),
    "no_suffix": (lambda f: written(f / "no_suffix", "x"), ("unknown format",)),
    "absent": (lambda f: f / "absent.h5", ("no such file or folder",)),
    "dangling": (lambda f: link(f / "dangling.h5", "nowhere.h5"), ("symbolic link", "nowhere.h5")),
    "circle": (lambda f: link(f / "circle.h5", "circle.h5"), ("circle.h5",)),
    "pipe": (lambda f: pipe(f / "pipe.h5"), ("neither a file nor a folder",)),
    "long": (lambda f: f / ("x" * 300 + ".h5"), ("longer than the 255",)),
    "remote": (lambda f: "s3://bucket/remote.zarr", ("only local paths",)),
    "phantom": (lambda f: "phantom:4x0x64", ("phantom:4x0x64",)),
    "locked_h5": (lambda f: locked(write_h5(f / "locked_h5.h5", GOOD)), ("permission denied",)),
    "locked_png": (lambda f: locked(write_png(f / "locked_png.png")), ("permission denied",)),
    "locked_stack": (lambda f: locked(stack(f / "locked_stack", (24, 32))), ("permission denied",)),
    "locked_zarr": (lambda f: locked(zarr(f / "locked_zarr.zarr")), ("permission denied",)),
    "locked_folder": (
        lambda f: locked(write_h5(f / "l" / "locked_folder.h5", GOOD).parent) / "locked_folder.h5",
        ("permission denied",),
    ),
}


@dataclass(frozen=True)
class Bench:
    """A folder with a model and two good volumes, and a server to run the command as nobody."""

    folder: Path
    model: Path
    server: ForkServer

    @property
    def good(self) -> Path:
        return self.folder / "good"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        write_h5(folder / "good" / "good_first.h5", GOOD)
        write_h5(folder / "good" / "good_last.h5", GOOD)
        with ForkServer(folder) as server:
            yield Bench(folder, model, server)


@dataclass(frozen=True)
class Call:
    """One call of the command over every broken volume, two good ones around them."""

    ended: Ended
    uris: dict[str, str]
    output: Path
    reasons: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def call(bench: Bench) -> Call:
    folder = bench.folder / "bad"
    folder.mkdir()
    uris = {name: str(make(folder)) for name, (make, _) in VOLUMES.items()}
    volumes = [bench.good / "good_first.h5", *uris.values(), bench.good / "good_last.h5"]
    written(bench.folder / "volumes.txt", "\n".join(str(volume) for volume in volumes))
    output = bench.folder / "out"
    output.mkdir()
    output.chmod(0o777)
    words = infer_words(bench.model, output, "x.h5", f"inference.volume_mode.file_list='{bench.folder}/volumes.txt'")
    ended = bench.server.run([word for word in words if "file_pattern" not in word], unprivileged=True)
    reasons = {name: reason for name, reason in re.findall(r"^  failed: (\S+): (.*)$", ended.stdout, re.M)}
    return Call(ended, uris, output, reasons)


@pytest.mark.parametrize("name", VOLUMES)
def test_a_broken_volume_is_named_with_its_reason(call: Call, name: str) -> None:
    reason = call.reasons[call.uris[name]]
    for word in VOLUMES[name][1]:
        assert word in reason
    assert "unexpected" not in reason
    assert len(reason) < LONGEST
    assert call.ended.stderr.count(f"failed: {call.uris[name]}: ") == 1


def test_the_other_volumes_are_done(call: Call) -> None:
    assert call.ended.code == 3
    assert re.search(rf"done +2\nskipped +0\nfailed +{len(VOLUMES)}\n", call.ended.stdout)
    assert final_names(call.output) == {"good_first_labels.h5", "good_last_labels.h5"}
    assert not [path for path in call.output.rglob("*") if path.name.startswith(".")]
    assert "Traceback" not in call.ended.stderr + call.ended.stdout
    assert set(call.reasons) == set(call.uris.values())


def test_a_missing_channel_is_that_volumes_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", dimensions=2, channels=2, patch=(16, 16), features=(4, 8))
    for name in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0001"):
        write_png(tmp_path / "data" / f"{name}.png")
    output = tmp_path / "out"
    code = main(infer_words(model, output, tmp_path / "data" / "*.png"))
    out, err = capsys.readouterr()
    assert code == 3
    assert final_names(output) == {"a_labels.h5", "c_labels.h5"}
    assert "b_0000.png: has 1 channels, the model expects 2 (EM0, EM1); add the files of the other channels" in out
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------- checkpoints


class Calls:
    """Unpickling an instance without restriction runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


CHECKPOINT = "fold_0/checkpoint_final.pth"


def edit_plans(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plans = json.loads((model / "plans.json").read_text())
    change(plans)
    (model / "plans.json").write_text(json.dumps(plans))


def edit_checkpoint(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(model / CHECKPOINT, weights_only=False)
    change(content)
    torch.save(content, model / CHECKPOINT)


def architecture(plans: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plans["configurations"]["2d"]["architecture"]
    return found


def unsafe(model: Path) -> Calls:
    return Calls(f"touch {model.parent / 'marker'}")


# damage to a copy of the model, further words of the command, and words of the sentence
MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "malicious pickle": (
        lambda m: edit_checkpoint(m, lambda c: c.update(note=unsafe(m))),
        (),
        ("system", "model.trust_code"),
    ),
    "malicious bare pickle": (
        lambda m: (m / CHECKPOINT).write_bytes(pickle.dumps(unsafe(m))),
        (),
        ("system", CHECKPOINT),
    ),
    "malicious plans": (
        lambda m: edit_plans(m, lambda p: architecture(p).update(network_class_name="os.system")),
        (),
        ("plans.json", "os.system"),
    ),
    "malicious argument": (
        lambda m: edit_plans(m, lambda p: architecture(p)["arch_kwargs"].update(nonlin="os.system")),
        (),
        ("plans.json", "os.system"),
    ),
    "cut": (lambda m: cut(m / CHECKPOINT), (), ("cut short",)),
    "empty": (lambda m: written(m / CHECKPOINT, ""), (), ("0 bytes",)),
    "text": (lambda m: written(m / CHECKPOINT, "hello"), (), ("not a PyTorch checkpoint",)),
    "no plans": (lambda m: (m / "plans.json").unlink(), (), ("plans.json",)),
    "broken plans": (lambda m: written(m / "plans.json", '{"a": '), (), ("plans.json", "line 1")),
    "no dataset": (lambda m: (m / "dataset.json").unlink(), (), ("dataset.json",)),
    "no such configuration": (lambda m: edit_plans(m, lambda p: p.update(configurations={})), (), ("'2d'",)),
    "weights that do not fit": (
        lambda m: edit_checkpoint(m, lambda c: c["network_weights"].popitem()),
        (),
        ("missing",),
    ),
    "called a cascade": (
        lambda m: edit_plans(m, lambda p: p["configurations"]["2d"].update(previous_stage="3d_lowres")),
        (),
        ("weights do not fit",),
    ),
    "no folds": (lambda m: shutil.rmtree(m / "fold_0"), (), ("fold",)),
    "no such fold": (lambda m: None, ("model.folds=[3]",), ("fold_3",)),
    "other digest": (lambda m: None, (f"model.sha256={'0' * 64}",), ("sha256",)),
    "unknown architecture": (lambda m: None, ("model.architecture=swin",), ("'swin'", "nnunet")),
    "other channels": (lambda m: None, ("model.in_channels=2",), ("model.in_channels is 2", "has 1")),
    "other labels": (lambda m: None, ("data.out_channels=5",), ("data.out_channels is 5", "has 2")),
    "other dimensions": (lambda m: None, ("data.do_2d=false",), ("data.do_2d",)),
    "gone": (lambda m: shutil.rmtree(m), (), ("no such file or folder",)),
}


def require_one_sentence(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
    assert len(line) < LONGEST
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, more, words = MODELS[name]
    model = shutil.copytree(bench.model, tmp_path / bench.model.name)
    damage(model)
    code = main(infer_words(model, tmp_path / "out", bench.good / "*.h5", *more))
    line = require_one_sentence(capsys.readouterr().err)
    assert code == 3
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "marker").exists(), "code of the file ran"


@pytest.mark.parametrize("name", [CHECKPOINT, "plans.json", "fold_0", "."])
def test_a_model_that_may_not_be_read_is_refused(bench: Bench, name: str) -> None:
    model = shutil.copytree(bench.model, bench.folder / "locked_model" / bench.model.name)
    try:
        (model / name).chmod(0)
        words = infer_words(model, bench.folder / "never", bench.good / "*.h5")
        ended = bench.server.run(words, unprivileged=True)
    finally:
        (model / name).chmod(0o755)
        shutil.rmtree(model.parent)
    assert ended.code == 3
    assert "ermission denied" in require_one_sentence(ended.stderr)


# ----------------------------------------------------------------------------------------------- configurations

PATTERN = "inference.volume_mode.file_pattern"
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (("inference.volume_mode.stepp=2",), ("inference.volume_mode.step",)),
    "wrong type": (("system.num_cpus=many",), ("'many'", "whole number")),
    "impossible value": (("inference.volume_mode.step=0",), ("1 or more",)),
    "grammar": (("system.num_cpus",), ("key=value",)),
    "unknown device": (("system.device=gpu",), ("'gpu'", "cuda:N")),
    "no GPU allowed": (("system.device=cuda", "system.num_gpus=0"), ("num_gpus=0",)),
    "GPU wanted on the CPU": (("system.num_gpus=1",), ("num_gpus=1",)),
    "list and pattern": (("inference.volume_mode.file_list=[a.h5]",), ("file_list",)),
    "nothing matches": ((f"{PATTERN}='nothing/*.h5'",), ("matches no file or folder",)),
    "a name longer than any": ((f"{PATTERN}={'x' * 300}",), ("too long",)),
    "no volumes": ((f"{PATTERN}=null",), ("no volumes are named",)),
    "switched off": (("inference.volume_mode.enabled=false",), ("enabled is false",)),
    "absent list": ((f"{PATTERN}=null", "inference.volume_mode.file_list=gone.txt"), ("gone.txt",)),
    "z mirrored in 2D": (("inference.test_time_augmentation.flip_axes=[0]",), ("the model is 2D",)),
    "window of three axes": (("inference.sliding_window.window_size=[2,16,16]",), ("the model is 2D",)),
    "no such class": (
        (
            "inference.test_time_augmentation.select_channel=[4]",
            "inference.output.save_probabilities=true",
        ),
        ("classes 0 to 1",),
    ),
    "png of floats": (
        ("inference.output.save_probabilities=true", "inference.output.formats=[png]"),
        ("cannot hold probabilities",),
    ),
    "format": (("inference.output.formats=[nifti]",), ("h5, zarr, tiff, png",)),
    "output is a file": (("inference.data.output_path=a_file",), ("a_file", "cannot be made")),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_bad_configuration_is_refused(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a_file", "x")
    more, words = CONFIGURATIONS[name]
    code = main(infer_words(bench.model, tmp_path / "out", bench.good / "*.h5", *more))
    line = require_one_sentence(capsys.readouterr().err)
    assert code == 2
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


YAML = {
    "unknown key": ("sistem: {seed: 1}\n", "the nearest known key is system"),
    "syntax": ("system: {seed: [1\n", "not valid YAML"),
    "no mapping": ("- a\n", "not a mapping"),
    "code": ("description: !!python/object/apply:os.mkdir [ran]\n", "not valid YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_configuration_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, finding = YAML[name]
    code = main(["infer-volume", "--config", str(written(tmp_path / "c.yaml", content))])
    assert code == 2
    assert finding in require_one_sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_no_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer-volume", f"{PATTERN}=x.h5"]) == 2
    assert "--checkpoint" in require_one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("words", [[], ["label"], ["inspect"], ["infer-volume", "--chekpoint", "x"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: connectomics" in capsys.readouterr().err


def test_an_output_folder_that_may_not_be_written_to_is_refused(bench: Bench) -> None:
    output = bench.folder / "read_only"
    output.mkdir(mode=0o555)
    try:
        ended = bench.server.run(infer_words(bench.model, output, bench.good / "*.h5"), unprivileged=True)
    finally:
        output.rmdir()
    assert ended.code == 2
    assert f"inference.data.output_path={output}: may not be written to" in require_one_sentence(ended.stderr)


def test_a_budget_too_small_for_a_volume_is_that_volumes_failure(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = infer_words(bench.model, tmp_path, bench.good / "*.h5", "system.memory_budget_gb=0.000001")
    assert main(words) == 3
    out = capsys.readouterr().out
    assert out.count("the memory budget is") == 2
    assert "raise system.memory_budget_gb" in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param(["system.sead=1"], 2, marks=pytest.mark.long),
        (["model.folds=[7]"], 3),
        pytest.param([f"{PATTERN}=absent_*.h5"], 2, marks=pytest.mark.long),
    ],
)
def test_as_a_process_of_its_own(bench: Bench, tmp_path: Path, words: list[str], code: int) -> None:
    command = [
        sys.executable,
        "-m",
        "connectomics.cli",
        *infer_words(bench.model, tmp_path / "o", bench.good / "*.h5", *words),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    require_one_sentence(ended.stderr)
