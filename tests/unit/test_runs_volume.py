"""One volume from start to end with a predictor of two lines: order of blocks, records, filters, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from connectomics.core.errors import OutputError, VolumeError
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.name_claims import NameClaims
from connectomics.execution.stage import LABELS
from connectomics.execution.worker import Worker
from connectomics.models.spec import ChannelNormalisation
from connectomics.runs.job import RunSettings, VolumeJob
from connectomics.runs.volume import run_volume
from connectomics.stages.output.finish import FinalOutput, settle, work_folder
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.stages.predict.segmenter import EnsembleMember

from small_runs import (
    BLOCKS,
    EXPECTED,
    IMAGE,
    Failing,
    NotNegative,
    Reader,
    Shuffled,
    changed,
    cores,
    job_in,
    labels,
    run,
    settings_in,
)


def test_the_labels_are_those_of_the_predictor(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    report = run(tmp_path, job)
    assert (labels(tmp_path) == EXPECTED).all()
    assert (report.planned, report.skipped, report.done, report.windows) == (BLOCKS, 0, BLOCKS, BLOCKS)
    assert report.voxels == EXPECTED.size
    assert json.loads((tmp_path / "v_labels.run" / "report.json").read_text())["windows"] == BLOCKS


def test_the_order_of_the_blocks_does_not_matter(tmp_path: Path) -> None:
    contents = []
    for name, executor in (("serial", SerialExecutor()), ("shuffled", Shuffled())):
        job = job_in(tmp_path / name, probabilities=True)
        run(tmp_path / name, job, executor)
        contents.append([p.read_bytes() for p in sorted((tmp_path / name).glob("v_*.h5"))])
        assert len(contents[-1]) == 2
    assert contents[0] == contents[1]


def test_progress_is_told_at_the_start_and_after_each_block(tmp_path: Path) -> None:
    heard = []

    def hear(finished: int, planned: int) -> None:
        heard.append((finished, planned))

    run_volume(job_in(tmp_path), settings_in(tmp_path), SerialExecutor(), hear)
    assert heard == [(i, BLOCKS) for i in range(BLOCKS + 1)]


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="the disk is gone"):
        run(tmp_path, job_in(tmp_path), Failing(after=5))
    assert not (tmp_path / "v_labels.h5").exists()
    job = job_in(tmp_path)
    report = run(tmp_path, job)
    assert (report.skipped, report.done, len(cores(job))) == (5, BLOCKS - 5, BLOCKS - 5)
    assert (labels(tmp_path) == EXPECTED).all()


def test_a_finished_output_is_not_made_again_with_a_missing_one(tmp_path: Path) -> None:
    run(tmp_path, job_in(tmp_path, probabilities=True))
    before = (tmp_path / "v_labels.h5").stat().st_mtime_ns
    (tmp_path / "v_labels_probabilities.h5").unlink()
    report = run(tmp_path, job_in(tmp_path, probabilities=True))
    assert report.done == BLOCKS, "the working store was removed, so its blocks are computed again"
    assert (tmp_path / "v_labels.h5").stat().st_mtime_ns == before
    assert (tmp_path / "v_labels_probabilities.h5").exists()


@pytest.mark.parametrize("by_slice", [False, True])
def test_the_mask_is_the_same_after_a_failure(tmp_path: Path, by_slice: bool) -> None:
    image = IMAGE.copy()
    image[:, :, :4] = image[..., -3:] = image[:, 1:3, 6:8, 5:9] = 0
    scheme = ChannelNormalisation("ZScoreNormalization", masked=True)
    results = []
    for name, fails in (("whole", ()), ("resumed", (3, 4))):
        folder = tmp_path / name
        job = job_in(folder, reader=Reader(image))
        job = changed(
            job,
            segmenter=replace(
                job.labeller.segmenter,
                members=(EnsembleMember(NotNegative(), (scheme,), section_axis=0 if by_slice else None),),
            ),
        )
        for after in fails:
            with pytest.raises(VolumeError, match="the disk is gone"):
                run(folder, job, Failing(after=after))
        run(folder, job)
        results.append(labels(folder))
    assert results[0].tobytes() == results[1].tobytes()
    inside = labels(tmp_path / "whole")[1:3, 6:8, 5:9]
    assert (inside == by_slice).all(), "a hole is normalised in a volume, and has no part in a section's mask"


def test_every_missing_shard_is_found_whatever_the_sample(tmp_path: Path) -> None:
    extent_blocks = [(z, y, x) for z in range(4) for y in range(2) for x in range(2)]
    for lost in extent_blocks[::3]:
        folder = tmp_path / "-".join(map(str, lost))
        with pytest.raises(VolumeError):
            run(folder, job_in(folder), Failing(after=BLOCKS - 1))
        shards = next(folder.glob("v_labels.run/*/labels.zarr/0/c"))
        shards.joinpath(*map(str, lost)).unlink()
        job = job_in(folder)
        run(folder, job)
        assert {core.start for core in cores(job)} == {(lost[0], lost[1] * 6, lost[2] * 10), (3, 6, 10)}
        assert (labels(folder) == EXPECTED).all()


def test_what_another_run_made_until_just_now_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had the name when this run began, and ended before this run had it."""
    job, enter = job_in(tmp_path), NameClaims.__enter__

    def entered(self: NameClaims) -> NameClaims:
        (tmp_path / "v_labels.h5").write_bytes(b"theirs")
        return enter(self)

    monkeypatch.setattr(NameClaims, "__enter__", entered)
    kept = replace(job, outputs=tuple(replace(output, overwrite=False) for output in job.outputs))
    with pytest.raises(OutputError, match=r"v_labels\.h5: exists, but was made by another model"):
        run(tmp_path, kept)
    assert (tmp_path / "v_labels.h5").read_bytes() == b"theirs"
    run(tmp_path, job)
    assert (labels(tmp_path) == EXPECTED).all()


def test_who_sleeps_before_it_joins_ends_with_what_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has done and tidied all meanwhile, the folder of records too."""
    join = Worker.join

    def slept(self: Worker) -> None:
        monkeypatch.setattr(Worker, "join", join)
        run(tmp_path, job_in(tmp_path))
        join(self)

    monkeypatch.setattr(Worker, "join", slept)
    report = run(tmp_path, job_in(tmp_path))
    assert (report.planned, report.done) == (BLOCKS, 0)
    assert (labels(tmp_path) == EXPECTED).all()
    assert not list(tmp_path.glob("*.run/*/coordination"))


def test_a_shard_that_vanishes_before_the_export_is_computed_again(tmp_path: Path) -> None:
    """A process that slept may remove what another works with: zeros never take its place."""
    taken: list[int] = []

    def take_away(finished: int, planned: int) -> None:
        if finished == planned and len(taken) < 2:
            (work,) = (tmp_path / "v_labels.run").glob("*/labels.zarr")
            (work / "0/c/1/0/1").unlink()
            taken.append(finished)

    run_volume(job_in(tmp_path), settings_in(tmp_path), SerialExecutor(), take_away)
    assert len(taken) == 2
    assert (labels(tmp_path) == EXPECTED).all()


def test_a_shard_that_vanishes_again_and_again_is_named(tmp_path: Path) -> None:
    def take_away(finished: int, planned: int) -> None:
        if finished == planned:
            (work,) = (tmp_path / "v_labels.run").glob("*/labels.zarr")
            (work / "0/c/1/0/1").unlink(missing_ok=True)

    with pytest.raises(VolumeError, match=r"no shard .*labels\.zarr/0/c/1/0/1, though it was written.*run again"):
        run_volume(job_in(tmp_path), settings_in(tmp_path), SerialExecutor(), take_away)
    assert not (tmp_path / "v_labels.h5").exists()
    assert run(tmp_path, job_in(tmp_path)).done == 1
    assert (labels(tmp_path) == EXPECTED).all()


def test_a_sample_of_many_blocks_is_compared(tmp_path: Path) -> None:
    """More blocks than are checked: some damage is found, and whatever is found is computed again."""
    plan = BlockPlan((1, 2, 4), (1, 2, 4))
    with pytest.raises(VolumeError):
        run(tmp_path, job_in(tmp_path, plan=plan), Failing(after=119))
    shards = sorted(p for p in tmp_path.glob("v_labels.run/*/labels.zarr/0/c/**/*") if p.is_file())
    for shard in shards:
        shard.write_bytes(b"")
    job = job_in(tmp_path, plan=plan)
    report = run_lenient(tmp_path, job)
    assert 16 <= report <= 32


def run_lenient(folder: Path, job: VolumeJob) -> int:
    """How many blocks were computed of those that were recorded; the export meets the damaged rest."""
    with pytest.raises(VolumeError, match="Copy it again from its source"):
        run(folder, job)
    return len(cores(job)) - 1


def test_without_its_ledger_a_store_of_other_blocks_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(VolumeError):
        run(tmp_path, job_in(tmp_path), Failing(after=5))
    shutil.rmtree(next(tmp_path.glob("v_labels.run/*/ledger")))
    job = job_in(tmp_path, plan=BlockPlan((2, 12, 20), (1, 6, 10)))
    assert run(tmp_path, job).done == 2
    assert (labels(tmp_path) == EXPECTED).all()


def test_filters_see_the_whole_volume(tmp_path: Path) -> None:
    run(tmp_path, job_in(tmp_path, filters=BinaryFilters(minimum_voxels=10**6)))
    assert not labels(tmp_path).any()
    assert not list(tmp_path.glob("v_labels.run/*/*.zarr"))


def test_formats_that_cannot_hold_an_output_are_refused_before_any_work(tmp_path: Path) -> None:
    for form, budget, finding in (
        ("precomputed", 1 << 30, r"v_labels\.precomputed: precomputed states voxel sizes"),
        ("png", 500, r"v_labels_png: png holds whole sections"),
    ):
        job = job_in(tmp_path, outputs=(FinalOutput(LABELS, "v_labels", "k", ("h5", form)),))
        with pytest.raises(OutputError, match=finding):
            run(tmp_path, job, budget_bytes=budget)
        assert not cores(job) and not list(tmp_path.iterdir())


def test_another_key_or_program_is_work_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(VolumeError):
        run(tmp_path, job_in(tmp_path), Failing(after=5))
    (begun,) = (path for path in (tmp_path / "v_labels.run").iterdir() if path.is_dir())
    for job, changes in ((job_in(tmp_path, key="other"), {}), (job_in(tmp_path), {"program": "program 2"})):
        report = run(tmp_path, job, **changes)
        assert report.done == BLOCKS
        assert f"unfinished work of other settings ({begun.name})" in caplog.text
        assert (begun / "labels.zarr").is_dir()
        caplog.clear()
        (tmp_path / "v_labels.h5").unlink()


def test_the_stamp_says_how_it_was_made(tmp_path: Path) -> None:
    run(tmp_path, job_in(tmp_path))
    provenance = json.loads((tmp_path / "v_labels.run" / "provenance.json").read_text())
    with h5py.File(tmp_path / "v_labels.h5") as file:
        stamp = json.loads(file.attrs["connectomics"])
    assert provenance.pop("command") == ["again", "inference.block_shape=[1,6,10]"]
    assert provenance.pop("result_keys") == {"labels": "k"}
    assert provenance.pop("outputs") == ["v_labels.h5"]
    assert stamp == provenance | {"result_key": "k"}
    assert provenance["numeric_class"] == {"threads": 1}
    assert (provenance["seed"], provenance["cases"]) == (0, 1)
    (statistics,) = provenance["statistics"]
    assert statistics["mean"] == pytest.approx(IMAGE.mean(), rel=1e-12)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "v_labels.run").touch()
    with pytest.raises(OutputError, match=r"cannot make the RUN folder \(Not a directory\)"):
        run(tmp_path, job_in(tmp_path))


def settled(job: VolumeJob, settings: RunSettings) -> None:
    """As the next run finds the outputs complete."""
    work = work_folder(job.run_folder, job.outputs, settings.program)
    paths = (path for o in job.outputs for path in o.paths(settings.folder).values())
    settle(job.run_folder, work, job.outputs, paths)


def test_what_a_kill_after_the_last_export_left_is_settled_and_other_work_stays(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    job, other = job_in(tmp_path), job_in(tmp_path, key="other")
    for unfinished in (job, other):
        with pytest.raises(VolumeError):
            run(tmp_path, unfinished, Failing(after=1))
    assert len(list(tmp_path.glob("v_labels.run/*/labels.zarr"))) == 2
    (tmp_path / "v_labels.h5").write_bytes(b"finished")
    settled(job, settings)
    assert len(list(tmp_path.glob("v_labels.run/*/labels.zarr"))) == 1
    assert len(list(tmp_path.glob("v_labels.run/*/ledger/header.json"))) == 2
    record = tmp_path / "v_labels.run" / "checksums" / "v_labels.h5.sha256"
    assert record.read_text() == f"{hashlib.sha256(b'finished').hexdigest()}  v_labels.h5\n"
    settled(replace(job, run_folder=tmp_path / "absent.run"), settings)
    assert not (tmp_path / "absent.run").exists()


def test_the_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with pytest.raises(VolumeError):
        run(tmp_path, job, Failing(after=1))
    (work,) = (path for path in job.run_folder.iterdir() if path.is_dir())
    with Worker.of(work / "coordination"):
        settled(job, settings_in(tmp_path))
        assert (work / "labels.zarr").is_dir()
