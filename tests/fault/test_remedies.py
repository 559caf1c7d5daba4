"""What messages tell to do is done, and then it works: a row is a bad input, its message, and the remedy followed.

Words that a command takes (``inference.axes=zyx``, ``v.h5::raw``) are taken from the message as it is printed.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from PIL import Image

import connectomics
from connectomics.cli import main
from connectomics.runs import small_volume

from nnunet_models import make_model
from small_jobs import em_like, quick_folder, write_h5, write_png

EXAMPLE = Path(connectomics.__file__).parent / "example" / "phantom_mito_2d"
Words = list[str]
PIXELS = em_like((3, 24, 32))


@dataclass(frozen=True, slots=True)
class Remedy:
    """A bad input.

    Parameters
    ----------
    make
        Writes it into the current folder; gives the words of a command that refuses it.
    message
        What is printed then.
    follow
        Does what the message says; gives the words of a command that works.
    """

    make: Callable[[], Words]
    message: str
    follow: Callable[[Words, str], Words]


def inspect(*words: object) -> Words:
    return ["inspect", *map(str, words)]


def infer(*words: object) -> Words:
    return ["infer-volume", "model", *map(str, words), "-o", "out", "system.num_cpus=1"]


def saved(name: str, array: npt.NDArray[np.generic]) -> str:
    np.save(name, array)
    return name


def tiff(name: str, array: npt.NDArray[np.generic], axes: str) -> str:
    tifffile.imwrite(name, array, metadata={"axes": axes}, photometric="minisblack")
    return name


def several_datasets() -> str:
    with h5py.File("v.h5", "w") as file:
        file["raw"] = file["other"] = PIXELS
    return "v.h5"


def several_arrays(name: str) -> str:
    group = zarr.open_group(name, mode="w")
    for array in ("a", "b"):
        group.create_array(array, shape=PIXELS.shape, chunks=(1, 8, 8), dtype="u1")[:] = PIXELS
    return name


def stack(*names: str, sizes: dict[str, tuple[int, int]] | None = None) -> str:
    for name in names:
        write_png(Path("stack", name), (sizes or {}).get(name, (24, 32)))
    return "stack"


def cut_short() -> str:
    write_h5(Path("source.h5"), PIXELS)
    Path("v.h5").write_bytes(Path("source.h5").read_bytes()[:-700])
    return "v.h5"


def damaged_chunk() -> str:
    made = zarr.create_array("source.zarr", shape=PIXELS.shape, chunks=(3, 24, 32), dtype="u1")
    made[:] = PIXELS
    shutil.copytree("source.zarr", "v.zarr")
    (chunk,) = (path for path in Path("v.zarr").rglob("*") if path.is_file() and path.suffix != ".json")
    chunk.write_bytes(b"\0" * 20)
    return "v.zarr"


def adding(pattern: str) -> Callable[[Words, str], Words]:
    """Follow by adding to the command the word in the message that the pattern finds."""

    def follow(words: Words, message: str) -> Words:
        found = re.search(pattern, message)
        assert found, message
        return [*words, found[1] if found.groups() else found[0]]

    return follow


def naming(pattern: str, form: str = "{}") -> Callable[[Words, str], Words]:
    """Follow by naming the volume as the message says; it is the second word."""

    def follow(words: Words, message: str) -> Words:
        found = re.search(pattern, message)
        assert found, message
        return [words[0], form.format(*found.groups()), *words[2:]]

    return follow


def doing(act: Callable[[], object]) -> Callable[[Words, str], Words]:
    """Follow by an act, then with the same words."""

    def follow(words: Words, message: str) -> Words:
        act()
        return words

    return follow


def instead(new: Callable[[], Words]) -> Callable[[Words, str], Words]:
    """Follow with other words."""
    return lambda words, message: new()


def made_here(act: Callable[[], object], words: Words) -> Words:
    act()
    return words


AXES = adding(r"inference\.axes=\w+")
VOLUMES: dict[str, Remedy] = {
    "time axis": Remedy(lambda: inspect(tiff("v.tif", PIXELS, "TYX")), "a time axis of length 3", AXES),
    "TIFF zzyx": Remedy(lambda: inspect(tiff("v.tif", PIXELS[None].repeat(2, 0), "QZYX")), "the axes 'zzyx'", AXES),
    "too few letters": Remedy(
        lambda: inspect(saved("v.npy", PIXELS), "inference.axes=yx"),
        "name 2 axes, but the stored array has 3",
        lambda words, message: AXES(words[:2], message),
    ),
    "five axes": Remedy(
        lambda: inspect(saved("v.npy", PIXELS[None, None].repeat(2, 0))),
        "export an array of fewer axes",
        doing(lambda: saved("v.npy", PIXELS[None].repeat(2, 0))),
    ),
    "five TIFF axes": Remedy(
        lambda: inspect(tiff("v.tif", PIXELS[None, None].repeat(2, 0).repeat(2, 1), "TCZYX")),
        "export a single one of them",
        doing(lambda: tiff("v.tif", PIXELS[None].repeat(2, 0), "CZYX")),
    ),
    "several datasets": Remedy(
        lambda: inspect(several_datasets()),
        "no dataset 'main'",
        naming(r"holds (\w+).*Name one of them as (\S+)::", "{1}::{0}"),
    ),
    "several arrays": Remedy(
        lambda: inspect(several_arrays("v.zarr")),
        "several arrays",
        naming(r"holds (\w+).*Name one as (\S+)::", "{1}::{0}"),
    ),
    "absent array": Remedy(
        lambda: inspect(f"{several_arrays('v.zarr')}::c"),
        "no array or level 'c'",
        naming(r"holds (\w+).*Name one as (\S+)::", "{1}::{0}"),
    ),
    "several series": Remedy(
        lambda: made_here(
            lambda: [tifffile.imwrite("v.tif", PIXELS[:n, :, : n * 8], append=n > 1) for n in (1, 2)], inspect("v.tif")
        ),
        "2 image series that differ",
        naming(r"name one as (\S+)::0", "{0}::0"),
    ),
    "series that is absent": Remedy(
        lambda: inspect(f"{tiff('v.tif', PIXELS, 'ZYX')}::4"),
        "holds 1, counted from 0",
        instead(lambda: inspect("v.tif::0")),
    ),
    "inner of a plain file": Remedy(
        lambda: inspect(f"{saved('v.npy', PIXELS)}::raw"), "name the file alone", instead(lambda: inspect("v.npy"))
    ),
    "formats in one folder": Remedy(
        lambda: made_here(lambda: (stack("a.png"), Image.fromarray(PIXELS[0]).save("stack/b.bmp")), inspect("stack")),
        "images of different formats",
        doing(lambda: Path("stack/b.bmp").unlink()),
    ),
    "channel that lacks": Remedy(
        lambda: inspect(stack("a_0000.png", "a_0001.png", "b_0000.png")), "lacks channel 0001", AXES
    ),
    "channel that is added": Remedy(
        lambda: inspect(stack("a_0000.png", "a_0001.png", "b_0000.png")),
        r"file b_0001",
        doing(lambda: stack("b_0001.png")),
    ),
    "axes of a folder": Remedy(
        lambda: inspect(stack("a.png", "b.png"), "inference.axes=yx"),
        "leave no axis for 2 files",
        lambda words, message: AXES(words[:2], message),
    ),
    "sizes of sections": Remedy(
        lambda: inspect(stack("a.png", "b.png", sizes={"b.png": (24, 33)})),
        "all images of a volume must agree",
        doing(lambda: stack("b.png")),
    ),
    "file cut short": Remedy(
        lambda: inspect(cut_short()), "Copy it again from its source", doing(lambda: shutil.copy("source.h5", "v.h5"))
    ),
    "damaged chunk": Remedy(
        lambda: inspect(damaged_chunk()),
        "Copy it again from its source",
        doing(lambda: (shutil.rmtree("v.zarr"), shutil.copytree("source.zarr", "v.zarr"))),
    ),
    "format other programs read": Remedy(
        lambda: made_here(lambda: Path("v.tif").write_bytes(b"II+\0 something of our own"), inspect("v.tif")),
        "save it there as HDF5, OME-Zarr or TIFF",
        doing(lambda: tiff("v.tif", PIXELS, "ZYX")),
    ),
    "empty file": Remedy(
        lambda: made_here(lambda: Path("v.h5").touch(), inspect("v.h5")),
        "copy or write it again",
        doing(lambda: write_h5(Path("v.h5"), PIXELS)),
    ),
    "folder with a file's suffix": Remedy(
        lambda: made_here(lambda: (stack("a.png"), Path("stack").rename("v.tif")), inspect("v.tif")),
        "promises a file; rename",
        lambda words, message: made_here(lambda: Path("v.tif").rename("v"), inspect("v")),
    ),
    "file with a folder's suffix": Remedy(
        lambda: made_here(lambda: write_h5(Path("v.zarr"), PIXELS), inspect("v.zarr")),
        "promises a folder; unpack or correct it",
        lambda words, message: made_here(lambda: Path("v.zarr").rename("v.h5"), inspect("v.h5")),
    ),
    "unknown suffix": Remedy(
        lambda: made_here(lambda: Path("v.emdata").write_text("voxels in words"), inspect("v.emdata")),
        r"known are .*\.h5",
        lambda words, message: made_here(lambda: write_h5(Path("v.h5"), PIXELS), inspect("v.h5")),
    ),
    "phantom's grammar": Remedy(
        lambda: inspect("phantom:64x64"), "write phantom:ZxYxX", naming(r"for example (phantom:\S+[^.])\.")
    ),
    "voxels that are no numbers": Remedy(
        lambda: inspect(saved("v.npy", PIXELS.astype(complex))),
        "Convert the array",
        doing(lambda: saved("v.npy", PIXELS.astype(np.float32))),
    ),
    "file URI": Remedy(
        lambda: inspect(write_h5(Path("v.h5"), PIXELS).resolve().as_uri()),
        "name the path alone",
        naming(r"name the path alone, (\S+)"),
    ),
    "remote URI": Remedy(
        lambda: inspect("s3://bucket/v.h5"),
        "copy it to a local disk and name that path",
        lambda words, message: inspect(write_h5(Path("v.h5"), PIXELS)),
    ),
    "spacing beside a TIFF": Remedy(
        lambda: made_here(
            lambda: Path("v.json").write_text('{"spacing": [1, 2]}'), inspect(tiff("v.tif", PIXELS, "ZYX"))
        ),
        "three positive numbers",
        doing(lambda: Path("v.json").write_text('{"spacing": [1, 2, 3]}')),
    ),
    "JSON of another kind": Remedy(
        lambda: made_here(lambda: Path("v.json").write_text("{"), inspect(tiff("v.tif", PIXELS, "ZYX"))),
        "rename it if it is of another kind",
        doing(lambda: Path("v.json").rename("other.json")),
    ),
    "decoded floats": Remedy(
        lambda: [
            "decode",
            saved("v.npy", PIXELS / np.float32(255)),
            "decoding=[{name: connected_components}]",
            "-o",
            "out",
        ],
        "not labels; state which",
        lambda words, message: [*words[:2], re.findall(r"decoding=\[\{.*?\}\]", message)[-1], *words[3:]],
    ),
    "no steps": Remedy(
        lambda: ["decode", saved("v.npy", (PIXELS > 128).astype(np.uint8)), "-o", "out"],
        "decoding names no step",
        adding(r"'(decoding=.*?)'"),
    ),
    "formats without ids": Remedy(
        lambda: [
            "decode",
            saved("v.npy", (PIXELS > 128).astype(np.uint8)),
            "decoding=[{name: connected_components}]",
            "inference.output.formats=[png]",
            "-o",
            "out",
        ],
        "cannot hold ids; add h5",
        lambda words, message: [*words, "inference.output.formats=[png,h5]"],
    ),
    "truth of another shape": Remedy(
        lambda: ["evaluate", saved("a.npy", PIXELS // 128), saved("b.npy", PIXELS[:2] // 128), "-o", "out"],
        "state the truth of this image",
        doing(lambda: saved("b.npy", PIXELS // 128)),
    ),
}


def second_channel() -> None:
    Path("cell.h5").rename("cell_0000.h5")
    write_h5(Path("cell_0001.h5"), PIXELS[0])


RUNS: dict[str, Remedy] = {
    "no volumes": Remedy(lambda: infer(), "no volumes are named", instead(lambda: infer("good.h5"))),
    "pattern": Remedy(lambda: infer("god.h5"), "check the path", instead(lambda: infer("go*.h5"))),
    "unknown key": Remedy(
        lambda: infer("good.h5", "axes=yx"),
        "nearest known key",
        lambda words, message: [re.sub("^axes", message.split("nearest known key is ")[1].strip(), w) for w in words],
    ),
    "value of a key": Remedy(
        lambda: infer("good.h5", "system.seed"),
        "lacks|without a value",
        lambda words, message: [
            re.search(r"here (\S+=)VALUE", message)[1] + "3" if w == "system.seed" else w for w in words
        ],  # type: ignore[index]
    ),
    "channels, one file": Remedy(
        lambda: made_here(
            lambda: write_h5(Path("cell.h5"), PIXELS[0]), ["infer-volume", "two", "cell.h5", "-o", "out"]
        ),
        r"cell_0000\.h5, cell_0001\.h5",
        lambda words, message: made_here(
            second_channel, [*words[:2], re.search(r"volume as (\S+),", message)[1], *words[3:]]
        ),  # type: ignore[index]
    ),
    "channels, a file is missing": Remedy(
        lambda: made_here(
            lambda: write_h5(Path("cell_0000.h5"), PIXELS[0]), ["infer-volume", "two", "cell_*.h5", "-o", "out"]
        ),
        r"add the files of the other channels, cell_0001\.h5",
        doing(lambda: write_h5(Path("cell_0001.h5"), PIXELS[1])),
    ),
    "channels, axes": Remedy(
        lambda: made_here(
            lambda: write_h5(Path("v.h5"), PIXELS[:2, None]),
            ["infer-volume", "model", "v.h5", "inference.axes=czyx", "-o", "out"],
        ),
        "has 2 channels, the model expects 1",
        lambda words, message: made_here(lambda: write_h5(Path("v.h5"), PIXELS[:1, None]), words),
    ),
    "names alike": Remedy(
        lambda: made_here(
            lambda: (write_h5(Path("a/v.h5"), PIXELS[0]), write_h5(Path("b/v.h5"), PIXELS[0])),
            infer("a/v.h5", "b/v.h5"),
        ),
        "rename one",
        lambda words, message: made_here(lambda: Path("b/v.h5").rename("b/w.h5"), infer("a/v.h5", "b/w.h5")),
    ),
    "long name": Remedy(
        lambda: made_here(lambda: write_h5(Path("n" * 240 + ".h5"), PIXELS[0]), infer("n" * 240 + ".h5")),
        "link to it by a shorter one",
        lambda words, message: made_here(lambda: Path("short.h5").symlink_to("n" * 240 + ".h5"), infer("short.h5")),
    ),
    "result of other settings": Remedy(
        lambda: made_here(lambda: main(infer("good.h5")), infer("good.h5", "inference.sliding_window.overlap=0.25")),
        "made by another model, setting or input",
        adding(r"inference\.output\.overwrite=true"),
    ),
    "budget": Remedy(
        lambda: infer("good.h5", "system.memory_budget_gb=0.000001"),
        "raise system.memory_budget_gb",
        lambda words, message: [*words, "system.memory_budget_gb=" + re.search(r"to at least ([\d.]+\d)", message)[1]],  # type: ignore[index]
    ),
    "output is a file": Remedy(
        lambda: made_here(lambda: Path("out").write_text("x"), infer("good.h5")),
        "choose another folder",
        lambda words, message: [word if word != "out" else "out2" for word in words],
    ),
    "resampling of sections": Remedy(
        lambda: infer("good.h5", "inference.resample=plan"),
        "no spacing to resample by",
        adding(r"inference\.resample=off"),
    ),
    "no such device": Remedy(
        lambda: infer("good.h5", "system.device=mps"),
        r"choose (another device )?\(?auto",
        lambda words, message: [*words, "system.device=auto"],
    ),
    "mirror axes of 2D": Remedy(
        lambda: infer("good.h5", "inference.test_time_augmentation.flip_axes=[0]"),
        r"use 1 \(y\) and 2 \(x\)",
        lambda words, message: [*words, "inference.test_time_augmentation.flip_axes=[1,2]"],
    ),
    "damaged ledger": Remedy(
        lambda: made_here(damaged_ledger, infer("good.h5")),
        "remove .* to start",
        lambda words, message: made_here(
            lambda: shutil.rmtree(re.search(r"remove (?:the folder )?(\S+) to start", message)[1]), words
        ),  # type: ignore[index]
    ),
    "region outside": Remedy(
        lambda: infer("good.h5", "inference.roi=[[0,0,0],[9,9,9]]"),
        r"\(z, y, x\)",
        lambda words, message: [*words, "inference.roi=[[0,0,0],[1,9,9]]"],
    ),
    "listed twice": Remedy(
        lambda: infer("inference.volume_mode.file_list=[good.h5,./good.h5]"),
        "leave one out|list each volume once|rename one",
        lambda words, message: infer("inference.volume_mode.file_list=[good.h5]"),
    ),
    "a zip of several models": Remedy(
        lambda: ["infer-volume", zip_of_two(), "good.h5", "-o", "out"],
        "holds 2 models",
        naming(r"name one, such as (\S+)"),
    ),
    "a zip cut short": Remedy(
        lambda: ["infer-volume", zip_cut_short(), "good.h5", "-o", "out"],
        "copy it again|give a zip that",
        lambda words, message: made_here(lambda: shutil.copy("source.zip", "m.zip"), words),
    ),
    "a fold that is not there": Remedy(
        lambda: infer("good.h5", "model.folds=[7]"),
        "checkpoints found there: fold_0/",
        lambda words, message: [*words, f"model.folds=[{message.split('found there: fold_')[1][0]}]"],
    ),
    "plans that are missing": Remedy(
        lambda: made_here(without_plans, ["infer-volume", "bare", "good.h5", "-o", "out"]),
        "copy it from where nnU-Net wrote it",
        lambda words, message: made_here(lambda: shutil.copy("model/plans.json", "bare"), words),
    ),
    "expectation": Remedy(
        lambda: infer("good.h5", "model.in_channels=3"),
        "mend the key or leave it null",
        lambda words, message: [*words, "model.in_channels=null"],
    ),
    "digest": Remedy(
        lambda: infer("good.h5", f"model.sha256={'0' * 64}"),
        "sha256",
        lambda words, message: [*words, f"model.sha256={digest()}"],
    ),
}


def zip_of_two() -> str:
    with zipfile.ZipFile("m.zip", "w") as archive:
        for name, folder in (("T__P__2d", "model"), ("T__P__3d", "two")):
            for path in Path(folder).resolve().rglob("*"):
                if path.is_file():
                    archive.write(path, f"{name}/{path.relative_to(Path(folder).resolve())}")
    return "m.zip"


def zip_cut_short() -> str:
    with zipfile.ZipFile("source.zip", "w") as archive:
        for path in Path("model").resolve().rglob("*"):
            if path.is_file():
                archive.write(path, f"T__P__2d/{path.relative_to(Path('model').resolve())}")
    Path("m.zip").write_bytes(Path("source.zip").read_bytes()[:-99])
    return "m.zip"


def without_plans() -> None:
    shutil.copytree("model", "bare")
    Path("bare/plans.json").unlink()


def digest() -> str:
    return connectomics.read_spec("model").weights_sha256


def damaged_ledger() -> None:
    with mock.patch.object(small_volume, "SMALL_BYTES", 0):  # what is made in memory has no ledger
        assert main(infer("good.h5")) == 0
    Path("out/good_labels.h5").unlink()
    (header,) = Path("out").glob("*.run/*/ledger/header.json")
    header.write_text("{")


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    with quick_folder() as place:
        made = make_model(place / "one", dimensions=2, patch=(16, 32), classes=2, features=(4, 8), seed=2)
        made.rename(place / "model")
        made = make_model(place / "2", dimensions=2, patch=(16, 32), classes=2, features=(4, 8), channels=2, seed=2)
        made.rename(place / "two")
        yield place


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model", "two"):
        (tmp_path / name).symlink_to(models / name)
    write_h5(tmp_path / "good.h5", PIXELS[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(words: Words, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as end:
        code = int(str(end.code))
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("name", [*VOLUMES, *RUNS])
def test_the_remedy_of_a_message_works(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = (VOLUMES | RUNS)[name]
    words = case.make()
    code, message = told(words, capsys)
    assert code in (2, 3), message
    assert re.search(case.message, message), message
    code, after = told(case.follow(words, message), capsys)
    assert code == 0, f"{message}\n{after}"
