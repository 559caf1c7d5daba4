"""Leases: one holder at a time, the dead are known at once or by their age, nobody loses a fresh lease."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectomics.core import process
from connectomics.core.process import is_dead, is_mark, new_mark
from connectomics.execution import lease as leases
from connectomics.execution.lease import Worker, living, tidy

FOREIGN = "0123abcd-77-5-aaaaaaaa"  # a process of another machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "workers"


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Worker, Worker]]:
    with Worker(folder) as one, Worker(folder) as two:
        yield one, two


def ended_mark() -> str:
    """The mark of a process of this machine that lives no more."""
    code = "from connectomics.core.process import new_mark; print(new_mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def leave(folder: Path, mark: str, *names: str, age_s: float = 0.0) -> None:
    """What a worker that was killed leaves."""
    folder.mkdir(exist_ok=True)
    heartbeat = folder / f"{mark}.worker"
    heartbeat.write_text("{}")
    os.utime(heartbeat, (time.time() - age_s,) * 2)
    for name in names:
        (folder / f"{name}.lease").symlink_to(heartbeat.name)


def test_marks_tell_the_living_from_the_dead() -> None:
    mark, ended = new_mark(), ended_mark()
    assert is_mark(mark) and is_mark(ended) and mark != new_mark()
    assert not is_dead(mark)
    assert is_dead(ended)
    host, pid, started, rest = mark.split("-")
    assert is_dead(f"{host}-{pid}-{int(started) + 1}-{rest}"), "another process that had the same number"
    assert not is_dead(FOREIGN) and not is_dead("not a mark")
    assert not is_mark("partial") and not is_mark("1-2-3-4")


def test_a_process_that_is_dead_and_not_buried_is_dead() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "from connectomics.core.process import new_mark; print(new_mark())"],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        mark = child.stdout.read().strip()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_dead(mark)


def test_without_proc_marks_work_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = ended_mark()
    monkeypatch.setattr(process, "PROC", tmp_path)
    process.host_mark.cache_clear()
    mark = new_mark()
    assert not is_dead(mark) and not is_dead(ended)
    assert is_dead("-".join([mark.split("-")[0], ended.split("-")[1], "5", "aa"]))
    process.host_mark.cache_clear()


def test_a_lease_has_one_holder(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    assert one.acquire("a") and one.holds("a")
    assert not two.acquire("a") and not one.acquire("a")
    assert two.acquire("b")
    two.release("a")
    assert not two.acquire("a")
    one.release("a")
    assert two.acquire("a") and not one.holds("a")


def test_of_many_that_try_at_once_one_wins(folder: Path) -> None:
    workers = [Worker(folder).__enter__() for _ in range(8)]
    leave(folder, ended_mark(), *(f"stale{i}" for i in range(20)))
    won: list[str] = []

    def take(worker: Worker) -> None:
        for i in range(20):
            won.extend(name for name in (f"stale{i}", f"fresh{i}") if worker.acquire(name))

    threads = [threading.Thread(target=take, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(f"{kind}{i}" for kind in ("stale", "fresh") for i in range(20))
    for worker in workers:
        worker.__exit__(None, None, None)
    assert tidy(folder) and not list(folder.iterdir())


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(folder: Path) -> None:
    mark = ended_mark()
    leave(folder, mark, "a")
    with Worker(folder) as worker:
        assert worker.acquire("a")
        assert not (folder / f"{mark}.worker").exists()
        assert not list(folder.glob(".*")), "nothing is left of the breaking"


@pytest.mark.parametrize(("age_s", "taken"), [(0.0, False), (50.0, False), (70.0, True)])
def test_the_lease_of_another_machine_is_taken_when_its_heartbeat_is_old(
    folder: Path, age_s: float, taken: bool
) -> None:
    leave(folder, FOREIGN, "a", age_s=age_s)
    with Worker(folder, stale_s=60.0) as worker:
        assert worker.acquire("a") is taken
        assert worker.others() == ([] if taken else [f"{FOREIGN}.worker"])


def test_a_clock_that_is_wrong_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(folder, FOREIGN, "a")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with Worker(folder) as worker:
        assert not worker.acquire("a")
        assert len(worker.others()) == 1


def test_heartbeats_go_on(folder: Path) -> None:
    with Worker(folder, beat_s=0.02):
        (heartbeat,) = folder.glob("*.worker")
        os.utime(heartbeat, (1, 1))
        deadline = time.monotonic() + 20
        while heartbeat.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.stat().st_mtime > 2
    assert not list(folder.iterdir())


def test_the_lease_of_a_worker_that_has_ended_is_free(folder: Path) -> None:
    leave(folder, FOREIGN, "a")
    (folder / f"{FOREIGN}.worker").unlink()
    with Worker(folder) as worker:
        assert worker.acquire("a")


def test_a_lease_that_was_taken_over_in_between_stays(pair: tuple[Worker, Worker], folder: Path) -> None:
    """Between the look and the breaking another worker was first."""
    one, two = pair
    assert two.acquire("a")
    one._break(folder / "a.lease", f"{FOREIGN}.worker")
    assert not one.acquire("a")
    one._break(folder / "absent.lease", f"{FOREIGN}.worker")
    assert not list(folder.glob("*.breaking"))


def test_one_at_a_time_breaks_a_lease(pair: tuple[Worker, Worker], folder: Path) -> None:
    one, _ = pair
    leave(folder, FOREIGN, "a", age_s=1000)
    breaking = folder / "a.lease.breaking"
    breaking.symlink_to(pair[1]._heartbeat.name)
    assert not one.acquire("a")
    breaking.unlink()
    breaking.symlink_to(f"{ended_mark()}.worker")
    assert not one.acquire("a") or not breaking.is_symlink()
    assert one.acquire("a") or one.holds("a")
    assert not breaking.is_symlink()


def test_a_file_system_without_symbolic_links_will_do(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    test_a_lease_has_one_holder(pair)


def test_another_refusal_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    with Worker(folder) as worker, pytest.raises(OSError, match="No space left"):
        worker.acquire("a")


def test_alone_waits_for_the_other(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    order = []

    def second() -> None:
        with two.alone("house"):
            order.append("second")

    with one.alone("house"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"]


def test_waiting_ends_when_the_leases_of_others_are_gone(pair: tuple[Worker, Worker], folder: Path) -> None:
    one, two = pair
    leave(folder, ended_mark(), "predict.0-0-1")
    assert one.acquire("predict.0-0-0") and two.acquire("filter.0-0-0")
    one.wait_until_free("predict.")
    threading.Timer(0.2, one.release, ["predict.0-0-0"]).start()
    began = time.monotonic()
    two.wait_until_free("predict.")
    assert 0.1 < time.monotonic() - began < 20


def test_a_lease_that_another_took_over_is_left_to_it(folder: Path) -> None:
    with Worker(folder) as one:
        assert one.acquire("a")
        leave(folder, FOREIGN)
        (folder / "a.lease").unlink()
        (folder / "a.lease").symlink_to(f"{FOREIGN}.worker")
        one.release("a")
    assert (folder / "a.lease").is_symlink()


def test_tidying_leaves_the_living_alone(folder: Path) -> None:
    leave(folder, ended_mark(), "a")
    with Worker(folder) as one:
        assert one.acquire("b")
        assert not tidy(folder)
        assert (folder / "b.lease").is_symlink()
        assert living(folder) == [one._heartbeat.name]
    leave(folder, ended_mark(), "c")
    assert tidy(folder) and not list(folder.iterdir())
    assert tidy(folder.parent / "absent")


def test_ages_are_told_where_nothing_may_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(folder, FOREIGN)

    def refused(self: Path, *arguments: object, **more: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", refused)
    assert leases.living(folder) == [f"{FOREIGN}.worker"]
