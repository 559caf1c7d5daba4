"""Attempts: processes that work at the same time share one, however they began; who comes after all begins another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from connectomics.core.process import host_mark
from connectomics.execution.coordination import DiskStore, Version
from connectomics.execution.lease import Session
from connectomics.execution.worker import Worker

MOST_VERBS = 40  # more than a process needs to join
ENDED = f"{host_mark()}-{1 << 30}-1-0000000"  # and a digit: of a process of this machine that is no more


class Interrupted(DiskStore):
    """A store that calls something once, between two verbs of whoever uses it."""

    def __init__(self, folder: Path, after: int, what: Callable[[], None]) -> None:
        super().__init__(folder)
        self._left = after
        self._what = what

    @property
    def happened(self) -> bool:
        return self._left < 0

    def _one_more(self) -> None:
        self._left -= 1
        if self._left == -1:
            self._what()

    def create(self, name: str, content: bytes) -> Version | None:
        self._one_more()
        return super().create(name, content)

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        self._one_more()
        return super().replace(name, seen, content)

    def read(self, name: str) -> Version | None:
        self._one_more()
        return super().read(name)

    def list(self, prefix: str) -> list[str]:
        self._one_more()
        return super().list(prefix)


@pytest.mark.parametrize("earlier", [0, 1, 3])
def test_who_begin_at_the_same_time_share_an_attempt_that_those_before_had_not(tmp_path: Path, earlier: int) -> None:
    """The second joins between any two verbs of the first; several processes of before were killed."""
    for after in range(MOST_VERBS):
        folder = tmp_path / f"{earlier}-{after}"
        folder.mkdir()
        before = [Worker(DiskStore(folder)) for _ in range(earlier)]
        for number, worker in enumerate(before):
            worker.join()
            kill(folder, worker, number)
        second = Worker(DiskStore(folder))
        store = Interrupted(folder, after, second.join)
        first = Worker(store)
        first.join()
        if not store.happened:
            assert after > 3
            return
        assert first.attempt == second.attempt and first.signature["attempt"] == second.signature["attempt"], after
        assert first.signature["attempt"] not in [worker.signature["attempt"] for worker in before]
        third = Worker(DiskStore(folder))
        third.join()
        assert third.signature["attempt"] == first.signature["attempt"]
    pytest.fail("a process needs more verbs than that to join")


def kill(folder: Path, worker: Worker, number: int) -> None:
    """As if the process of a worker were no more: its records are those of one that has ended."""
    mark = f"{ENDED}{number}"
    for path in list(folder.iterdir()):
        path.rename(path.with_name(path.name.replace(worker.mark, mark)))
    if not (folder / f"session-{mark}.0").is_symlink():
        Session(DiskStore(folder), worker.limit_s, mark)


def test_an_attempt_lasts_while_one_of_it_is_there(tmp_path: Path) -> None:
    with Worker.of(tmp_path) as one:
        with Worker.of(tmp_path) as two:
            assert two.attempt == one.attempt
        with Worker.of(tmp_path) as three:
            assert three.signature["attempt"] == one.signature["attempt"]
            one.leave()  # who began it
            with Worker.of(tmp_path) as four:
                assert four.signature["attempt"] == three.signature["attempt"]
    with Worker.of(tmp_path) as five:
        assert five.attempt == four.attempt + 1
