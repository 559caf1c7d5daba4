"""report.json: the sum over processes, whether they ran through, failed, were killed or came later."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from connectomics.core.errors import QuarantineError, VolumeError
from connectomics.core.geometry import Block
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.stage import LABELS
from connectomics.execution.task import BlockFailure, BlockRecord, Task
from connectomics.runs import run_report
from connectomics.runs.job import VolumeJob
from connectomics.stages.output.finish import FinalOutput

from small_jobs import quick_folder
from small_runs import BLOCKS, EXPECTED, Failing, Reader, changed, job_in, labels, run


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        yield made


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "v_labels.run" / "report.json").read_text())
    return content


def counts(report: dict[str, Any]) -> tuple[int, ...]:
    return tuple(report[key] for key in ("planned", "skipped", "done", "failed", "windows"))


def shares(report: dict[str, Any]) -> list[int]:
    return [worker["blocks"] for worker in report["workers"]]


class KilledError(BaseException):
    """Ends a run as a kill does: nothing is told any more."""


class Killed:
    """An executor of a process that is killed after so many blocks."""

    def __init__(self, after: int) -> None:
        self._after = after

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        for i, record in enumerate(SerialExecutor().run(task, blocks)):
            if i == self._after:
                raise KilledError
            yield record


def killed(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run in this process of which nothing is left but what it had recorded."""

    def nothing(self: object, signature: object) -> None: ...

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(run_report.Accounting, "_tell", nothing)
        run(folder, job_in(folder), Killed(after))


def test_of_one_process_that_runs_through_the_figures_are_its_own(folder: Path) -> None:
    own = run(folder, changed(job_in(folder), predicted_s=8.0))
    report = told(folder)
    (worker,) = report["workers"]
    assert counts(report) == (BLOCKS, 0, BLOCKS, 0, BLOCKS)
    took = ("seconds", "ratio")  # measured from a little before to a little after
    assert {key: report[key] for key in asdict(own) if key not in took} == {
        key: value for key, value in asdict(own).items() if key not in took
    }
    assert own.seconds <= report["seconds"] < own.seconds + 1
    assert report["ratio"] == pytest.approx(report["seconds"] / 8.0, abs=1e-3)
    assert (worker["pid"], worker["blocks"], worker["windows"]) == (os.getpid(), BLOCKS, BLOCKS)
    assert worker["seconds"] == report["seconds"] == pytest.approx(report["wall_s"], abs=0.1)
    assert worker["until"] - worker["since"] == pytest.approx(report["wall_s"], abs=1e-3)
    assert report["repeated"] == 0


def test_who_fails_tells_what_it_did_and_who_comes_later_adds_to_it(folder: Path) -> None:
    for after, finished in ((5, 0), (4, 5)):
        with pytest.raises(VolumeError):
            run(folder, job_in(folder), Failing(after))
        assert counts(told(folder)) == (BLOCKS, finished, after, 0, after)
    own = run(folder, job_in(folder))
    report = told(folder)
    assert (own.skipped, own.done) == (9, BLOCKS - 9)
    assert counts(report) == (BLOCKS, 9, BLOCKS - 9, 0, BLOCKS - 9)
    assert shares(report) == [5, 4, BLOCKS - 9], "those of before are not forgotten"
    since = [worker["since"] for worker in report["workers"]]
    assert since == sorted(since) and len(set(since)) == 3


def test_the_blocks_of_a_process_that_was_killed_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(folder, monkeypatch, after=6)
    assert not (folder / "v_labels.run" / "report.json").exists()
    run(folder, job_in(folder))
    report = told(folder)
    assert counts(report) == (BLOCKS, 6, BLOCKS - 6, 0, BLOCKS - 6)
    assert shares(report) == [6, BLOCKS - 6]
    assert report["workers"][0]["until"] is None and report["workers"][1]["until"] is not None


def test_blocks_that_failed_are_those_in_quarantine(folder: Path) -> None:
    class Torn(Reader):
        def read(self, box: Any) -> Any:
            if box.start == (2, 0, 10):
                raise VolumeError("the section is torn")
            return super().read(box)

    with pytest.raises(QuarantineError):
        run(folder, job_in(folder, reader=Torn()))
    assert counts(told(folder)) == (BLOCKS, 0, BLOCKS - 1, 1, BLOCKS - 1)
    run(folder, job_in(folder))
    assert counts(told(folder)) == (BLOCKS, BLOCKS - 1, 1, 0, 1)


class Meeting:
    """An executor of one of several processes; each waits until all have done a block."""

    def __init__(self, barrier: threading.Barrier, fails: bool = False) -> None:
        self._barrier = barrier
        self._fails = fails

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        for i, record in enumerate(SerialExecutor().run(task, blocks)):
            yield record
            if i == 0:
                self._barrier.wait(60)
                if self._fails:
                    raise VolumeError("its own disk is gone")


def together(folder: Path, executors: list[Meeting]) -> list[Any]:
    """What each of several workers gives, which run in threads."""
    results: list[Any] = [None] * len(executors)

    def work(i: int) -> None:
        try:
            results[i] = run(folder, job_in(folder), executors[i])
        except VolumeError as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(executors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_the_report_is_the_sum_over_those_who_work_at_the_same_time(folder: Path) -> None:
    barrier = threading.Barrier(3)
    first, second, failed = together(folder, [Meeting(barrier), Meeting(barrier), Meeting(barrier, fails=True)])
    assert isinstance(failed, VolumeError)
    report = told(folder)
    assert counts(report) == (BLOCKS, 0, BLOCKS, 0, BLOCKS), "also what one did that failed"
    assert sorted(shares(report)) == sorted([first.done, second.done, BLOCKS - first.done - second.done])
    assert report["seconds"] == pytest.approx(sum(worker["seconds"] for worker in report["workers"]), abs=1e-2)
    assert report["wall_s"] < report["seconds"]
    assert (labels(folder) == EXPECTED).all()


def test_who_ends_while_another_writes_the_report_is_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is slow to write what it read does not make others forgotten."""
    real, other = run_report.report_of, {}

    def slow(subject: Any, ended: Any) -> dict[str, Any]:
        content = real(subject, ended)
        if not other:
            other.update(dict(ended[0]) | {"worker": "other", "pid": 7})
            (subject.work / "reports" / "other.json").write_text(json.dumps(other))
        return content

    monkeypatch.setattr(run_report, "report_of", slow)
    run(folder, job_in(folder))
    assert 7 in [worker["pid"] for worker in told(folder)["workers"]]


def test_who_finds_all_done_changes_nothing(folder: Path) -> None:
    run(folder, job_in(folder))
    before = told(folder)
    own = run(folder, job_in(folder))
    assert (own.done, own.skipped) == (0, BLOCKS)
    assert told(folder) == before
    (folder / "v_labels.run" / "report.json").unlink()
    run(folder, job_in(folder))
    assert told(folder)["skipped"] == BLOCKS


def test_a_block_that_two_have_done_counts_once(folder: Path) -> None:
    with pytest.raises(VolumeError):
        run(folder, job_in(folder), Failing(after=5))
    (file,) = (folder / "v_labels.run").glob("*/ledger/*.jsonl")
    signature, *records = file.read_text().splitlines(keepends=True)
    other = json.loads(signature)
    other["signature"]["worker"] = "other"
    file.with_name("zzz.jsonl").write_text(json.dumps(other) + "\n" + "".join(records[:2]))
    run(folder, job_in(folder))
    report = told(folder)
    assert counts(report) == (BLOCKS, 5, BLOCKS - 5, 0, BLOCKS - 5)
    assert (report["repeated"], shares(report)) == (2, [5, BLOCKS - 5])


def test_blocks_that_are_done_again_for_another_format_count_anew(folder: Path) -> None:
    run(folder, job_in(folder))

    def also_zarr() -> VolumeJob:
        return job_in(folder, outputs=(FinalOutput(LABELS, "v_labels", "k", ("h5", "zarr")),))

    run(folder, also_zarr())
    report = told(folder)
    assert counts(report) == (BLOCKS, 0, BLOCKS, 0, BLOCKS)
    assert shares(report) == [BLOCKS], "the records of the first are void"
    stages = {path.name for path in (folder / "v_labels.run").glob("*/ledger*")}
    assert len(stages) > 1 and "ledger" in stages, "the ledgers of the pyramid stay"


def test_a_report_that_cannot_be_written_fails_no_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "v_labels.run" / "report.json").mkdir(parents=True)
    run(folder, job_in(folder))
    assert (labels(folder) == EXPECTED).all()
    assert "report.json could not be written" in caplog.text
    shutil.rmtree(folder / "v_labels.run" / "report.json")
