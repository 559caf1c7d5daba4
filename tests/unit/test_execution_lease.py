"""Leases: one holder at a time, the dead are known at once or by standing still, nobody loses a fresh lease."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectomics.core import process
from connectomics.core.process import is_alive, is_dead, is_mark, new_mark
from connectomics.execution.coordination import DiskStore
from connectomics.execution.lease import (
    LOOKS,
    Lease,
    LeaseLostError,
    Session,
    Stretch,
    Watch,
    lease_of,
    packed,
    pauses,
)
from connectomics.execution.worker import Time, Worker, is_deserted

FOREIGN = "0123abcd-77-5-aaaaaaaa"  # a process of another machine
LIMIT_S = 2.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Worker, Worker]]:
    with Worker.of(tmp_path) as one, Worker.of(tmp_path) as two:
        yield one, two


def ended_mark() -> str:
    """The mark of a process of this machine that lives no more."""
    code = "from connectomics.core.process import new_mark; print(new_mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def leave(folder: Path, mark: str, name: str) -> None:
    """What a process leaves that was killed with a lease in hand."""
    store = DiskStore(folder)
    Session(store, LIMIT_S, mark)
    store.create(name, packed(Lease(mark, blocks=Stretch(8, 4, (3,)))))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> Time:
        return Time(lambda: self.now, self.sleep)


def test_marks_tell_the_living_from_the_dead() -> None:
    mark, ended = new_mark(), ended_mark()
    assert is_mark(mark) and is_mark(ended) and mark != new_mark()
    assert is_alive(mark) and not is_dead(mark)
    assert is_dead(ended) and not is_alive(ended)
    host, pid, started, rest = mark.split("-")
    assert is_dead(f"{host}-{pid}-{int(started) + 1}-{rest}"), "another process that had the same number"
    for other in (FOREIGN, "not a mark"):
        assert not is_dead(other) and not is_alive(other)
    assert not is_mark("partial") and not is_mark("1-2-3-4")


def test_a_lease_has_one_holder(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    assert one.acquire("a") and not two.acquire("a") and not one.acquire("a")
    assert one.holds("a") and not two.holds("a")
    assert two.acquire("b")
    one.release("a")
    assert two.acquire("a")
    assert two.held("a").epoch == 1
    with pytest.raises(LeaseLostError):
        one.confirm("a")


def test_epochs_grow_and_confirming_does_not_change_them(pair: tuple[Worker, Worker]) -> None:
    epochs = []
    for worker in (*pair, *pair):
        assert worker.acquire("a")
        worker.confirm("a")
        epochs.append(worker.held("a").epoch)
        worker.release("a")
    assert epochs == [0, 1, 2, 3]


def test_of_many_threads_one_is_alone(tmp_path: Path) -> None:
    inside, most, lock = 0, [0], threading.Lock()

    def work() -> None:
        nonlocal inside
        with Worker.of(tmp_path) as worker:
            for _ in range(3):
                with worker.alone("writer"):
                    with lock:
                        inside += 1
                        most[0] = max(most[0], inside)
                    time.sleep(0.002)
                    with lock:
                        inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    leave(tmp_path, ended_mark(), "a")
    with Worker.of(tmp_path) as worker:
        assert worker.acquire("a")
        assert worker.held("a").blocks == Stretch(8, deaths={3: 1})
        assert worker.begin("a", 5, [4]) and worker.held("a").blocks == Stretch(8, 6, (4, 5), {3: 1})
        worker.release("a")
        assert worker.acquire("a") and worker.held("a").blocks == Stretch(8, deaths={3: 1}), "giving back is no death"


def test_the_upper_part_of_another_s_blocks_can_be_taken(tmp_path: Path) -> None:
    """The holder goes on below it, and begins nothing above."""
    with Worker.of(tmp_path) as one, Worker.of(tmp_path) as two:
        assert one.acquire("a", Stretch(8)) and one.begin("a", 0, [])
        assert two.cut("a", 0) is None, "it is begun"
        before = two.cut("a", 4)
        assert before is not None and before.stop == 8
        assert two.cut("a", 4) is None, "it is gone"
        assert one.begin("a", 1, [0]) and one.begin("a", 3, []) and not one.begin("a", 4, []) and one.holds("a")
        one.confirm("a")
        assert one.held("a").blocks == Stretch(4, 4, (3,))
        assert one.done("a") and not two.acquire("a") and two.acquire("a", again=True)
        assert two.held("a").blocks == Stretch(4), "what is in hand ends with it"


def test_a_process_of_another_machine_is_taken_over_after_the_limit(tmp_path: Path) -> None:
    leave(tmp_path, FOREIGN, "a")
    clock = Clock()
    worker = Worker(DiskStore(tmp_path), limit_s=LIMIT_S, clock=clock.time())
    worker.join()
    looked = 0
    while not worker.acquire("a"):
        looked += 1
        clock.sleep(LIMIT_S / 8)
    assert clock.now > LIMIT_S and looked >= LOOKS
    assert FOREIGN not in worker.others()


def test_who_shows_a_sign_of_life_keeps_its_lease(tmp_path: Path) -> None:
    store, clock = DiskStore(tmp_path), Clock()
    session = Session(store, LIMIT_S, FOREIGN)
    store.create("a", packed(Lease(FOREIGN)))
    worker = Worker(DiskStore(tmp_path), limit_s=LIMIT_S, clock=clock.time())
    worker.join()
    for _ in range(60):
        assert session.renew()
        assert not worker.acquire("a")
        clock.sleep(LIMIT_S / 3)


def test_an_observer_that_slept_starts_again() -> None:
    clock = Clock()
    watch = Watch(lambda: clock.now)
    for _ in range(3):
        assert not watch.is_stale("a", 0, LIMIT_S)
        clock.sleep(0.1)
    clock.sleep(100)
    for _ in range(LOOKS - 1):
        assert not watch.is_stale("a", 0, LIMIT_S), "what it saw before it slept does not count"
        clock.sleep(LIMIT_S / 3)
    clock.sleep(0.1)
    assert watch.is_stale("a", 0, LIMIT_S)
    assert not watch.is_stale("a", 1, LIMIT_S), "it has changed"


def test_who_was_revoked_finds_out_and_joins_again(tmp_path: Path) -> None:
    clock = Clock()
    sleeper = Worker(DiskStore(tmp_path), limit_s=LIMIT_S, clock=Clock().time())
    other = Worker(DiskStore(tmp_path), limit_s=LIMIT_S, clock=clock.time())
    sleeper.join()
    other.join()
    mark = sleeper.mark
    assert sleeper.acquire("a")
    while not other.acquire("a"):
        clock.sleep(LIMIT_S / 8)
    assert not sleeper.renew()
    with pytest.raises(LeaseLostError):
        sleeper.confirm("a")
    assert not sleeper.acquire("a") and sleeper.mark != mark
    assert sleeper.acquire("b")


def test_an_error_of_who_lost_its_lease_is_that_it_lost_it(pair: tuple[Worker, Worker]) -> None:
    one, _ = pair
    with pytest.raises(ValueError, match="mine"), one.alone("a"):
        raise ValueError("mine")
    with pytest.raises(LeaseLostError), one.alone("a"):
        store = one.store
        seen = store.read("a")
        assert seen is not None
        store.replace("a", seen, packed(Lease(FOREIGN, 7)))
        raise ValueError("the consequence")


def test_who_lost_its_lease_is_told_though_nothing_went_wrong(pair: tuple[Worker, Worker]) -> None:
    """What it read while it slept may not be true any more, and what it wrote may be in another's way."""
    one, two = pair
    with pytest.raises(LeaseLostError), one.alone("a"):
        seen = two.store.read("a")
        assert seen is not None
        two.store.replace("a", seen, packed(Lease(two.mark, epoch=1)))
    assert not one.holds("a")


def test_an_empty_record_is_of_somebody_unknown_who_expires(tmp_path: Path) -> None:
    (tmp_path / "a.0").touch()
    clock = Clock()
    worker = Worker(DiskStore(tmp_path), limit_s=LIMIT_S, clock=clock.time())
    worker.join()
    while not worker.acquire("a"):
        clock.sleep(LIMIT_S / 8)
    assert clock.now > LIMIT_S


def test_failures_count_for_all_and_a_new_attempt_forgets_them(tmp_path: Path) -> None:
    with Worker.of(tmp_path) as one, Worker.of(tmp_path) as two:
        assert one.attempt == two.attempt
        assert one.acquire("a")
        one.fail("a", "torn section")
        assert not two.acquire("a") and two.failure("a") == "torn section" and two.failure("b") is None
        assert [w.count("failing", 5) for w in (one, two, one)] == [1, 2, 3]
        assert two.count("failing", 6) == 1, "a block was finished in between"
    with Worker.of(tmp_path) as later:
        assert later.failure("a") is None and later.acquire("a")
        assert later.count("failing", 6) == 1


def test_nobody_is_here_when_all_have_left(tmp_path: Path) -> None:
    with Worker.of(tmp_path) as worker:
        assert worker.acquire("a")
        assert not worker.others() and not is_deserted(tmp_path)
    assert is_deserted(tmp_path) and is_deserted(tmp_path / "absent")
    seen = DiskStore(tmp_path).read("a")
    assert seen is not None
    lease = lease_of(seen)
    assert lease is not None and lease.state == "free", "an orderly end gives back"


def test_looks_are_close_enough_for_short_limits() -> None:
    for limit_s in (2.0, 180.0):
        slow = [pause for pause, _ in zip(pauses(limit_s), range(60), strict=False)]
        assert slow == sorted(slow) and slow[-1] <= limit_s / (2 * LOOKS)


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "PROC", tmp_path / "absent")
    process.host_mark.cache_clear()
    process._start_of_this.cache_clear()
    try:
        mark = new_mark()
        assert not is_dead(mark) and is_alive(mark)
    finally:
        process.host_mark.cache_clear()
        process._start_of_this.cache_clear()
