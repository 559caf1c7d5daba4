"""A small volume at once: the results of the other way, what is left, and what goes the other way."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden_cases import CASES, OUTPUT, run_case

from connectomics.cli import main
from connectomics.core.errors import VolumeError
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.coordination import DiskStore
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.publishing import Staging
from connectomics.execution.run_folder import COORDINATION, SINGLE_WRITER
from connectomics.execution.worker import Worker
from connectomics.inference.head import ProbabilityRule
from connectomics.jobs.ahead import FoldersAhead
from connectomics.jobs.outcome import NullObserver, VolumeOutcome, outcomes_of
from connectomics.runs import small_volume
from connectomics.runs.job import VolumeJob
from connectomics.runs.small_volume import is_in_hand, is_small, run_any_volume, run_at_once
from connectomics.stages.output.finish import FinalOutput, work_folder
from connectomics.stages.predict.filters import BinaryFilters

from nnunet_models import make_model
from small_jobs import finals, infer_words, quick_folder, write_png
from small_runs import EXTENT, IMAGE, Reader, changed, cores, job_in, run, settings_in, silent

ONE = BlockPlan(EXTENT, (1, 6, 10))
FORMATS = ("h5", "tiff", "png")
LEFT = {"provenance.json", "report.json", "checksums"}


def small_job(folder: Path, **changes: Any) -> VolumeJob:
    """A job of one block; RUN is there, as ``jobs`` makes it."""
    job = job_in(folder, plan=ONE, **changes)
    job.run_folder.mkdir(parents=True, exist_ok=True)
    return job


def sized(job: VolumeJob) -> VolumeJob:
    """The job of a volume with a voxel size and an origin."""
    reader = Reader()
    reader.info = replace(reader.info, voxel_size_nm=(30.1, 8.3, 8.7), origin_nm=(1.5, 0.0, -2.25))  # type: ignore[misc]
    return replace(job, reader=reader)


def with_outputs(job: VolumeJob, *formats: str, probabilities: bool = False) -> VolumeJob:
    """The job with results in these formats, of probabilities too."""
    outputs = [replace(output, formats=formats) for output in job.outputs]
    if probabilities:
        rule = ProbabilityRule((1,))
        segmenter = replace(job.labeller.segmenter, probabilities=rule)
        job = changed(job, segmenter=segmenter)
        outputs.append(FinalOutput("probabilities", "v_labels_probabilities", "p", ("h5", "tiff")))
    return replace(job, outputs=tuple(outputs))


def at_once(folder: Path, job: VolumeJob) -> Any:
    return run_at_once(job, settings_in(folder), silent)


@pytest.mark.parametrize("case", ["plain", "filters", "probabilities"])
def test_results_and_provenance_are_those_of_larger_volumes(tmp_path: Path, case: str) -> None:
    made = dict[str, Any]()
    for way in ("large", "small"):
        folder = tmp_path / way
        job = with_outputs(sized(small_job(folder)), *FORMATS, probabilities=case == "probabilities")
        if case == "filters":
            job = changed(job, filters=BinaryFilters(True, 3))
        report = run(folder, job) if way == "large" else at_once(folder, job)
        assert (report.planned, report.skipped, report.done, report.failed, report.windows) == (1, 0, 1, 0, 4)
        made[way] = finals(folder), json.loads((folder / "v_labels.run" / "provenance.json").read_text())
        assert not list(folder.glob("**/coordination")) and not list(folder.glob("**/staging.*"))
        assert not (folder / ".claims").exists()
    assert made["small"] == made["large"]
    assert len(made["small"][0]) >= 7


def test_what_is_left_is_told_and_true(tmp_path: Path) -> None:
    report = at_once(tmp_path, with_outputs(small_job(tmp_path), "h5", "png"))
    left = tmp_path / "v_labels.run"
    assert {path.name for path in left.iterdir()} == LEFT
    told = json.loads((left / "report.json").read_text())
    (worker,) = told["workers"]
    assert (worker["pid"], worker["blocks"], worker["windows"]) == (os.getpid(), 1, 4)
    assert told["voxels"] == report.voxels == IMAGE[0].size and told["repeated"] == 0
    lines = [line for record in sorted((left / "checksums").iterdir()) for line in record.read_text().splitlines()]
    assert [line.partition("  ")[2] for line in lines] == [
        "v_labels.h5",
        *(f"v_labels_png/{name}" for name in ("0000.png", "0001.png", "0002.png", "0003.png", "connectomics.json")),
    ]
    assert at_once(tmp_path, with_outputs(small_job(tmp_path), "h5", "png")).skipped == 1


def test_a_volume_takes_six_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = list[str]()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert at_once(tmp_path, small_job(tmp_path)) is not None
    names = [Path(path).name.partition(".0.")[0] for path in flushed]
    told = ["provenance.json", "v_labels.h5.sha256", "report.json"]
    assert names == ["v_labels.h5", *told, "staging", tmp_path.name]


def test_what_is_not_plain_goes_the_other_way(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    assert is_small(job)
    assert not is_small(replace(job, plan=BlockPlan((1, 6, 10), (1, 6, 10))))
    assert not is_small(with_outputs(job, "h5", "zarr"))
    settings = settings_in(tmp_path)
    (job.run_folder / "checksums").mkdir()
    assert run_at_once(job, settings, silent) is None, "something of an earlier run is there"
    (job.run_folder / "checksums").rmdir()
    (tmp_path / "v_labels.h5").write_text("of somebody else")
    assert run_at_once(job, settings, silent) is None
    (tmp_path / "v_labels.h5").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_volume, "SMALL_BYTES", IMAGE.nbytes - 1)
        assert run_at_once(job, settings, silent) is None
    assert finals(tmp_path) == {}


def test_a_block_that_fails_is_tried_and_told_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, calls = small_job(tmp_path), list[int]()
    segment = type(job.labeller.segmenter).segment

    def failing(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) < 4:
            raise ValueError("not this time")
        return segment(self, *given)

    monkeypatch.setattr(type(job.labeller.segmenter), "segment", failing)
    report = run_any_volume(job, settings_in(tmp_path), SerialExecutor(), silent)
    assert (report.done, len(calls)) == (1, 4), "twice in memory, and by the way of larger volumes the second time"
    assert set(finals(tmp_path)) == {"v_labels.h5"}
    assert list(tmp_path.glob("*.run/*/ledger/*.jsonl"))


def test_who_waited_for_it_does_nothing_again(tmp_path: Path) -> None:
    assert at_once(tmp_path, small_job(tmp_path)).done == 1
    told = (tmp_path / "v_labels.run" / "report.json").read_bytes()
    late = small_job(tmp_path)
    assert run(tmp_path, late).skipped == 1
    assert cores(late) == [] and (tmp_path / "v_labels.run" / "report.json").read_bytes() == told
    assert {path.name for path in (tmp_path / "v_labels.run").iterdir()} == LEFT


def test_an_input_that_changed_has_no_result(tmp_path: Path) -> None:
    def changed_meanwhile() -> None:
        raise VolumeError("it was written to")

    job = small_job(tmp_path, require_unchanged=changed_meanwhile)
    with pytest.raises(VolumeError, match="it was written to"):
        run_at_once(job, settings_in(tmp_path), silent)
    assert finals(tmp_path) == {} and not (tmp_path / ".claims").exists()
    assert run_any_volume(small_job(tmp_path), settings_in(tmp_path), SerialExecutor(), silent).done == 1


def test_one_that_another_process_has_in_hand_is_left_to_it(tmp_path: Path) -> None:
    job, settings = small_job(tmp_path), settings_in(tmp_path)
    assert not is_in_hand(job.run_folder)
    records = work_folder(job.run_folder, job.outputs, settings.program) / COORDINATION
    with Worker.of(records) as other:
        assert other.acquire(SINGLE_WRITER)
        assert is_in_hand(job.run_folder)
        assert run_at_once(job, settings, silent) is None
        assert not other.others(), "who leaves it says so"
        (records.parent / "ledger").mkdir()
        assert not is_in_hand(job.run_folder), "blocks are shared"


@pytest.mark.parametrize("moment", ["before it labels", "before it publishes", "between what is told and the result"])
def test_who_lost_its_lease_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Another process takes over, finishes by the way of larger volumes and tidies; all while this one stands still."""
    job, settings = small_job(tmp_path), settings_in(tmp_path, stale_s=0.2)
    module, name = {
        "before it labels": (small_volume, "_made"),
        "before it publishes": (small_volume, "_published"),
        "between what is told and the result": (Staging, "keep"),
    }[moment]
    original, seen = getattr(module, name), list[tuple[int, bytes]]()

    def asleep(*given: Any, **named: Any) -> Any:
        if not seen:
            monkeypatch.setattr(module, name, original)
            monkeypatch.setattr(Worker, "renew", lambda self: False)
            seen.append((0, b""))
            taken_over(tmp_path, job)
            final = tmp_path / "v_labels.h5"
            seen[0] = (final.stat().st_ino, final.read_bytes())
        return original(*given, **named)

    monkeypatch.setattr(module, name, asleep)
    report = run_any_volume(job, settings, SerialExecutor(), silent)
    final = tmp_path / "v_labels.h5"
    assert (final.stat().st_ino, final.read_bytes()) == seen[0], "the sleeper put its own in place"
    assert report.skipped == 1 and not list(tmp_path.glob("**/coordination"))


def taken_over(folder: Path, job: VolumeJob) -> None:
    """Finish a job whose holder stands still: its session is ended, as any witness does who looked for long enough."""
    (records,) = job.run_folder.glob(f"*/{COORDINATION}")
    store = DiskStore(records)
    for name in store.list("session-"):
        seen = store.read(name)
        assert seen is not None
        told = json.loads(seen.content) | {"state": "revoked", "by": "a test"}
        assert store.replace(name, seen, json.dumps(told).encode()) is not None
    assert run(folder, job).done == 1


def test_folders_are_made_ahead_and_those_that_nobody_began_go(tmp_path: Path) -> None:
    folders = [tmp_path / f"{name}.run" for name in "abc"] + [tmp_path / "absent" / "d.run"]
    with FoldersAhead(folders) as ahead:
        ahead.make(folders[0])
        assert [folder.is_dir() for folder in folders] == [True, True, True, False]
        (folders[0] / "run.log").touch()
        ahead.make(folders[1])
    assert [folder.is_dir() for folder in folders] == [True, False, False, False]


def test_volumes_that_others_have_in_hand_come_last() -> None:
    order, busy = list[int](), {0, 2}

    def process(number: int) -> VolumeOutcome:
        order.append(number)
        return VolumeOutcome(f"v{number}", "failed" if number == 2 else "done", storage=number == 2)

    names = [f"v{number}" for number in range(5)]
    outcomes = outcomes_of(names, {"v1": ()}, process, NullObserver(), put_off=lambda number: number in busy)
    assert order == [3, 4, 0, 2]
    assert [outcome.state for outcome in outcomes] == ["done", "skipped", "failed", "done", "done"]


def test_the_commands_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        image = write_png(folder / "a.png", (16, 24))
        words = [*infer_words(model, tmp_path, image), "inference.test_time_augmentation.enabled=false"]
        assert main(words) == 0
        left, result = str(tmp_path / "a_labels.run"), tmp_path / "a_labels.h5"
        assert {path.name for path in Path(left).iterdir()} == LEFT | {"run.log"}
        assert main(["status", left]) == 0
        assert main(["verify-run", left]) == 0
        told = capsys.readouterr().out
        for line in ("survey       done", "predict      1/1 blocks", "a_labels.h5, files: 1 read, 0 damaged"):
            assert line in told
        assert main(["reproduce", str(result)]) == 0
        assert "inference.block_shape=" in capsys.readouterr().out
        steps = "decoding=[{name: connected_components}]"
        assert main(["decode", left, steps, f"inference.data.output_path='{tmp_path / 'objects'}'"]) == 0

        whole = result.read_bytes()
        result.write_bytes(whole[:-1] + b"?")
        assert main(["verify-run", left]) == 3
        assert main(["status", left]) == 0
        assert "1/1" not in capsys.readouterr().out
        assert main(words) == 0, "the remedy"
        assert result.read_bytes() == whole
        assert main(["verify-run", left]) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_configuration_gives_the_bytes_of_larger_volumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for largest in (small_volume.SMALL_BYTES, 0):
        monkeypatch.setattr(small_volume, "SMALL_BYTES", largest)
        with quick_folder() as folder:
            monkeypatch.chdir(folder)
            keys = run_case(CASES[name], folder)
            found.append(({run: described["run_key"] for run, described in keys.items()}, finals(folder / OUTPUT)))
    (keys_at_once, at_once), (keys, larger) = found
    assert keys_at_once == keys and at_once.keys() == larger.keys()
    assert [path for path in larger if at_once[path] != larger[path]] == []
