"""``connectomics decode`` and the stage of ``infer-volume``: what is taken, left, skipped and refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
from scipy import ndimage

from connectomics.cli import main
from connectomics.core.geometry import Block, BlockGrid
from connectomics.stages.decode.slice_linking import SliceLinking
from connectomics.stages.decode.tasks import BlockPieces

from decoding import whole_components
from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, read_h5, write_h5

Array = npt.NDArray[Any]
COMPONENTS = "decoding=[{name: connected_components, connectivity: 6}]"
CSV = "inference.output.table=csv"


@pytest.fixture
def labels(folder: Path) -> Array:
    """Two classes of blobs, stored as ``v.h5``."""
    values = (em_like((6, 20, 24)) > 150).astype(np.uint8)
    values[:, :, 12:] *= 2
    write_h5(folder / "v.h5", values)
    return values


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def decode(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on ``v.h5``; its exit code and all it printed."""

    def run(*words: str, volume: str = "v.h5") -> tuple[int, str]:
        code = main(["decode", str(folder / volume), f"inference.data.output_path='{folder / 'out'}'", *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_a_volume_that_changes_while_it_is_decoded_has_no_objects(
    folder: Path, labels: Array, decode: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = BlockPieces.__call__

    def touching(self: BlockPieces, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        done = pieces(self, grid, block)
        os.utime(folder / "v.h5", ns=(0, (folder / "v.h5").stat().st_mtime_ns + 1_000_000_000))
        return done

    with monkeypatch.context() as patched:
        patched.setattr(BlockPieces, "__call__", touching)
        code, printed = decode(COMPONENTS)
    assert code == 3 and "not any more what they were when" in " ".join(printed.split())
    assert final_names(folder / "out") == set()
    assert decode(COMPONENTS)[0] == 0  # the remedy


def test_a_file_becomes_objects_and_a_table(folder: Path, labels: Array, decode: Run) -> None:
    code, printed = decode(COMPONENTS)
    assert code == 0 and f"{folder}/out/v_instances.h5" in printed and f"{folder}/out/v_instances.parquet" in printed
    ids = whole_components(labels, 6)
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), ids)
    table = pyarrow.parquet.read_table(folder / "out" / "v_instances.parquet")
    assert table["id"].to_pylist() == list(range(1, int(ids.max()) + 1))
    assert table["volume_nm3"].null_count == len(table)
    run = folder / "out" / "v_instances.run"
    (work,) = (path.parent for path in run.glob("*/ledgers.json"))
    assert {path.name for path in run.iterdir()} == {
        "run.log",
        "report.json",
        "provenance.json",
        "checksums",
        work.name,
    }
    stages = [f"ledger_1_connected_components.{stage}" for stage in ("cut", "join", "paint")]
    assert sorted(path.name for path in work.iterdir()) == [*stages, "ledgers.json"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["objects"] == ids.max()
    assert provenance["decoding"][0]["name"] == "connected_components"


def test_the_second_time_it_is_skipped_and_other_settings_are_refused(folder: Path, labels: Array, decode: Run) -> None:
    decode(COMPONENTS)
    assert "Skipped 1/1" in decode(COMPONENTS)[1]
    (folder / "out" / "v_instances.parquet").unlink()
    assert "Skipped 0/1" in decode(COMPONENTS)[1] and (folder / "out" / "v_instances.parquet").exists()
    other = COMPONENTS.replace("6", "26")
    code, printed = decode(other)
    assert code == 3 and "inference.output.overwrite=true" in printed
    assert decode(other, "inference.output.overwrite=true")[0] == 0
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), whole_components(labels, 26))


def test_the_command_is_reproduced(
    folder: Path, labels: Array, decode: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    decode(
        "decoding=[{name: connected_components}, {name: filters, min_volume_nm3: 5e4}]",
        "inference.voxel_size_nm=[30,8,8]",
    )
    assert main(["reproduce", str(folder / "out" / "v_instances.h5")]) == 0
    words = shlex.split(capsys.readouterr().out)[1:]
    assert main([*words, f"inference.data.output_path='{folder / 'again'}'"]) == 0
    again, first = folder / "again" / "v_instances.h5", folder / "out" / "v_instances.h5"
    assert again.read_bytes() == first.read_bytes()
    sizes = np.bincount(read_h5(first).ravel())[1:]
    assert sizes[sizes > 0].min() >= 5e4 / (30 * 8 * 8)


def test_blocks_do_not_change_what_is_left(folder: Path, labels: Array, decode: Run) -> None:
    decode(COMPONENTS, CSV)
    whole, table = read_h5(folder / "out" / "v_instances.h5"), (folder / "out" / "v_instances.csv").read_bytes()
    decode(COMPONENTS, CSV, "inference.block_shape=[4,8,16]", f"inference.data.output_path='{folder / 'cut'}'")
    assert np.array_equal(read_h5(folder / "cut" / "v_instances.h5"), whole)
    assert (folder / "cut" / "v_instances.csv").read_bytes() == table


@pytest.mark.parametrize("cut", [[], ["inference.block_shape=[2,8,8]"]])
@pytest.mark.parametrize("more", ["", ", {name: filters, min_voxels: 20}, {name: slice_linking}"])
def test_filled_holes_count_with_the_probability_of_the_object(
    folder: Path, decode: Run, cut: list[str], more: str
) -> None:
    """scipy fills; numpy takes each object's own class at all of its voxels."""
    values = np.zeros((6, 20, 24), np.uint8)
    values[1:5, 2:9, 3:10], values[1:5, 12:18, 13:22] = 1, 2
    values[2:4, 4:7, 5:8] = values[2, 14, 14:19] = 0
    write_h5(folder / "v.h5", values)
    likely = np.random.default_rng(0).random((3, *values.shape), np.float32) * 0.1
    np.put_along_axis(likely, values[None].astype(np.intp), 0.9, 0)
    write_h5(folder / "p.h5", likely)
    steps = f"{{name: connected_components, probabilities: '{folder}/p.h5'}}, {{name: filters, fill_holes: 3d}}{more}"
    code, printed = decode(f"decoding=[{steps}]", CSV, *cut)
    assert code == 0, printed
    with (folder / "out" / "v_instances.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line, label in zip(lines, (1, 2), strict=True):
        whole = ndimage.binary_fill_holes(values == label)
        assert int(line["voxels"]) == whole.sum() > (values == label).sum()
        assert float(line["mean_probability"]) == pytest.approx(likely[label][whole].mean(), abs=1e-6)
        assert float(line["minimum_probability"]) == pytest.approx(likely[label][whole].min())


def test_probabilities_of_each_label(folder: Path, labels: Array, decode: Run) -> None:
    likely = np.random.default_rng(0).integers(0, 256, (3, *labels.shape), np.uint8)
    write_h5(folder / "p.h5", likely)
    code, printed = decode(
        f"decoding=[{{name: connected_components, connectivity: 6, probabilities: '{folder}/p.h5'}}]", CSV
    )
    assert code == 0, printed
    ids = whole_components(labels, 6)
    own = np.take_along_axis(likely, labels[None].astype(np.intp), 0)[0]
    with (folder / "out" / "v_instances.csv").open(newline="") as stream:
        means = [float(line["mean_probability"]) for line in csv.DictReader(stream)]
    assert means == pytest.approx([own[ids == i].mean() / 255 for i in range(1, int(ids.max()) + 1)])


def test_one_channel_of_probabilities_above_a_threshold(folder: Path, decode: Run) -> None:
    likely = np.random.default_rng(0).random((2, 5, 16, 16), np.float32)
    write_h5(folder / "v.h5", likely)
    step = "{name: connected_components, connectivity: 6, threshold: 0.7, channel: 1}"
    assert decode(f"decoding=[{step}]", "inference.output.table=none")[0] == 0
    assert final_names(folder / "out") == {"v_instances.h5"}
    ids = whole_components((likely[1] > 0.7).astype(np.uint8), 6)
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), ids)


def test_a_run_is_decoded_and_resumes_from_its_labels(
    folder: Path, decode: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stage of ``infer-volume`` and afterwards from the RUN folder: the same objects."""
    model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8), mirror_axes=())
    volume = write_h5(folder / "cell.h5", em_like((2, 24, 32)))
    words = infer_words(model, folder / "stage", volume, COMPONENTS)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "cell_labels.h5" in printed and "cell_labels_instances.h5" in printed
    ids = read_h5(folder / "stage" / "cell_labels_instances.h5")
    found = read_h5(folder / "stage" / "cell_labels.h5")
    assert np.array_equal(ids, cc3d.connected_components(found, connectivity=6))
    assert decode(COMPONENTS, volume="stage/cell_labels.run")[0] == 0
    assert np.array_equal(read_h5(folder / "out" / "cell_labels_instances.h5"), ids)
    (folder / "stage" / "cell_labels_instances.h5").unlink()
    assert main(words) == 0
    assert (folder / "stage" / "cell_labels_instances.h5").exists()
    assert main(words) == 0
    assert "Skipped 1/1" in capsys.readouterr().err


LINKING = {  # of each key another value, which is seen
    "measure": "overlap",
    "threshold": "0.6",
    "max_gap": "1",
    "one_to_one": "true",
    "ids": "true",
}


def test_every_key_of_slice_linking_takes_effect(folder: Path, decode: Run) -> None:
    """On a column with a gap, a branch, a change of size and another of id; linked objects are filtered."""
    assert {*LINKING, "name"} == {field.name for field in dataclasses.fields(SliceLinking)}
    values = np.zeros((4, 6, 40), np.uint8)
    values[[0, 1, 3], :, :6] = 1
    values[:2, :, 8:20] = 1
    values[1, :, 13] = 0
    values[0, :, 22:32], values[1, :, 22:24] = 1, 1
    values[0, :, 34:38], values[1, :, 34:38] = 1, 3
    values[0, 5, 39] = 7
    write_h5(folder / "v.h5", values)
    found = []
    for key, value in (("threshold", "0.25"), *LINKING.items()):
        step = f"decoding=[{{name: slice_linking, {key}: {value}}}, {{name: filters, min_voxels: 2}}]"
        code, printed = decode(step, CSV, "inference.output.overwrite=true")
        assert code == 0, printed
        found.append(read_h5(folder / "out" / "v_instances.h5"))
        assert found[-1][0, 5, 39] == 0
    plain, *others = found
    assert len(np.unique(plain)) == 8
    for i, one in enumerate(others):
        assert not any(np.array_equal(one, other) for other in (plain, *others[:i]))


REFUSED = {
    "decoding=[]": (2, "decoding names no step"),
    f"{COMPONENTS} inference.output.formats=[png]": (2, "which cannot hold ids"),
    "decoding=[{name: filters, max_volume_nm3: 9}]": (3, "need the voxel size"),
    "decoding=[{name: connected_components, threshold: 0.5, channel: 1}]": (3, "decoding[0].channel must be below"),
    "decoding=[{name: connected_components, probabilities: absent.h5}]": (3, "absent.h5"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words: str, labels: Array, decode: Run) -> None:
    code, finding = REFUSED[words]
    given = [words] if " inference" not in words else words.split(" inference")
    given = [given[0], *(f"inference{word}" for word in given[1:])]
    found, printed = decode(*given)
    assert found == code and finding in printed


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        (np.zeros((4, 4, 4), np.float32), "not labels; state which probabilities are foreground"),
        (np.zeros((2, 4, 4, 4), np.uint8), "has 2 channels, labels have one"),
        (np.full((4, 4, 4), -1, np.int16), "go down to -1"),
    ],
)
def test_volumes_that_are_no_labels(values: Array, finding: str, folder: Path, decode: Run) -> None:
    write_h5(folder / "v.h5", values)
    code, printed = decode(COMPONENTS)
    assert code == 3 and finding in printed
    assert not final_names(folder / "out")


def test_probabilities_of_another_shape_or_too_few_channels(folder: Path, labels: Array, decode: Run) -> None:
    step = f"decoding=[{{name: connected_components, probabilities: '{folder}/p.h5'}}]"
    write_h5(folder / "p.h5", np.zeros((2, *labels.shape), np.uint8))
    assert "label 2 in voxels" in decode(step)[1]
    write_h5(folder / "p.h5", np.zeros((2, 2, 2), np.uint8))
    assert "its probabilities (2, 2, 2)" in decode(step)[1]


def test_a_run_without_labels_is_refused(folder: Path, decode: Run) -> None:
    code, printed = decode(COMPONENTS, volume="absent.run")
    assert code == 3 and "no finished labels lie beside this RUN folder" in printed


def test_without_pyarrow_it_is_said_before_the_work(
    labels: Array, decode: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, printed = decode(COMPONENTS)
    assert code == 3 and "pip install -e '.[tables]' -c constraints.txt" in printed and "table=csv" in printed
    assert decode(COMPONENTS, CSV)[0] == 0


def test_signed_and_bool_labels_are_taken(folder: Path, decode: Run) -> None:
    values = (em_like((4, 12, 12)) > 140).astype(np.int32)
    write_h5(folder / "v.h5", values)
    assert decode(COMPONENTS, CSV)[0] == 0
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), whole_components(values.astype(np.uint8), 6))


def test_a_block_that_keeps_failing_is_quarantined_and_done_by_the_next_run(
    folder: Path, labels: Array, decode: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_block = BlockPieces.__call__

    def fails(self: BlockPieces, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        if block.key == "1-0-0":
            raise ValueError("a mistake of ours")
        return cut_block(self, grid, block)

    cut = "inference.block_shape=[2,20,24]"
    monkeypatch.setattr(BlockPieces, "__call__", fails)
    code, printed = decode(COMPONENTS, cut)
    assert code == 3 and "1 of 3 blocks failed and are quarantined (1-0-0, voxels (2, 0, 0) to (4, 20, 24)" in printed
    run = folder / "out" / "v_instances.run"
    (trace,) = run.glob("*/ledger_1_connected_components.cut/quarantine/1-0-0.txt")
    assert "a mistake of ours" in trace.read_text()
    report = json.loads((run / "report.json").read_text())
    assert (report["planned"], report["done"], report["failed"]) == (3, 2, 1)
    monkeypatch.undo()
    assert decode(COMPONENTS, cut)[0] == 0 and not trace.exists()
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), whole_components(labels, 6))


def test_a_budget_that_cannot_work_names_the_smallest_that_can(labels: Array, decode: Run) -> None:
    code, printed = decode(COMPONENTS, "system.memory_budget_gb=0.01")
    least = re.search(r"raise system.memory_budget_gb to at least (\S+)", printed)
    assert code == 3 and least is not None
    assert decode(COMPONENTS, f"system.memory_budget_gb={float(least[1]) + 0.1}")[0] == 0


def test_precomputed_without_voxel_size_is_refused_before_the_work(labels: Array, decode: Run, folder: Path) -> None:
    code, printed = decode(COMPONENTS, "inference.output.formats=[h5,precomputed]")
    assert code == 3 and "precomputed states voxel sizes" in printed
    assert not list((folder / "out").glob("v_instances.run/*/*.cut"))
