"""status: who holds what since when, who is silent or gone, blocks in trouble; and that it changes nothing."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectomics.cli import main
from connectomics.commands.run_status import RunStatus, WorkerStatus
from connectomics.commands.status import status_of
from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Block
from connectomics.core.process import host_mark
from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import DiskStore
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.lease import HELD, LOOKS, Lease, Session, Stretch, Witness, lease_of, packed
from connectomics.execution.stage import LABELS
from connectomics.execution.task import BlockFailure, BlockRecord, Task
from connectomics.execution.worker import Worker
from connectomics.jobs.outcome import attempted
from connectomics.stages.output.finish import FinalOutput

from small_jobs import quick_folder
from small_runs import BLOCKS, Failing, Reader, job_in, run

FOREIGN = "00000000-4711-1-00000000"  # of a process on another machine
SHARDS = Shards("predict.blocks-", BLOCKS)
ENDED = f"{host_mark()}-{1 << 30}-1-00000000"  # of one of this machine that is no more


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        yield made


@pytest.fixture
def coordination(folder: Path) -> Path:
    """Of a run that was interrupted after five blocks."""
    with pytest.raises(VolumeError):
        run(folder, job_in(folder), Failing(after=5))
    (found,) = run_folder(folder).glob("*/coordination")
    return found


def takes(worker: Worker, number: int) -> bool:
    """Take a block and begin it."""
    lease = SHARDS.lease(number)
    return worker.acquire(lease, Stretch(number + 1)) and worker.begin(lease, number, [])


def run_folder(folder: Path) -> Path:
    return folder / "v_labels.run"


def looked(folder: Path) -> RunStatus:
    """The status, of which the command line prints the same."""
    found = status_of(run_folder(folder))
    assert json.loads(json.dumps(found.as_dict()))["stages"], "it is JSON"
    return found


def screen(folder: Path) -> str:
    return "\n".join(looked(folder).lines())


def shift(folder: Path, record: str, seconds: float) -> None:
    """Let a record have been written so long ago."""
    for path in folder.glob(f"{record}.*"):
        at = path.lstat().st_mtime - seconds
        os.utime(path, (at, at), follow_symlinks=False)


def in_hand(worker: WorkerStatus) -> list[tuple[str, str]]:
    return [(each.stage, each.block) for each in worker.in_hand]


def test_it_says_who_holds_what_since_when(folder: Path, coordination: Path) -> None:
    with Worker.of(coordination) as one, Worker.of(coordination) as other:
        assert all(takes(one, number) for number in (15, 12)) and other.acquire("single_writer")
        assert takes(one, 0), "this one is done: what is left of its lease is nobody's work"
        shift(coordination, SHARDS.lease(15), 90)
        shift(coordination, "single_writer", 7200)
        for _ in range(3):
            other.confirm("single_writer")  # which changes the record
        workers = sorted(looked(folder).workers, key=in_hand)
        assert [in_hand(worker) for worker in workers] == [
            [("predict", "3-0-0"), ("predict", "3-1-1")],
            [("single writer", "")],
        ]
        assert {(w.pid, w.state, w.limit_s) for w in workers} == {(os.getpid(), "here", 180.0)}
        assert time.time() - workers[0].in_hand[1].since == pytest.approx(90, abs=5)
        text = screen(folder)
        assert f"predict      5/{BLOCKS} blocks (31.2%), 2 in hand" in text
        assert re.search(r"since 20.*; has in hand: predict 3-0-0 for \d+ s, predict 3-1-1 for 2 min\n", text + "\n")
        assert "; has in hand: single writer for 2.0 h" in text
        one.release(SHARDS.lease(12))
        assert [("predict", "3-1-1")] in map(in_hand, looked(folder).workers)
    assert not looked(folder).workers and not looked(folder).gone, "who left is not told"


def test_it_tells_of_those_who_are_silent_ended_and_revoked(folder: Path, coordination: Path) -> None:
    store, now = DiskStore(coordination), [0.0]
    for mark in (FOREIGN, ENDED):
        Session(store, 20.0, mark)
    assert [(worker.state, worker.pid) for worker in looked(folder).workers] == [("here", os.getpid())]
    shift(coordination, f"session-{FOREIGN}", 15)
    (silent,), (ended,) = looked(folder).workers, looked(folder).gone
    assert (silent.state, ended.state) == ("silent", "ended")
    assert silent.unchanged_s == pytest.approx(15, abs=5)
    assert re.search(r"; no sign of life for 1\d s, others take over after 20 s", screen(folder))
    assert "gone         " in screen(folder) and "ended without a word, its last sign of life" in screen(folder)
    witness = Witness(store, 20.0, lambda: now[0])
    for _ in range(3 * LOOKS):
        witness.is_gone(FOREIGN)
        now[0] += 9.0
    assert not looked(folder).workers
    assert sorted(worker.state for worker in looked(folder).gone) == ["ended", "revoked"]
    assert re.search(r"; counts as gone since \d s", screen(folder))


def test_it_tells_of_blocks_that_processes_ended_with(folder: Path, coordination: Path) -> None:
    store, block = DiskStore(coordination), SHARDS.lease(15)
    Session(store, 180.0, ENDED)
    store.create(block, packed(Lease(ENDED, blocks=Stretch(16, begun=(15,)))))
    (gone,) = looked(folder).gone
    assert in_hand(gone) == [("predict", "3-1-1")] and not looked(folder).stages[0].troubled
    assert "had in hand: predict 3-1-1 for" in screen(folder)
    with Worker.of(coordination) as worker:
        assert takes(worker, 15)
        assert "3-1-1 was in hand when a process ended" in screen(folder)
        assert not looked(folder).gone[0].in_hand
    seen = store.read(block)
    lease = None if seen is None else lease_of(seen)
    assert seen is not None and lease is not None and lease.blocks is not None
    dead = replace(lease, holder=ENDED, epoch=9, state=HELD, blocks=replace(lease.blocks, begun=(15,)))
    assert store.replace(block, seen, packed(dead))
    with Worker.of(coordination) as worker:
        assert takes(worker, 15)
        assert [(each.block, each.deaths) for each in looked(folder).stages[0].troubled] == [("3-1-1", 2)]
        assert "3-1-1 was in hand when 2 processes ended" in screen(folder)
    run(folder, job_in(folder))
    assert not looked(folder).stages[0].troubled


class Torn(Reader):
    def read(self, box: Any) -> Any:
        if box.start == (2, 0, 10):
            raise VolumeError("the section is torn")
        return super().read(box)


def fail(folder: Path) -> None:
    """A run with one bad block, as the command line begins it."""

    def torn() -> Any:
        return (), run(folder, job_in(folder, reader=Torn()))

    assert attempted("v", run_folder(folder), torn).state == "failed"


def test_failed_blocks_are_those_of_this_attempt_and_quarantined_ones_those_that_are_not_done(folder: Path) -> None:
    fail(folder)
    (stage,) = looked(folder).stages
    assert stage.quarantined == ("2-0-1",)
    assert [(each.block, each.failed) for each in stage.troubled] == [("2-0-1", "the section is torn")]
    assert "failed in this attempt: 2-0-1, the section is torn" in screen(folder)
    (coordination,) = run_folder(folder).glob("*/coordination")
    with Worker.of(coordination):  # who comes and finds nobody begins another attempt
        (stage,) = looked(folder).stages
        assert (stage.quarantined, stage.troubled) == (("2-0-1",), ())
    (traceback,) = run_folder(folder).glob("*/ledger/quarantine/*.txt")
    content = traceback.read_text()
    run(folder, job_in(folder))
    traceback.write_text(content)  # as if killed between the record and this file's end
    assert looked(folder).stages[0].quarantined == ()


def test_a_finished_run_shows_no_error_of_before_and_every_one_that_came_after(folder: Path) -> None:
    fail(folder)
    assert "stopped: 1 of 16 blocks failed" in (looked(folder).last_error or "")

    def rerun(**changes: Any) -> Any:
        return (), run(folder, job_in(folder, **changes))

    assert attempted("v", run_folder(folder), rerun).state == "done"
    log = (run_folder(folder) / "run.log").read_text()
    assert " ERROR " in log and " stopped: " in log, "it is told there"
    assert looked(folder).last_error is None
    (folder / "v_labels.h5").rename(folder / "away.h5")
    assert looked(folder).last_error is not None, "what it made is gone"
    (folder / "away.h5").rename(folder / "v_labels.h5")

    class Absent(Reader):
        def read(self, box: Any) -> Any:
            raise VolumeError("another file cannot be read")

    assert attempted("v", run_folder(folder), lambda: rerun(key="other", reader=Absent())).state == "failed"
    assert looked(folder).finished == ("v_labels.h5",)
    assert "another file cannot be read" in (looked(folder).last_error or "")


def test_the_log_says_which_host_and_which_worker(folder: Path) -> None:
    fail(folder)
    line = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\S+) (\S+) (INFO|WARNING|ERROR) connectomics\S*: ")
    lines = [found for text in (run_folder(folder) / "run.log").read_text().splitlines() if (found := line.match(text))]
    (session,) = {path.name for path in run_folder(folder).glob("*/coordination/session-*.0")}
    assert {(found[1], found[2]) for found in lines} == {(os.uname().nodename, f"{host_mark()}-{os.getpid()}")}
    assert session.startswith(f"session-{lines[0][2]}-"), "the part that all names of a process begin with"
    assert len(lines) > BLOCKS


class Looking:
    """An executor that looks at the run before each block is recorded."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.seen: list[RunStatus] = []

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        for record in SerialExecutor().run(task, blocks):
            self.seen.append(status_of(self._run))
            yield record


def test_stages_in_staging_folders_are_seen_and_nothing_is_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looking = Looking(run_folder(folder))
    run(folder, job_in(folder, outputs=(FinalOutput(LABELS, "v_labels", "k", ("zarr",)),)), looking)
    last = looking.seen[-1]
    assert [stage.stage for stage in last.stages][:2] == ["predict", "labels.zarr.0"]
    (worker,) = last.workers
    held = dict(in_hand(worker))
    assert set(held) == {last.stages[-1].stage, "single writer"}
    assert held[last.stages[-1].stage] == "0-0-0"
    finished = looked(folder)
    assert [stage.stage for stage in finished.stages] == [stage.stage for stage in last.stages]
    assert all(stage.done == stage.planned for stage in finished.stages)

    def everything() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in (folder, *folder.rglob("*"))
        }

    with pytest.raises(VolumeError):
        run(folder, job_in(folder, key="other"), Failing(after=3))
    before = everything()
    assert main(["status", str(run_folder(folder))]) == 0
    assert everything() == before
    assert "blocks" in capsys.readouterr().out


def test_a_run_that_ends_while_it_is_looked_at_is_told_all_the_same(folder: Path, coordination: Path) -> None:
    (coordination / "session-broken.0").touch()
    assert [worker.host for worker in looked(folder).workers] == [""] and "unknown host" in screen(folder)
    for path in coordination.iterdir():
        path.unlink()
    coordination.rmdir()
    assert not looked(folder).workers
