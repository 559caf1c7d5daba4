"""The watershed as a step and as a command: its table, its keys, what it states, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import watershed

from connectomics.cli import main
from connectomics.objects.table import write_table
from connectomics.stages.decode.object_filters import Filters
from connectomics.stages.decode.watershed.seeded_watershed import Watershed

from decoding import canonical, decode_array
from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, read_h5, write_h5

Array = npt.NDArray[Any]
SIZE = "inference.voxel_size_nm=[40,8,6]"
CUBE = np.ones((3, 3, 3))


def probabilities() -> Array:
    """Smooth float32 (z, y, x) without equal ones."""
    return ndimage.gaussian_filter(np.random.default_rng(3).random((10, 24, 30)), 1.2).astype(np.float32)


LOW, HIGH = 0.5, 0.56


def expected_ids(likely: Array) -> Array:
    """scikit-image on the whole volume; components without a seed are objects."""
    inside = likely > LOW
    seeds, count = ndimage.label(likely > HIGH, CUBE)
    components, _ = ndimage.label(inside, CUBE)
    found = watershed(-likely, seeds, CUBE, mask=inside)
    ids = canonical(np.where((found == 0) & inside, components + count, found))
    assert count > 5 and len(np.unique(components[found == 0])) > 2
    return ids


def test_the_table_is_regionprops(folder: Path) -> None:
    likely = probabilities()
    decoded = decode_array(likely, [Watershed(threshold=LOW, seed_threshold=HIGH)], (5, 11, 13), folder)
    ids = expected_ids(likely)
    assert np.array_equal(decoded.ids, ids) and decoded.state.tables is not None
    write_table(decoded.state.tables, decoded.state.count, folder / "t.parquet", decoded.state.frame, "key")
    table = pyarrow.parquet.read_table(folder / "t.parquet").to_pydict()
    regions = regionprops(ids.astype(np.int64), likely)
    assert table["id"] == [r.label for r in regions] and table["class"] == [1] * len(regions)
    assert table["voxels"] == [r.area for r in regions]
    assert table["bbox_stop_y"] == [r.bbox[4] for r in regions]
    assert table["centroid_x"] == pytest.approx([r.centroid[2] for r in regions], rel=1e-12)
    assert table["mean_probability"] == pytest.approx([float(r.intensity_mean) for r in regions], abs=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_filters_follow(apart: bool, folder: Path) -> None:
    likely = probabilities()
    steps = [Watershed(threshold=LOW, seed_threshold=HIGH), Filters(min_voxels=60)]
    decoded = decode_array(likely, steps, (5, 11, 13), folder, fused=not apart)
    ids = expected_ids(likely)
    kept = np.bincount(ids.ravel().astype(np.int64)) >= 60
    assert np.array_equal(decoded.ids, np.where(kept[ids.astype(np.int64)], ids, 0))


@pytest.mark.parametrize("fill", [0, 1])
def test_empty_and_full(fill: int, folder: Path) -> None:
    """What has no background is farther from it than any distance."""
    values = np.full((6, 8, 7), fill, np.uint8)
    decoded = decode_array(values, [Watershed(connectivity=6, seed_distance_nm=1e6)], (4, 5, 7), folder)
    assert np.array_equal(decoded.ids, values)
    facts = {"components": fill, "unseeded": 0, "flooded": 0, "cut": 0, "seeds": fill}
    assert decoded.state.facts == {"0": facts}


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def decode(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on a volume; its exit code and all it printed."""

    def run(step: str, *words: str, volume: str = "v.h5", output: str = "out") -> tuple[int, str]:
        place = f"inference.data.output_path='{folder / output}'"
        code = main(["decode", str(folder / volume), f"decoding=[{step}]", place, *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_probabilities_become_objects_and_the_provenance_counts_them(folder: Path, decode: Run) -> None:
    likely = probabilities()
    write_h5(folder / "v.h5", np.stack([1 - likely, likely]))
    step = f"{{name: watershed, threshold: {LOW}, channel: 1, seed_threshold: {HIGH}}}"
    assert decode(step)[0] == 0
    ids = expected_ids(likely)
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), ids)
    provenance = json.loads((folder / "out" / "v_instances.run" / "provenance.json").read_text())
    components, seeds = (ndimage.label(likely > floor, CUBE)[1] for floor in (LOW, HIGH))
    counts = provenance["1_watershed"]
    assert (counts["components"], counts["seeds"], counts["cut"]) == (components, seeds, 0)
    assert counts["flooded"] > 0 and counts["unseeded"] > 0 and provenance["objects"] == ids.max()
    assert "Skipped 1/1" in decode(step)[1]


def test_labels_with_probabilities_beside_them(folder: Path, decode: Run) -> None:
    """As those of a run: of each voxel its own label's counts."""
    likely = probabilities()
    write_h5(folder / "v.h5", (likely > LOW).astype(np.uint8))
    write_h5(folder / "p.h5", np.stack([1 - likely, likely]))
    step = f"{{name: watershed, seed_threshold: {HIGH}, probabilities: '{folder}/p.h5'}}"
    assert decode(step)[0] == 0
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), expected_ids(likely))


KEYS = {
    "connectivity": "connectivity: 6",
    "threshold": "threshold: 0.52",
    "channel": "channel: 1",
    "seed_threshold": "seed_threshold: 0.58",
    "keep_unseeded": "keep_unseeded: false",
    "max_component_voxels": "max_component_voxels: 4096",
    "seed_distance_nm": "seed_distance_nm: 12, seed_threshold: null",
    "probabilities": "probabilities: p.h5, threshold: null",
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_takes_effect(key: str, folder: Path, decode: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the objects or, where components are cut so that hardly a voxel differs, on what is counted as cut."""
    monkeypatch.chdir(folder)
    likely = probabilities()
    write_h5(folder / "v.h5", np.stack([likely, likely[::-1]]))
    write_h5(folder / "p.h5", likely[:, ::-1].copy())
    usual = f"connectivity: 26, threshold: {LOW}, seed_threshold: {HIGH}"
    if key == "probabilities":
        write_h5(folder / "v.h5", (likely > LOW).astype(np.uint8))
        write_h5(folder / "q.h5", likely)
        usual = f"connectivity: 26, seed_threshold: {HIGH}, probabilities: q.h5"
    stated = dict(part.split(": ") for part in f"{usual}, {KEYS[key]}".split(", "))
    words = ", ".join(f"{name}: {value}" for name, value in stated.items())
    assert decode(f"{{name: watershed, {usual}}}", SIZE)[0] == 0
    code, printed = decode(f"{{name: watershed, {words}}}", SIZE)
    assert code == 3 and "overwrite=true" in printed, "another result key"
    assert decode(f"{{name: watershed, {words}}}", SIZE, output="other")[0] == 0
    first, second = (json.loads((folder / o / "v_instances.run/provenance.json").read_text()) for o in ("out", "other"))
    same = np.array_equal(*(read_h5(folder / o / "v_instances.h5") for o in ("out", "other")))
    assert not same or (first["1_watershed"]["cut"], second["1_watershed"]["cut"]) == (0, 1)


DEEP = "{name: watershed, seed_distance_nm: 9}"
REFUSED = {
    DEEP: "does not state its voxel size, which decoding[0].seed_distance_nm needs",
    "{name: watershed, seed_threshold: 0.9}": "decoding[0].seed_threshold needs probabilities",
    "{name: connected_components}, {name: watershed, threshold: 0.5, seed_threshold: 0.9}": (
        "decoding[1].threshold is 0.5, but the step before leaves ids"
    ),
}


@pytest.mark.parametrize("steps", REFUSED)
def test_refusals(steps: str, folder: Path, decode: Run) -> None:
    write_h5(folder / "v.h5", (probabilities() > LOW).astype(np.uint8))
    code, printed = decode(steps)
    assert (code, final_names(folder / "out")) == (3, set()) and REFUSED[steps] in printed
    assert not list((folder / "out").glob("v_instances.run/*/*.cut"))


def test_a_component_that_does_not_fit_is_refused_with_both_keys_and_a_budget_that_can(
    folder: Path, decode: Run
) -> None:
    write_h5(folder / "v.h5", np.ones((64, 256, 256), np.uint8))
    ended = decode(DEEP, SIZE, "system.memory_budget_gb=0.01")
    least = float(re.findall(r"raise system.memory_budget_gb to at least (\S+)", ended[1])[-1].rstrip(",.")) + 0.1
    code, printed = decode(DEEP, SIZE, f"system.memory_budget_gb={least}")
    assert code == 3 and "lower decoding[0].max_component_voxels, which changes" in printed
    named = float(re.findall(r"raise system.memory_budget_gb to at least ([0-9.]+)", printed)[-1])
    smaller = DEEP.replace("}", ", max_component_voxels: 100000}")
    assert decode(smaller, SIZE, f"system.memory_budget_gb={least}", output="small")[0] == 0
    assert named > least + 0.3


def test_a_distance_that_reaches_too_far_is_refused(folder: Path, decode: Run) -> None:
    write_h5(folder / "v.h5", np.ones((64, 256, 256), np.uint8))
    far = "{name: watershed, seed_distance_nm: 2000, max_component_voxels: 4096}"
    least = re.search(r"at least (\S+)", decode(far, SIZE, "system.memory_budget_gb=0.01")[1])
    assert least is not None
    code, printed = decode(far, SIZE, f"system.memory_budget_gb={float(least[1]) + 0.02}")
    assert (
        code == 3 and "decoding[0].seed_distance_nm=2000.0, (50, 250, 333) voxels (z, y, x) around a block" in printed
    )


def test_a_run_keeps_its_probabilities_or_is_refused_before_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
    volume = write_h5(folder / "cell.h5", em_like((2, 24, 32)))
    step = "decoding=[{name: watershed, connectivity: 8, seed_threshold: 0.6}]"

    def run(*words: str) -> tuple[int, str]:
        code = main(infer_words(model, folder / "out", volume, *words))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, printed = run(step)
    assert code == 2 and "set inference.output.save_probabilities=true" in printed and not final_names(folder / "out")
    one = "inference.test_time_augmentation.select_channel=[1]"
    assert run(step, "inference.output.save_probabilities=true", one)[0] == 2
    code, printed = run(step.replace("seed_threshold", "threshold: 0.5, seed_threshold"))
    assert code == 2 and "a run decodes its labels" in printed and not final_names(folder / "out")
    code, printed = run("decoding=[{name: connected_components, threshold: 0.5}]")
    assert code == 2 and "a run decodes its labels" in printed and not final_names(folder / "out")
    assert run(step, "inference.output.save_probabilities=true")[0] == 0
    labels, likely = (read_h5(folder / "out" / f"cell_labels{kind}.h5") for kind in ("", "_probabilities"))
    own = np.take_along_axis(likely, labels[None].astype(np.intp), 0)[0]
    flat = np.zeros((3, 3, 3))
    flat[1] = 1
    components, _ = ndimage.label(labels > 0, flat)
    seeds, count = ndimage.label((own > 0.6) & (labels > 0), flat)
    found = watershed(-own, seeds, flat, mask=labels > 0)
    ids = canonical(np.where((found == 0) & (labels > 0), components + count, found))
    assert np.array_equal(read_h5(folder / "out" / "cell_labels_instances.h5"), ids) and ids.max() > 3
