"""Natural words: models, volumes and keys told apart, wrong usage with the nearest right form, control characters."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr

import connectomics
from connectomics.cli import main, script_main, usage
from connectomics.cli.arguments import parse_command
from connectomics.core.errors import ConfigError
from connectomics.core.text import VisibleFormatter, visible

from nnunet_models import make_model
from small_jobs import em_like, final_names, read_h5, write_h5

MODEL = Path(connectomics.__file__).parent / "example" / "phantom_mito_2d"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dimensions=2, patch=(16, 16), mirror_axes=())


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(model)
    for name in ("a", "b"):
        write_h5(tmp_path / "data" / f"{name}.h5", em_like((1, 32, 32)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    try:
        found = main(words)
    except SystemExit as end:
        found = int(str(end.code))
    assert found == code
    return capsys.readouterr().err


def test_model_and_volumes_are_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ["infer-volume", "model", "data/a.h5", "data/*.h5", "-o", "new", "system.num_cpus=1"]
    assert main(new) == 0
    old = ["infer-volume", "--checkpoint", "model", "inference.volume_mode.file_pattern='data/*.h5'"]
    assert main([*old, "inference.data.output_path=old", "system.num_cpus=1"]) == 0
    assert final_names(place / "new") == final_names(place / "old") == {"a_labels.h5", "b_labels.h5"}
    np.testing.assert_array_equal(read_h5(place / "new" / "a_labels.h5"), read_h5(place / "old" / "a_labels.h5"))
    assert main(["system.num_cpus=1" if word == "model" else word for word in new] + ["--checkpoint", "model"]) == 0
    assert main([new[0], "-o", "new", *new[1:4], "system.num_cpus=1"]) == 0
    assert "skipped       2" in capsys.readouterr().out
    assert main(["infer-volume", "model.nnunet_checkpoint=model", "data/a.h5", "-o", "new", "system.num_cpus=1"]) == 0
    (place / "c.yaml").write_text("inference: {volume_mode: {file_pattern: 'nothing/*'}}\n")
    assert script_main(["--mode", "infer-volume", "--config", "c.yaml", *new[1:]]) == 0


def test_plan_and_doctor_take_the_same_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", "data/*.h5", "--json", "system.num_cpus=1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["volumes"]) == 2
    main(["doctor", "model", "data/a.h5"])
    assert "1 volumes, the first 1 opened" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "plain", "overrides"),
    [
        (["phantom:1x8x8?seed=7", "system.seed=1"], ["phantom:1x8x8?seed=7"], ["system.seed=1"]),
        (["data/seed=7.h5", "+system.seed=1"], ["data/seed=7.h5"], ["+system.seed=1"]),
        (["x=1", "sytem.seed=1"], ["x=1"], ["sytem.seed=1"]),  # the file x=1 is there
        (["model", "data", "inference"], ["model", "data", "inference"], []),
        (["a.h5::raw", "description=a=b"], ["a.h5::raw"], ["description=a=b"]),
    ],
)
def test_words_are_told_apart(words: list[str], plain: list[str], overrides: list[str], place: Path) -> None:
    (place / "x=1").touch()
    assert usage.told_apart(words) == (plain, overrides)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["predict", "M"], "did you mean infer-volume?"),
        (["infer", "M"], "usage: connectomics infer-volume MODEL VOLUME… -o OUT key=value…"),
        (["inspct", "M"], "did you mean inspect?"),
        (["zzzz"], "commands are infer-volume, plan"),
        (["status"], "usage: connectomics status RUN"),
        (["evaluate", "x"], "usage: connectomics evaluate PREDICTION TRUTH"),
        (["infer-volume", "M", "V", "--device", "cpu"], "write system.device=VALUE"),
        (["infer-volume", "M", "V", "--memory-budget-gb=3"], "write system.memory_budget_gb=VALUE"),
        (["infer-volume", "M", "V", "--chekpoint", "M"], "did you mean --checkpoint?"),
        (["infer-volume", "M", "V", "-x.h5"], "the file of that name is ./-x.h5"),
        (["infer-volume"], "write connectomics infer-volume MODEL VOLUME… -o OUT"),
        (["infer-volume", "model"], "write connectomics infer-volume MODEL VOLUME… -o OUT"),
        (["infer-volume", "model", "data/a.h5", "inference.roi"], "write key=value, here inference.roi=VALUE"),
        (["infer-volume", "model", "data/a.h5", "axes=zyx"], "the nearest known key is inference.axes"),
        (["decode", "data/a.h5", "data/b.h5"], "write connectomics decode VOLUME_OR_RUN"),
        (["test", "model", "data/a.h5"], "write connectomics test MODEL test.data.test_image=VOLUME"),
        (["infer-volume", "model", "data/a.h5", "inference.volume_mode.file_list=[b.h5]"], "leave one of them out"),
        (["infer-volume", "model", "data/a.h5", "-o", "x", "inference.data.output_path=y"], "state one of them"),
        (["verify", "model", "data/a.h5", "x", "y"], "write connectomics verify MODEL VOLUME"),
    ],
)
def test_wrong_usage_names_the_nearest_right_form(
    words: list[str], hint: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "-x.h5").touch()
    assert hint in refused(words, capsys)


def test_the_right_forms_are_right() -> None:
    """Each form parses, with its words in capitals standing for themselves."""
    for command, form in usage.FORMS.items():
        words = form.replace("key=value…", "system.seed=1").replace("…", "").replace("[OUTPUT]", "OUTPUT")
        words = words.replace("'decoding=[{name: connected_components}]'", "decoding=[]").split()
        assert parse_command([command, *words]).command == command
    assert set(usage.OTHERS.values()) <= set(usage.FORMS)


def test_a_pattern_without_matches_is_told_before_the_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("connectomics.assembly.engine.make_engine.build_engine", loaded)
    for words in (["nothing/*.h5"], ["inference.volume_mode.file_pattern='nothing/*.h5'"], ["absent.h5"]):
        for command in ("infer-volume", "plan"):
            assert "matches no file or folder" in refused([command, "model", *words], capsys)


ESCAPE = "\x1b]0;title\x07\x1b[2J"


def test_names_from_files_are_printed_visibly(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(place / "model", place / "evil")
    for name in ("dataset.json", "plans.json"):
        content = json.loads((place / "evil" / name).read_text())
        if name == "dataset.json":
            content["labels"] = {"background": 0, f"{ESCAPE}mito": 1}
            content["channel_names"] = {"0": f"EM{ESCAPE}"}
        else:
            content["dataset_name"] = f"D{ESCAPE}"
        (place / "evil" / name).write_text(json.dumps(content))
    with h5py.File(place / "evil.h5", "w") as file:
        file[f"{ESCAPE}one"] = file["two\u202e"] = np.zeros((4, 4), np.uint8)
    volume = write_h5(place / "three.h5", np.zeros((3, 1, 8, 8), np.uint8))
    strange = write_h5(place / f"v{ESCAPE[4:]}.h5", em_like((1, 16, 16)))
    latin = shutil.copy(strange, place / "caf\udcff.h5")
    words = ["-o", "out", "system.num_cpus=1"]
    codes = [
        main(["inspect", "evil"]),
        main(["inspect", "evil", "--json"]),
        main(["inspect", "evil.h5"]),
        main(["inspect", str(latin)]),
        main(["infer-volume", "evil", "evil.h5", *words]),
        main(["infer-volume", "evil", str(volume), *words]),
        main(["infer-volume", "evil", str(strange), *words]),
        main(["doctor", "evil", "evil.h5"]),
    ]
    assert codes[:7] == [0, 0, 3, 0, 3, 3, 0]
    told = capsys.readouterr()
    logs = "".join(path.read_text() for path in place.glob("out/*.run/run.log"))
    for text in (told.out, told.err, logs):
        assert visible(text) == text
        assert text
    assert "\\x1b[2J" in told.out
    assert "\\x1b]0;title\\x07\\x1b[2Jone" in told.err + told.out
    assert "\\xff.h5" in told.out


def test_a_terminal_without_letters_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    usage.say("écrit → \x9b2J\u2028", stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9crit \\u2192 \\x9b2J\\u2028\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", ("\x07",), None)
    assert VisibleFormatter("%(message)s").format(record) == "\\x07"
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert visible(every).isascii() is False
    assert {c for c in visible(every) if unicodedata.category(c) in ("Cc", "Cs")} == {"\t", "\n"}


def facts(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["inspect", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_inspect_tells_a_volume_and_where_each_fact_was_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(place / "v.h5", "w") as file:
        file["raw"] = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
        file["raw"].attrs["resolution"] = [30.0, 8.0, 8.0]
    found = facts(["v.h5"], capsys)
    assert found["format"] == "hdf5"
    assert found["shape (c, z, y, x)"] == [1, 2, 3, 4]
    assert found["axes as stored"] == "zyx, by the usual order of 3 axes, as the file states none"
    assert found["voxel size (z, y, x)"] == "30, 8, 8 nm, by attribute `resolution` of `/raw`"
    assert (found["dtype"], found["minimum"], found["maximum"], found["levels"]) == ("int16", 0, 23, "one")
    stated = facts(["v.h5", "inference.axes=xyz", "inference.voxel_size_nm=[1,2,3]"], capsys)
    assert stated["shape (c, z, y, x)"] == [1, 4, 3, 2]
    assert stated["axes as stored"] == "xyz, by inference.axes"
    assert stated["voxel size (z, y, x)"] == "1, 2, 3 nm, by inference.voxel_size_nm"
    tifffile.imwrite(
        place / "t.tif",
        np.zeros((2, 3, 4), np.uint8),
        imagej=True,
        metadata={"axes": "ZYX", "spacing": 0.03, "unit": "um"},
        resolution=(125, 125),
    )
    assert str(facts(["t.tif"], capsys)["voxel size (z, y, x)"]).startswith(
        "30, 8, 8 nm, by `spacing`, `unit` and resolution tags of ImageJ"
    )
    np.save(place / "n.npy", np.array([[np.nan, 1.0], [2.0, -np.inf]]))
    found = facts(["n.npy"], capsys)
    assert (found["minimum"], found["maximum"], found["not finite"]) == (1.0, 2.0, "2 voxels of the sample")
    assert main(["inspect", "v.h5"]) == 0
    assert "voxel size (z, y, x) 30, 8, 8 nm, by attribute `resolution` of `/raw`" in capsys.readouterr().out


def test_inspect_lists_the_levels_of_a_pyramid(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decoding=[{name: connected_components}]", "inference.output.formats=[zarr,n5,precomputed]"]
    assert main(["decode", "phantom:1x600x700?seed=1&what=label", "-o", "out", *words]) == 0
    capsys.readouterr()
    for name in ("zarr", "n5", "precomputed"):
        (path,) = (place / "out").glob(f"*.{name}")
        found = facts([str(path)], capsys)
        assert found["format"] == name
        levels = found["levels"]
        assert isinstance(levels, list)
        assert len(levels) > 1
        assert levels[0].endswith("(1, 1, 600, 700)")
        assert "(1, 1, 300, 350)" in levels[1]
        named = f"{path}{levels[1].split()[0]}"
        assert facts([named], capsys)["shape (c, z, y, x)"] == [1, 1, 300, 350]
    plain = zarr.create_array(
        str(place / "p.zarr"), shape=(2, 8, 8), chunks=(1, 4, 4), dtype="u1", dimension_names="zyx"
    )
    plain[:] = 3
    found = facts(["p.zarr"], capsys)
    assert found["axes as stored"] == "zyx, by `dimension_names` of `p.zarr`"
    assert (found["chunks (z, y, x)"], found["levels"]) == ([1, 4, 4], "one")


def test_inspect_samples_a_part_of_a_large_volume(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(["phantom:64x2048x2048?seed=1"], capsys)["sample"] == "voxels (24, 768, 768) to (40, 1280, 1280)"


def test_a_key_without_value_is_told_apart_from_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"write key=value, here system\.device=VALUE"):
        usage.told_apart(["system.device"])
