"""Many volumes: one failure stays one volume's, observers hear of everything, logs are kept, leftovers go."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.volumes import named_sources
from connectomics.config.load import load_config
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError
from connectomics.jobs.outcome import NullObserver, Observer, VolumeOutcome
from connectomics.lightning import inference
from connectomics.lightning.inference import VolumeProcessor, check_output_folder
from connectomics.runs import small_volume
from connectomics.volumes.listing import VolumeSource

from nnunet_models import make_model
from small_jobs import em_like, final_names, quick_folder, write_h5


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        for i in range(3):
            write_h5(place / f"v{i}.h5", em_like((1, 16, 16), i))
        (place / "bad.h5").touch()
        make_model(place / "model", dimensions=2, patch=(16, 16), features=(4, 8), mirror_axes=())
        yield place


@pytest.fixture
def output(folder: Path) -> Iterator[Path]:
    yield folder / "out"
    shutil.rmtree(folder / "out", ignore_errors=True)


def engine_for(folder: Path, *more: str) -> tuple[Config, Engine]:
    config = load_config(
        None, [f"inference.data.output_path='{folder}/out'", "system.device=cpu", "system.num_cpus=1", *more]
    )
    (model,) = (folder / "model").iterdir()
    return config, build_engine(config, model)


def sources(folder: Path, *names: str) -> list[VolumeSource]:
    return named_sources([str(folder / f"{name}.h5") for name in names], 1)


class Notes:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def listed(self, total: int, finished: int) -> None:
        self.heard.append(("listed", total, finished))

    def began(self, name: str) -> None:
        self.heard.append(("began", Path(name).stem))

    def block(self, finished: int, planned: int) -> None:
        self.heard.append(("block", finished, planned))

    def ended(self, outcome: VolumeOutcome) -> None:
        self.heard.append(("ended", Path(outcome.name).stem, outcome.state))


def test_a_failure_is_one_volumes_and_the_others_are_done(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder)
    outcomes = VolumeProcessor(config, engine).run(sources(folder, "v0", "bad", "v1"))
    assert [o.state for o in outcomes] == ["done", "failed", "done"]
    assert "0 bytes" in outcomes[1].reason
    assert outcomes[0].paths == (output / "v0_labels.h5",)
    assert outcomes[0].report is not None and outcomes[0].report.done == 1
    assert outcomes[0].seconds > 0
    assert final_names(output) == {"v0_labels.h5", "v1_labels.h5"}


def test_all_results_go_where_the_processors_configuration_says(folder: Path, tmp_path: Path) -> None:
    _, engine = engine_for(folder)
    other = load_config(None, [f"inference.data.output_path='{tmp_path}/other'", "system.device=cpu"])
    (outcome,) = VolumeProcessor(other, engine).run(sources(folder, "v0"))
    assert outcome.paths == (tmp_path / "other" / "v0_labels.h5",)
    assert final_names(tmp_path / "other") == {"v0_labels.h5"}
    assert (tmp_path / "other" / "v0_labels.run" / "provenance.json").exists()
    assert not (folder / "out").exists()


class Writer(Notes):
    """An observer that writes to the volume after its first block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def block(self, finished: int, planned: int) -> None:
        if finished == planned:
            os.utime(self.path, ns=(0, self.path.stat().st_mtime_ns + 1_000_000_000))


def test_a_volume_that_changes_while_it_is_read_has_no_result(folder: Path, output: Path, tmp_path: Path) -> None:
    path = tmp_path / "changing.h5"
    write_h5(path, em_like((1, 16, 16)))
    config, engine = engine_for(folder)
    (outcome,) = VolumeProcessor(config, engine, Writer(path)).run(named_sources([str(path)], 1))
    assert outcome.state == "failed" and "not any more what they were when the run began" in outcome.reason
    assert final_names(output) == set()
    (outcome,) = VolumeProcessor(config, engine).run(named_sources([str(path)], 1))  # the remedy
    assert outcome.state == "done" and final_names(output) == {"changing_labels.h5"}


def test_stop_on_error_stops(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder, "inference.volume_mode.stop_on_error=true")
    outcomes = VolumeProcessor(config, engine).run(sources(folder, "v0", "bad", "v1"))
    assert [o.state for o in outcomes] == ["done", "failed"]
    assert final_names(output) == {"v0_labels.h5"}


def test_an_observer_hears_of_everything_in_order(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder)
    VolumeProcessor(config, engine).run(sources(folder, "v0"))
    notes = Notes()
    VolumeProcessor(config, engine, notes).run(sources(folder, "v0", "bad", "v1"))
    assert notes.heard == [
        ("listed", 3, 1),
        ("ended", "v0", "skipped"),
        ("began", "bad"),
        ("ended", "bad", "failed"),
        ("began", "v1"),
        ("block", 0, 1),
        ("block", 1, 1),
        ("ended", "v1", "done"),
    ]


def test_silence_is_an_observer() -> None:
    silence: Observer = NullObserver()
    silence.listed(1, 0)
    silence.began("v")
    silence.block(0, 1)
    silence.ended(VolumeOutcome("v", "done"))


@pytest.mark.parametrize(
    ("error", "reason", "traceback"),
    [
        (ZeroDivisionError("of ours"), "ZeroDivisionError: of ours (unexpected; the traceback is in run.log)", True),
        (MemoryError(), "out of memory", False),
        (OSError(28, "No space left", "x"), "[Errno 28] No space left: 'x'; free the disk or mend", False),
    ],
)
def test_whatever_goes_wrong_is_an_outcome_and_in_the_log(
    folder: Path, output: Path, error: Exception, reason: str, traceback: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config, engine = engine_for(folder)
    with mock.patch.object(inference, "run_any_volume", side_effect=error):
        (outcome,) = VolumeProcessor(config, engine).run(sources(folder, "v0"))
    assert outcome.state == "failed"
    assert reason in outcome.reason
    log = (output / "v0_labels.run" / "run.log").read_text()
    assert "INFO connectomics: stopped: " in log
    assert ("Traceback" in log) == traceback
    assert capsys.readouterr().err == ""


def test_an_interruption_is_no_outcome(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder)
    with (
        mock.patch.object(inference, "run_any_volume", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        VolumeProcessor(config, engine).run(sources(folder, "v0", "v1"))
    log = (output / "v0_labels.run" / "run.log").read_text()
    assert "stopped: " in log and "Traceback" not in log
    assert not (output / "v1_labels.run").exists()


def test_a_broken_volume_leaves_its_reason_in_its_log(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder)
    (outcome,) = VolumeProcessor(config, engine).run(sources(folder, "bad"))
    assert outcome.reason in (output / "bad_labels.run" / "run.log").read_text()


def test_the_log_is_closed_and_the_loggers_level_is_as_before(folder: Path, output: Path) -> None:
    logger = logging.getLogger("connectomics")
    before = logger.level, list(logger.handlers)
    config, engine = engine_for(folder)
    VolumeProcessor(config, engine).run(sources(folder, "v0", "bad"))
    assert (logger.level, logger.handlers) == before


def test_a_log_on_a_full_disk_is_let_go(folder: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "v0_labels.run").mkdir(parents=True)
    (output / "v0_labels.run" / "run.log").symlink_to("/dev/full")
    config, engine = engine_for(folder)
    (outcome,) = VolumeProcessor(config, engine).run(sources(folder, "v0"))
    assert outcome.state == "done"
    assert capsys.readouterr().err == ""


def test_a_run_folder_that_cannot_be_made_fails_its_volume(folder: Path, output: Path) -> None:
    output.mkdir()
    (output / "v0_labels.run").touch()
    config, engine = engine_for(folder)
    outcomes = VolumeProcessor(config, engine).run(sources(folder, "v0", "v1"))
    assert [o.state for o in outcomes] == ["failed", "done"]
    assert "cannot make the RUN folder (File exists)" in outcomes[0].reason


def test_working_stores_that_a_kill_left_behind_a_finished_volume_are_removed(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_volume, "SMALL_BYTES", 0)
    config, engine = engine_for(folder)
    VolumeProcessor(config, engine).run(sources(folder, "v0"))
    (work,) = (path.parent for path in (output / "v0_labels.run").glob("*/ledger"))
    (work / "labels.zarr" / "0").mkdir(parents=True)
    (outcome,) = VolumeProcessor(config, engine).run(sources(folder, "v0"))
    assert outcome.state == "skipped"
    assert outcome.paths == (output / "v0_labels.h5",)
    assert {path.name for path in work.iterdir() if path.is_dir()} == {"ledger"}


def test_a_finished_volume_whose_input_is_gone_is_a_failure(folder: Path, output: Path) -> None:
    volume = write_h5(folder / "gone.h5", em_like((1, 16, 16)))
    config, engine = engine_for(folder)
    VolumeProcessor(config, engine).run(sources(folder, "gone"))
    volume.unlink()
    (outcome,) = VolumeProcessor(config, engine).run(sources(folder, "gone"))
    assert (outcome.state, "no such file" in outcome.reason) == ("failed", True)


def test_the_report_counts_windows(folder: Path, output: Path) -> None:
    config, engine = engine_for(folder)
    VolumeProcessor(config, engine).run(sources(folder, "v0"))
    report = json.loads((output / "v0_labels.run" / "report.json").read_text())
    assert report["windows"] == report["planned"] == 1


def test_the_output_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    check_output_folder(tmp_path / "a" / "b")


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=r"inference\.data\.output_path=.*/a/b: cannot be made \(Not a directory\)"):
        check_output_folder(tmp_path / "a" / "b")


def test_an_output_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    with mock.patch.object(os, "access", return_value=False), pytest.raises(ConfigError, match="may not be written to"):
        check_output_folder(tmp_path)
