"""``connectomics reproduce``: the command it prints gives the same bytes from any folder; units of probabilities."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.assembly.decode_inputs import check_stored
from connectomics.cli import main
from connectomics.config.load import written
from connectomics.core.errors import ConfigError, VolumeError
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.volumes.source import absolute_uri

from decoding import whole_components
from nnunet_models import make_model
from small_jobs import em_like, finals, quick_folder, read_h5, write_h5

SAVE = "inference.output.save_probabilities=true"
BYTES = ["inference.postprocessing.intensity_scale=200", "inference.postprocessing.intensity_dtype=uint8"]
STEPS = "decoding=[{name: connected_components, connectivity: 6}, {name: filters, min_voxels: 2}]"
STEM = "zelle é_labels"


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    """A folder ``here`` with a model and a volume, and in ``out`` what a run from there left; ``there`` is empty."""
    with quick_folder() as folder, pytest.MonkeyPatch.context() as patch:
        here = folder / "here"
        trained = make_model(here / "trained", dimensions=2, patch=(16, 16), features=(4, 8))
        write_h5(here / "zelle é.h5", em_like((3, 40, 48)))
        write_h5(here / "mask.h5", np.ones((3, 40, 48), np.uint8))
        (here / "model").symlink_to(trained, target_is_directory=True)
        (folder / "there").mkdir()
        patch.chdir(here)
        words = ["infer-volume", "--checkpoint", "model", "inference.volume_mode.file_list=['zelle é.h5']", SAVE]
        words += [
            *BYTES,
            STEPS,
            "inference.data.output_path=out",
            "inference.mask=mask.h5",
            "inference.output.pyramid=false",
        ]
        words += ["inference.output.formats=[zarr,h5]", 'description="größe \\"ü\\" c:\\\\x"']
        words += ["system.memory_budget_gb=2"]
        assert main(words) == 0
        yield folder


def again(bench: Path, output: str, target: str, capsys: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """What the command that ``reproduce`` prints for an output leaves, run in another folder."""
    assert main(["reproduce", str(bench / "here" / "out" / output)]) == 0
    program, *words = shlex.split(capsys.readouterr().out)
    assert program == "connectomics"
    assert main([*words, f"inference.data.output_path={target}"]) == 0
    return finals(bench / "there" / target)


def first(bench: Path) -> dict[str, bytes]:
    return finals(bench / "here" / "out")


def test_labels_probabilities_objects_and_table_are_made_again_from_another_folder(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench / "there")
    found = again(bench, f"{STEM}.h5", "labels", capsys)
    assert found == first(bench)
    assert {f"{STEM}_instances.parquet", f"{STEM}_instances.h5", f"{STEM}_probabilities.h5"} <= set(found)
    command = json.loads((bench / "here" / "out" / f"{STEM}.run" / "provenance.json").read_text())["command"]
    stated = {word.partition("=")[0] for word in command}
    assert {"system.num_cpus", "system.device", "inference.mask", "description", "system.memory_budget_gb"} <= stated


@pytest.mark.parametrize("output", [f"{STEM}_instances.h5", f"{STEM}_instances.zarr", f"{STEM}_instances.parquet"])
def test_objects_of_a_run_are_decoded_again_with_its_probabilities(
    bench: Path, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench / "there")
    found = again(bench, output, "objects", capsys)
    assert found == {name: content for name, content in first(bench).items() if f"{STEM}_instances" in name}


def test_a_table_of_another_result_is_told_apart(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench / "there")
    labels = bench / "here" / "out" / f"{STEM}.h5"
    words = ["decode", str(labels), STEPS, "inference.data.output_path=tables", "inference.output.table=csv"]
    assert main(words) == 0
    table = bench / "there" / "tables" / f"{STEM}_instances.csv"
    assert main(["reproduce", str(table)]) == 0
    assert "decode" in capsys.readouterr().out
    table.write_text(table.read_text().replace("\n1,", "\n7,", 1))
    assert main(["reproduce", str(table)]) == 3
    assert "is not the table that" in capsys.readouterr().err
    table.unlink()
    other = table.with_suffix(".parquet")
    other.write_bytes((bench / "here" / "out" / other.name).read_bytes())
    assert main(["reproduce", str(other)]) == 3
    assert "tells of another result" in capsys.readouterr().err
    assert main([*words[:-1]]) == 0, "a table of another result does not count as this one's"
    assert main(["reproduce", str(other)]) == 0


def columns(folder: Path) -> list[list[Any]]:
    table = pyarrow.parquet.read_table(next(folder.glob("*_instances.parquet")))
    return [table[name].to_pylist() for name in ("mean_probability", "minimum_probability")]


def test_tables_say_the_same_of_a_run_and_of_its_files(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench / "here" / "out")
    likely = read_h5(Path(f"{STEM}_probabilities.h5"))
    labels = read_h5(Path(f"{STEM}.h5"))
    named = STEPS.replace("connectivity: 6", f"connectivity: 6, probabilities: '{STEM}_probabilities.h5'")
    assert main(["decode", f"{STEM}.h5", named, "inference.data.output_path=../../files"]) == 0
    assert columns(bench / "files") == columns(Path())
    ids = whole_components(labels, 6)
    own = np.take_along_axis(likely, labels[None].astype(np.intp), 0)[0] / 200
    kept = [i for i in range(1, int(ids.max()) + 1) if (ids == i).sum() >= 2]
    assert columns(Path())[0] == pytest.approx([own[ids == i].mean() for i in kept])
    assert columns(Path())[1] == pytest.approx([own[ids == i].min() for i in kept])
    threshold = "decoding=[{name: connected_components, threshold: 100, channel: 1}]"
    words = ["decode", f"{STEM}_probabilities.h5", "inference.data.output_path=../../threshold"]
    assert main([*words, threshold]) == 0
    ids = whole_components(likely[1] > 100, 26)
    expected = [likely[1][ids == i].mean() / 200 for i in range(1, int(ids.max()) + 1)]
    assert columns(bench / "threshold")[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "finding"),
    [
        (
            "connected_components, threshold: 0.5, channel: 1",
            "means a probability of 0.0025; state it in this unit: 100",
        ),
        ("watershed, seed_threshold: 0.9, threshold: 0.5", "state it in this unit: 100"),
        ("filters", "has 2 channels, labels have one"),
    ],
)
def test_stored_units_are_not_misread(bench: Path, step: str, finding: str, capsys: pytest.CaptureFixture[str]) -> None:
    likely = bench / "here" / "out" / f"{STEM}_probabilities.h5"
    assert main(["decode", str(likely), f"decoding=[{{name: {step}}}]", f"inference.data.output_path={bench}/no"]) == 3
    assert finding in capsys.readouterr().out


def test_one_channel_of_bytes_is_not_taken_for_labels(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["main"] = em_like((2, 8, 8))
        unit = {"channels": [1], "activation": "softmax", "scale": 255.0, "dtype": "|u1"}
        file.attrs["connectomics"] = json.dumps({"result_key": "k", "probabilities": unit})
    with pytest.raises(VolumeError, match=r"stored as 255 where they are 1\), not labels; state .* threshold: 127.5"):
        check_stored(ConnectedComponents(), str(tmp_path / "p.h5"))
    check_stored(ConnectedComponents(threshold=127.5), str(tmp_path / "p.h5"))


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["intensity_dtype=uint8"], "intensity_scale=255"),
        (["intensity_dtype=uint8", "intensity_scale=300"], "intensity_scale=255"),
        (["intensity_dtype=uint16"], "intensity_scale=65535"),
        (["intensity_dtype=float16", "intensity_scale=1e5"], "intensity_scale=65504"),
    ],
)
def test_units_that_clip_are_refused_and_the_remedy_works(bench: Path, words: list[str], remedy: str) -> None:
    stated = [f"inference.postprocessing.{word}" for word in words]
    model = bench / "here" / "model"
    with pytest.raises(ConfigError, match=f"state inference.postprocessing.{remedy}"):
        InferenceManager.from_checkpoint(model, [SAVE, *stated])
    found = InferenceManager.from_checkpoint(model, [SAVE, stated[0], f"inference.postprocessing.{remedy}"])
    stored = found.predict(em_like((24, 24))).probabilities
    assert stored is not None
    scale = float(remedy.partition("=")[2])
    plain = InferenceManager.from_checkpoint(model, [SAVE]).predict(em_like((24, 24))).probabilities
    assert stored / scale == pytest.approx(plain, abs=1 / scale + 5e-4)


def test_logits_in_bytes_are_refused_and_are_no_probabilities_of_a_table(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench / "here")
    words = ["--checkpoint", "model", "inference.volume_mode.file_list=['zelle é.h5']", SAVE]
    words += ["inference.test_time_augmentation.act=none", "inference.data.output_path=../logits"]
    assert main(["infer-volume", *words, "inference.postprocessing.intensity_dtype=uint8"]) == 2
    assert "go below 0" in capsys.readouterr().err
    assert main(["infer-volume", *words, "system.num_cpus=1"]) == 0
    command = json.loads((bench / "logits" / f"{STEM}.run" / "provenance.json").read_text())["command"]
    assert "inference.block_shape=[3,40,48]" in command, "stated where a volume is cut once"
    likely = f"../logits/{STEM}_probabilities.h5"
    named = f"decoding=[{{name: connected_components, probabilities: '{likely}'}}]"
    assert main(["decode", f"../logits/{STEM}.h5", named, "inference.data.output_path=../no"]) == 3
    assert "holds logits" in capsys.readouterr().out
    own = ["decode", likely, "decoding=[{name: connected_components, threshold: 0, channel: 1}]"]
    assert main([*own, "inference.data.output_path=../own", "inference.output.table=csv"]) == 0
    with next((bench / "own").glob("*.csv")).open(newline="") as stream:
        assert {line["mean_probability"] for line in csv.DictReader(stream)} == {""}


def test_axes_that_are_stated_of_images_do_not_turn_their_labels(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench / "here")
    write_h5(Path("turned.h5"), em_like((3, 40, 48)).transpose())
    words = ["infer-volume", "--checkpoint", "model", "inference.volume_mode.file_list=[turned.h5]"]
    words += ["inference.axes=xyz", "inference.data.output_path=../turned", "system.num_cpus=1"]
    assert main([*words, STEPS]) == 0
    labels = read_h5(bench / "turned" / "turned_labels.h5")
    ids = whole_components(labels, 6)
    sizes = np.bincount(ids.ravel())
    assert np.array_equal(read_h5(bench / "turned" / "turned_labels_instances.h5"), np.where(sizes[ids] >= 2, ids, 0))


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: "${" not in text))
def test_texts_survive_the_command_line(text: str) -> None:
    """Hydra's parser, which reads the words, is the judge."""
    override = OverridesParser.create().parse_override(f"key=[{{name: {written(text)}}}]")
    assert override.value() == [{"name": text}]


def test_uris_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("a/b.h5::raw") == f"{tmp_path}/a/b.h5::raw"
    assert absolute_uri("precomputed://em") == f"precomputed://{tmp_path}/em"
    assert absolute_uri("phantom:4x8x8?seed=1") == "phantom:4x8x8?seed=1"
