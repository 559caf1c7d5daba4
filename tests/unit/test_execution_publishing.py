"""Publishing: a result appears whole, and never from the folder of an epoch that is over."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from connectomics.core.errors import OutputError
from connectomics.execution import publishing
from connectomics.execution.lease import LeaseLostError, lease_of, packed
from connectomics.execution.publishing import Staging, revoke, revoke_all
from connectomics.execution.worker import Worker

LEASE = "writer"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "run" / "work"


@pytest.fixture
def worker(work: Path) -> Iterator[Worker]:
    with Worker.of(work / "coordination") as one:
        yield one


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_and_folders_replace_what_stands_there(work: Path, worker: Worker, tmp_path: Path) -> None:
    for text in ("old", "new"):
        with worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
            staging.place("file").write_text(text)
            staging.place("folder").mkdir()
            (staging.place("folder") / text).touch()
            staging.publish("file", tmp_path / "v.h5")
            staging.publish("folder", tmp_path / "v.zarr")
    assert (tmp_path / "v.h5").read_text() == "new"
    assert names(tmp_path / "v.zarr") == {"new"}
    assert not list(work.glob("staging.*"))


def test_an_old_folder_is_kept_until_the_new_one_is_on_the_disk(
    work: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power brings the old name back, with half of what was in it."""
    final, flush, seen = tmp_path / "v.zarr", os.fsync, []
    final.mkdir()
    (final / "old").touch()
    with worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
        staging.place("v").mkdir()

        def told(descriptor: int) -> None:
            seen.append(len(list(work.glob("staging.*/*/old"))))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", told)
        staging.publish("v", final)
    assert seen and all(seen)


def test_what_a_dead_process_built_is_gone_on_with(work: Path, worker: Worker) -> None:
    with pytest.raises(KeyboardInterrupt), worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
        (staging.place("v.zarr") / "c").mkdir(parents=True)
        (staging.place("v.zarr") / "c" / "0").touch()
        raise KeyboardInterrupt
    with worker.alone(LEASE), Staging(work, worker, LEASE) as later:
        assert later.folder != staging.folder and staging.folder.is_file()
        assert names(later.folder) == {"v.zarr/c/0"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_sleeper_publishes_nothing(
    work: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It checked that the lease was its own, slept, and others took over: the rename itself fails."""
    final, real = tmp_path / "v", publishing.rename

    def build(place: Path, text: str) -> None:
        if kind == "file":
            place.write_text(text)
        else:
            place.mkdir()
            (place / text).touch()

    def slept(source: Path | str, target: Path | str, *folders: int | None) -> None:
        monkeypatch.setattr(publishing, "rename", real)
        with Worker.of(work / "coordination") as other:
            take(other)
            with Staging(work, other, LEASE) as theirs:
                build(theirs.place("new"), "theirs")
                theirs.publish("new", final)
        real(source, target, *folders)

    with pytest.raises(LeaseLostError), worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
        build(staging.place("v"), "mine")
        monkeypatch.setattr(publishing, "rename", slept)
        staging.publish("v", final)
    assert final.read_text() == "theirs" if kind == "file" else names(final) == {"theirs"}


def take(other: Worker) -> None:
    """Take the lease from its holder as if it had stood still."""
    seen = other.store.read(LEASE)
    assert seen is not None
    lease = lease_of(seen)
    assert lease is not None
    assert other.store.replace(LEASE, seen, packed(replace(lease, state="free", counter=99))) is not None
    assert other.acquire(LEASE)


def test_a_sleeper_cannot_write_into_its_folder_again(work: Path, worker: Worker) -> None:
    with worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
        (staging.place("v.zarr") / "c").mkdir(parents=True)
        revoke(staging.folder)
        with pytest.raises((NotADirectoryError, FileExistsError)):
            (staging.place("v.zarr") / "c").mkdir(parents=True)
        with pytest.raises(FileNotFoundError):
            staging.publish("v.zarr", work.parent / "v.zarr")
        revoke_all(work)
        assert staging.folder.is_file()
        staging.folder.unlink()


def test_a_predecessor_that_wakes_up_leaves_its_successor_alone(
    work: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had checked that the lease was its own before it slept; its successor has nothing in its folder yet."""
    with contextlib.suppress(LeaseLostError), worker.alone(LEASE):
        predecessor = Staging(work, worker, LEASE)
        monkeypatch.setattr(predecessor, "confirm", lambda: None)
        with Worker.of(work / "coordination") as other:
            take(other)
            with Staging(work, other, LEASE) as staging, predecessor:
                assert staging.folder.is_dir()
                staging.place("v").touch()
                staging.publish("v", work.parent / "v")


def test_whose_folder_is_taken_away_begins_again(work: Path, worker: Worker) -> None:
    """It is no error: somebody judged wrongly that this process was over."""
    with pytest.raises(LeaseLostError), worker.alone(LEASE), Staging(work, worker, LEASE) as staging:
        revoke(staging.folder)
        staging.place("v").touch()
    with worker.alone(LEASE), Staging(work, worker, LEASE) as later:
        assert later.folder.is_dir()


def test_another_disk_is_a_sentence(
    work: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(publishing, "rename", refused)
    with pytest.raises(OutputError, match="lies on another disk"), worker.alone(LEASE):  # noqa: SIM117
        with Staging(work, worker, LEASE) as staging:
            staging.place("v").touch()
            staging.publish("v", tmp_path / "v")


def test_another_run_that_has_the_name_is_the_reason_of_whatever_went_wrong(work: Path, worker: Worker) -> None:
    taken = False

    def confirm() -> None:
        if taken:
            raise OutputError("another run has taken this name")

    with pytest.raises(OutputError, match="another run has taken"), worker.alone(LEASE):  # noqa: SIM117
        with Staging(work, worker, LEASE, confirm):
            taken = True
            raise FileNotFoundError
