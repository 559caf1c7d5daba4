"""Blocks that kill their processes: deaths are counted, a suspect runs in a child, and what the child does is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import child_blocks
import pytest
from child_blocks import BLOCKS, GRID, Marks

from connectomics.core.errors import StorageError
from connectomics.core.geometry import Block
from connectomics.core.process import is_dead, new_mark
from connectomics.execution.block_claims import Apart
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import DiskStore
from connectomics.execution.executors.child_process import ChildProcess
from connectomics.execution.executors.overlapping import OverlappingExecutor
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.lease import FREE, HELD, Lease, Stretch, lease_of, packed
from connectomics.execution.ledger import Ledger
from connectomics.execution.retry import errno_of
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.task import BlockFailure, BlockRecord
from connectomics.execution.worker import Worker

BLOCK = GRID.block((3, 0, 0))
SHARDS = Shards("predict.blocks-", BLOCKS)


def dead_mark() -> str:
    """The mark of a process that had this one's number and is no more."""
    host, number, started, rest = new_mark().split("-")
    return f"{host}-{number}-{int(started) + 1}-{rest}"


def left_by_dead(folder: Path, **deaths: int) -> None:
    """Leases on blocks, by their first index, that a dead process held as so many had before it."""
    (folder / "coordination").mkdir(exist_ok=True)
    store, mark = DiskStore(folder / "coordination"), dead_mark()
    assert is_dead(mark)
    for name, count in deaths.items():
        number = int(name.removeprefix("block_"))
        blocks = Stretch(number + 1, begun=(number,), deaths={number: count})
        assert store.create(SHARDS.lease(number), packed(Lease(mark, epoch=count + 1, blocks=blocks)))


def deaths(folder: Path) -> dict[int, int]:
    """Deaths at blocks."""
    store, found = DiskStore(folder / "coordination"), dict[int, int]()
    for start in SHARDS.names(store).shards:
        seen = store.read(SHARDS.lease(start))
        lease = None if seen is None else lease_of(seen)
        assert lease is not None and lease.blocks is not None
        found |= lease.blocks.deaths
    return found


def run(folder: Path, apart: Apart | None, task: Marks | None = None) -> BlocksDone:
    task = task or Marks(folder)
    with Worker.of(folder / "coordination") as worker, closing(ledger_in(folder)) as ledger:
        return run_blocks(task, ledger, SerialExecutor(), worker, lambda done, planned: None, apart=apart)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def ledger_in(folder: Path, name: str = "ledger") -> Ledger:
    return Ledger(folder / name, "key", {}, BlockPlan((1, 1, 1), (1, 1, 1)), (BLOCKS, 1, 1))


class Apartment:
    """Stands for a child process: does blocks here, or says that they killed it; notes them."""

    def __init__(self, *, kills: bool = False) -> None:
        self.kills, self.blocks = kills, list[str]()

    def __call__(self, folder: Path, block: Block) -> BlockRecord | BlockFailure:
        assert folder.name == "ledger"
        self.blocks.append(block.key)
        if self.kills:
            return BlockFailure(block.key, block.core, "killed its process (signal 9; out of memory?)", "last words")
        return Marks(folder.parent).process(block)


def test_a_block_at_which_two_processes_ended_is_run_apart(tmp_path: Path) -> None:
    left_by_dead(tmp_path, block_3=1, block_4=0, block_7=5)
    apart = Apartment()
    done = run(tmp_path, apart)
    assert sorted(apart.blocks) == ["3-0-0", "7-0-0"]
    assert (done.done, done.failures) == (BLOCKS, ())
    assert deaths(tmp_path) == {
        3: 2,
        4: 1,
        7: 6,
    }


def test_a_block_that_kills_its_child_is_named_and_all_others_are_done(tmp_path: Path) -> None:
    left_by_dead(tmp_path, block_3=1)
    for _ in range(2):  # whoever tries again has it run apart at once
        apart = Apartment(kills=True)
        (failure,) = run(tmp_path, apart).failures
        assert (failure.block, failure.reason) == ("3-0-0", "killed its process (signal 9; out of memory?)")
        assert apart.blocks == ["3-0-0"]
    assert ledger_in(tmp_path).finished == BLOCKS - 1
    (told,) = (tmp_path / "ledger" / "quarantine").iterdir()
    assert told.read_text().endswith("out of memory?)\n\nlast words")
    assert run(tmp_path, Apartment()).done == 1
    assert not list((tmp_path / "ledger" / "quarantine").iterdir())


def test_deaths_in_staging_folders_of_earlier_epochs_count(tmp_path: Path) -> None:
    """Each builder has leases of its own, and may die at the same block."""
    store, staging = DiskStore(make(tmp_path / "coordination")), make(tmp_path / "staging.5.own")
    for name in ("staging.1.dead", "staging.3.dead"):
        (tmp_path / name).touch()
        shards = Shards.of(tmp_path / name / "ledger_marks", BLOCKS)
        state = FREE if name == "staging.1.dead" else HELD
        for number, how in ((3, HELD), (4, state)):
            lease = Lease(dead_mark(), state=how, blocks=Stretch(number + 1, begun=(number,) if how == HELD else ()))
            assert store.create(shards.lease(number), packed(lease))
    apart, asked = Apartment(), list[str]()

    def noted(folder: Path, block: Block) -> BlockRecord | BlockFailure:
        assert folder == staging / "ledger_marks"
        asked.append(block.key)
        return apart(tmp_path / "ledger", block)

    with Worker.of(tmp_path / "coordination") as worker, closing(ledger_in(staging, "ledger_marks")) as ledger:
        done = run_blocks(Marks(tmp_path), ledger, SerialExecutor(), worker, lambda done, planned: None, apart=noted)
    assert (asked, done.done, done.failures) == (["3-0-0"], BLOCKS, ())


def test_others_of_the_same_attempt_leave_a_named_block_alone(tmp_path: Path) -> None:
    left_by_dead(tmp_path, block_3=1)
    with Worker.of(tmp_path / "coordination"):  # somebody is here all the time
        assert len(run(tmp_path, Apartment(kills=True)).failures) == 1
        second = Apartment()
        (failure,) = run(tmp_path, second).failures
        assert second.blocks == [] and failure.reason.startswith("killed its process")


def test_where_there_is_no_apart_a_suspect_is_run_as_others(tmp_path: Path) -> None:
    left_by_dead(tmp_path, block_3=8)
    assert run(tmp_path, None).done == BLOCKS


class Stopped(BaseException):
    """An orderly stop, as of a job that is preempted."""


class Stopping(Marks):
    """Stops at a block."""

    def process(self, block: Block) -> BlockRecord:
        if block.key == self.killer:
            raise Stopped
        return super().process(block)


def test_an_orderly_stop_is_no_death(tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(Stopped):
            run(tmp_path, Apartment(), Stopping(tmp_path, killer="5-0-0"))
    assert deaths(tmp_path) == {}
    apart = Apartment()
    assert run(tmp_path, apart).failures == () and apart.blocks == []


def test_two_that_hold_a_suspect_each_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each runs its own before it waits for the other's."""
    left_by_dead(tmp_path, block_0=1, block_19=1)
    both, ends = threading.Barrier(2, timeout=60), list[BlocksDone]()

    class Together(Apartment):
        def __call__(self, folder: Path, block: Block) -> BlockRecord | BlockFailure:
            both.wait()  # comes here only when the other has a suspect in hand too
            return super().__call__(folder, block)

    threads = [threading.Thread(target=lambda: ends.append(run(tmp_path, Together())), daemon=True) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(end.done for end in ends) == BLOCKS and len(ends) == 2


def test_what_is_in_hand_comes_out_before_a_suspect_is_run(tmp_path: Path) -> None:
    left_by_dead(tmp_path, block_19=1)
    task = Marks(tmp_path)

    def apart(folder: Path, block: Block) -> BlockRecord | BlockFailure:
        assert ledger.finished == BLOCKS - 1
        return task.process(block)

    with Worker.of(tmp_path / "coordination") as worker, closing(ledger_in(tmp_path)) as ledger:
        done = run_blocks(task, ledger, OverlappingExecutor(), worker, lambda finished, planned: None, apart=apart)
    assert done.done == BLOCKS


Do = Callable[[Path, Block], BlockRecord | BlockFailure]
OUTCOMES: dict[Do, str] = {
    child_blocks.kills: "killed its process (signal 9; out of memory?)",
    child_blocks.crashes: "killed its process (signal 11, SIGSEGV)",
    child_blocks.exits: "killed its process (exit code 7)",
    child_blocks.fails: "the section is torn",
    child_blocks.cannot_begin: "could not be done in a process of its own: ValueError: no such stage",
    child_blocks.lacks_device_memory: "could not be done in a process of its own: DeviceMemoryError: ran out",
}
DONE = (child_blocks.done, child_blocks.hears_signals)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Do, BlockRecord | BlockFailure]:
    """What became of a block in a child, for each function."""
    names: list[Do] = [*OUTCOMES, *DONE]
    folders = [tmp_path_factory.mktemp(do.__name__) for do in names]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda do, folder: ChildProcess(do)(folder, BLOCK), names, folders)
        return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("do", OUTCOMES, ids=lambda do: do.__name__)
def test_what_became_of_a_child_is_the_block_s_failure(outcomes: dict[Do, BlockRecord | BlockFailure], do: Do) -> None:
    failure = outcomes[do]
    assert isinstance(failure, BlockFailure)
    assert (failure.block, failure.box, failure.reason) == ("3-0-0", BLOCK.core, OUTCOMES[do])
    if do is child_blocks.crashes:
        assert "Fatal Python error: Segmentation fault" in failure.trace and "child_blocks.py" in failure.trace


@pytest.mark.parametrize("do", DONE, ids=lambda do: do.__name__)
def test_what_a_child_has_done_is_a_record(outcomes: dict[Do, BlockRecord | BlockFailure], do: Do) -> None:
    assert outcomes[do] == BlockRecord("3-0-0", {}, 0, 0.0)


def test_what_a_child_says_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="connectomics"):
        ChildProcess(child_blocks.done)(tmp_path, BLOCK)
    assert "block 3-0-0, in a process of its own: INFO connectomics: logged" in caplog.messages
    assert 1000 < len(caplog.messages) < 10_000, "the last that it said"
    assert int((tmp_path / "3-0-0").read_text()) != os.getpid()


def test_a_disk_that_refuses_stops_the_parent_too(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="full") as told:
        ChildProcess(child_blocks.meets_full_disk)(tmp_path, BLOCK)
    assert errno_of(told.value) == 28


def test_what_cannot_be_sent_is_the_block_s_failure(tmp_path: Path) -> None:
    failure = ChildProcess(lambda folder, block: BlockRecord(block.key, {}, 0, 0.0))(tmp_path, BLOCK)
    assert isinstance(failure, BlockFailure) and failure.reason.startswith("could not be done in a process of its own")


def test_a_machine_that_starts_no_process_costs_the_block_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    failure = ChildProcess(child_blocks.done)(tmp_path, BLOCK)
    assert isinstance(failure, BlockFailure) and "FileNotFoundError" in failure.reason


def pid_of_child(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "pid").exists() and (text := (folder / "pid").read_text()):
            return int(text)
        time.sleep(0.02)
    raise TimeoutError


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a child which takes long."""
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; import child_blocks as c; from pathlib import Path; "
        f"c.ChildProcess(c.takes_long)(Path({str(tmp_path)!r}), c.GRID.block((0, 0, 0)))"
    )
    with subprocess.Popen([sys.executable, "-c", code, *sys.path], stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_child_ends_when_its_parent_ends(
    tmp_path: Path, parent: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    child = pid_of_child(tmp_path)
    assert Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000"
    parent.send_signal(number)
    assert parent.wait(60) in (-number, 1)
    assert ends(child)


def test_of_four_workers_two_die_at_a_killer_and_the_others_do_all_else(tmp_path: Path) -> None:
    script = [sys.executable, child_blocks.__file__, str(tmp_path), "4"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(script, env=paths, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(ended.stdout) == [-9, -9, 1, 1], "each of the two that live on knows one block that failed"
    assert ledger_in(tmp_path).finished == BLOCKS - 1
    (told,) = (tmp_path / "ledger" / "quarantine").iterdir()
    assert told.name == "5-0-0.txt" and "killed its process (signal 9; out of memory?)" in told.read_text()
