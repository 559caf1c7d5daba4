"""plan: blocks, windows and outputs of a real run before it, time and its outcome, refusals, JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.cli import main
from connectomics.core.errors import ResourceError
from connectomics.forecast import calibration
from connectomics.forecast import volumes as planning
from connectomics.planning.forecast import (
    CostModel,
    Forecast,
    PlannedMemory,
    PlannedTime,
    PlannedWork,
    Timing,
    require_within,
)
from connectomics.stages.output.size import OutputSize

from nnunet_models import make_model
from small_jobs import em_like, finals, infer_words, quick_folder, write_h5

MIRRORED = "inference.test_time_augmentation.enabled=true"
BLOCKS = "inference.block_shape=[1,16,32]"
SAVE = "inference.output.save_probabilities=true"
SIZE = "inference.voxel_size_nm=[40,4,4]"
ALL = "inference.output.formats=[h5,tiff,zarr,zarr2,n5,precomputed]"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        make_model(place / "model", dimensions=2, patch=(16, 32), features=(4, 8), classes=3, mirror_axes=(0, 1))
        write_h5(place / "v.h5", em_like((3, 40, 70)))
        write_h5(place / "w.h5", em_like((2, 24, 32)))
        write_h5(place / "m" / "mask.h5", (np.random.default_rng(2).random((3, 3, 3)) < 0.4).astype(np.uint8))
        (place / "bad.h5").touch()
        yield place


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WINDOWS_S", 0.05)


def words(folder: Path, output: Path, *more: str, pattern: str = "v.h5") -> list[str]:
    (model,) = (folder / "model").iterdir()
    return infer_words(model, output, folder / pattern, f"system.cache_dir='{folder}/none'", *more)


def planned(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments[1:]]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "v_labels.run" / "report.json").read_text())
    return found


@pytest.mark.parametrize(
    "more",
    [
        [],
        [BLOCKS, MIRRORED],
        ["inference.roi=[[1,5,3],[2,40,20]]", BLOCKS],
        ["inference.mask=mask.h5", BLOCKS],
        ["inference.mask=mask.h5", "inference.roi=[[0,16,32],[3,40,70]]", BLOCKS],
        [SAVE, ALL, SIZE],
    ],
)
def test_a_run_does_what_was_planned(
    folder: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, tmp_path / "out", *(word.replace("mask.h5", f"{folder}/m/mask.h5") for word in more))
    (volume,) = planned(capsys, arguments)["volumes"]
    assert list(tmp_path.iterdir()) == [], "planning leaves nothing behind"
    assert main(arguments) == 0
    report = report_of(tmp_path / "out")
    assert (report["planned"], report["windows"]) == (volume["blocks"], volume["windows"])
    assert volume["forward_passes"] == volume["windows"] * 4
    written = finals(tmp_path / "out")
    assert sum(len(data) for data in written.values()) <= volume["output_bytes"]
    assert len(written) <= volume["output_files"]
    assert {Path(o["path"]).name for o in volume["outputs"]} == {name.partition("/")[0] for name in written}
    assert 0 < volume["low_s"] < volume["predicted_s"] < volume["high_s"]
    assert 0 < volume["host_bytes"] < volume["budget_bytes"]


def test_several_volumes_are_summed_and_bad_ones_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, tmp_path / "out", pattern="*.h5")
    found = planned(capsys, arguments, code=3)
    assert [Path(v["name"]).name for v in found["volumes"]] == ["v.h5", "w.h5"]
    assert found["total"]["windows"] == sum(v["windows"] for v in found["volumes"])
    (refused,) = found["refused"]
    assert Path(refused["name"]).name == "bad.h5" and "0 bytes" in refused["reason"]
    assert main(["plan", *arguments[1:]]) == 3
    out = capsys.readouterr().out
    assert "2 volumes: " in out and "refused: " in out and "a calibration of some windows" in out


@pytest.mark.parametrize("command", ["plan", "infer-volume"])
@pytest.mark.parametrize(
    ("limit", "advice"),
    [("--max-hours", "set system.backend=auto .* or raise --max-hours"), ("--max-gb", "leave formats out .*--max-gb")],
)
def test_what_is_too_much_is_refused_before_anything_is_done(
    folder: Path, tmp_path: Path, command: str, limit: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, tmp_path / "out")[1:]
    assert main([command, limit, "1e-9", *arguments]) == ResourceError.exit_code == 3
    err = capsys.readouterr().err
    assert f"{limit} allows 1e-09" in err
    assert re.search(advice, err)
    assert not (tmp_path / "out").exists()


def test_a_run_within_its_limits_goes_on(folder: Path, tmp_path: Path) -> None:
    assert main([*words(folder, tmp_path / "out"), "--max-hours", "1", "--max-gb", "1"]) == 0
    assert (tmp_path / "out" / "v_labels.h5").exists()


def test_long_runs_are_predicted_and_held_against_the_outcome(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(folder, tmp_path / "short")) == 0
    assert report_of(tmp_path / "short")["predicted_s"] is report_of(tmp_path / "short")["ratio"] is None
    assert "too short to be timed" in (tmp_path / "short" / "v_labels.run" / "run.log").read_text()
    monkeypatch.setattr(planning, "WORTH_WINDOWS", 1)
    monkeypatch.setattr(planning, "WORTH_S", 0.0)
    assert main(words(folder, tmp_path / "long")) == 0
    report = report_of(tmp_path / "long")
    assert report["predicted_s"] > 0
    assert report["ratio"] == pytest.approx(report["seconds"] / report["predicted_s"], abs=1e-3)
    log = (tmp_path / "long" / "v_labels.run" / "run.log").read_text()
    assert "plan: 1 blocks of (3, 40, 70) voxels, 48 windows, about " in log
    assert f"predicted were {report['predicted_s']:.1f} s" in log
    assert "miniature" not in log and log.count("surveyed") == 1
    assert finals(tmp_path / "long").keys() == finals(tmp_path / "short").keys()


def test_a_resumed_run_is_planned_as_it_was_begun_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiff = "inference.output.formats=[tiff]"
    assert main(words(folder, tmp_path / "whole", BLOCKS, tiff)) == 0
    begun = words(folder, tmp_path / "out", BLOCKS, tiff)
    with monkeypatch.context() as patched:
        patched.setattr("connectomics.runs.volume._finish", lambda *each: 1 / 0)
        assert main(begun) == 3
    (work,) = (tmp_path / "out" / "v_labels.run").glob("*/labels.zarr")
    for shard in [f for f in (work / "0" / "c").rglob("*") if f.is_file()][:7]:
        shard.unlink()
    monkeypatch.setattr(planning, "WORTH_WINDOWS", 1)
    monkeypatch.setattr(planning, "WORTH_S", 0.0)
    again = words(folder, tmp_path / "out", tiff)
    capsys.readouterr()
    (volume,) = planned(capsys, again)["volumes"]
    assert volume["block_shape"] == [1, 16, 32] and volume["blocks"] == 27
    assert main(again) == 0
    report = report_of(tmp_path / "out")
    assert (report["planned"], report["done"]) == (27, 7)
    assert report["predicted_s"] > 0
    assert finals(tmp_path / "out") == finals(tmp_path / "whole")


def test_the_pace_adds_up() -> None:
    pace = CostModel((Timing(2.0, 1.0, 6.0), Timing(0.5, 0.5, 0.5)), (3.0, 0.0), 0.001, 10.0, "")
    found = pace.predict([10, 4], [2, 0], 1000)
    assert found == Timing(20 + 2 + 6 + 1 + 10, min(29, 39 * 0.8), 79)


def test_limits_are_of_all_volumes_together() -> None:
    one = Forecast(
        "v",
        PlannedWork(1, (1, 1, 1), 1, 1, 1, 2),
        PlannedTime(Timing(2000.0, 1.0, 3000.0), ""),
        PlannedMemory(1, 0, 1),
        (),
        OutputSize(0, 0),
        "",
    )
    require_within([one], 0.6, None)
    with pytest.raises(ResourceError, match=r"2 volumes are .* 1\.11 hours, --max-hours allows 1;"):
        require_within([one, replace(one, name="w")], 1.0, None)


def test_a_plan_needs_no_output_folder_that_may_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "closed" / "out"
    output.parent.mkdir(mode=0o555)
    try:
        assert planned(capsys, words(folder, output))["total"]["volumes"] == 1
    finally:
        shutil.rmtree(output.parent, ignore_errors=True)
