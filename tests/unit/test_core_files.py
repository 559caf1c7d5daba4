from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from connectomics.core import files
from connectomics.core.errors import OutputError
from connectomics.core.files import (
    DurableFolders,
    discard,
    flushes_folders,
    fsync_path,
    make_folder,
    put_in_place,
    replacing,
    write_once,
    write_text,
)
from connectomics.core.process import new_mark


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_one_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def ended_mark() -> str:
    """The mark of a process that lives no more."""
    code = "from connectomics.core.process import new_mark; print(new_mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_folder_appears_whole_and_leftovers_of_ended_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    mark, living = ended_mark(), new_mark()
    for kind in (".partial", ".replaced"):
        leftover = tmp_path / f".stack.{mark}{kind}"
        leftover.mkdir()
        (leftover / "rubbish").touch()
    others = {f".stack.{living}.partial", f".stack.2.{mark}.partial", ".stack.mine.partial", ".stack.partial"}
    for name in others:
        (tmp_path / name).touch()
    with replacing(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "new").write_text("x")
    assert sorted(p.name for p in path.rglob("*")) == ["inner", "new"]
    assert {p.name for p in tmp_path.iterdir()} == others | {"stack"}
    discard(path)
    discard(path)
    assert not path.exists()


def test_leftovers_of_other_machines_are_removed_when_they_are_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    left = [tmp_path / f".a.txt.0123abcd-{pid}-5-aa.partial" for pid in (1, 2)]
    for file in left:
        file.touch()
    os.utime(left[0], (1, 1))
    write_text(path, "x")
    assert sorted(tmp_path.iterdir()) == sorted([left[1], path])


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Whoever is first wins, since others may be reading; neither removes what the other is writing."""
    path = tmp_path / "stack"
    with replacing(path) as one:
        one.mkdir()
        (one / "one").touch()
        with replacing(path) as two:
            two.mkdir()
            (two / "two").touch()
    assert [p.name for p in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_never_gives_way_to_a_folder_in_silence(tmp_path: Path) -> None:
    path, complete = tmp_path / "name", tmp_path / "new"
    path.mkdir()
    complete.touch()
    with pytest.raises(IsADirectoryError):
        put_in_place(complete, path)
    assert complete.exists()


def test_what_is_absent_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "absent", path)
    assert [p.name for p in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_flushed_into_those_above_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("connectomics.core.files.fsync_path", flushed.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "c" / "d")
    make_folder(tmp_path / "a" / "c")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "a" / "c" / "d").is_dir()
    assert flushed == [tmp_path / "a", tmp_path, tmp_path / "a" / "c", tmp_path / "a"]


def test_folders_that_another_made_are_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("connectomics.core.files.fsync_path", flushed.append)
    top = tmp_path / "top"
    folders = DurableFolders(top)
    for name in ("a/b", "a/c"):
        (top / name).mkdir(parents=True)
    for _ in range(2):
        for name in ("a/b", "a/c", "a/absent"):
            folders.keep(top / name)
    assert flushed == [tmp_path, top, top / "a", top / "a"]


def refusing(number: int, *, folders: bool) -> Callable[[int], None]:
    """An fsync that fails so for folders, or for files."""
    flush = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    return refused


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_disk_that_cannot_flush_folders_is_told_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files._tell_unflushed.cache_clear()
    assert flushes_folders(tmp_path)
    monkeypatch.setattr(os, "fsync", refusing(number, folders=True))
    with caplog.at_level(logging.INFO):
        make_folder(tmp_path / "a" / "b")
        write_text(tmp_path / "a" / "c", "text")
    assert (tmp_path / "a" / "c").read_text() == "text"
    assert not flushes_folders(tmp_path)
    (told,) = caplog.messages
    assert os.strerror(number) in told


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_other_failures_to_flush_name_the_folder(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number, folders=True))
    with pytest.raises(OSError, match=str(tmp_path)) as failed:
        make_folder(tmp_path / "a")
    assert failed.value.errno == number and flushes_folders(tmp_path)


def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL, folders=False))
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        fsync_path(tmp_path / "a")


def test_a_rename_to_another_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OutputError, match=f"{tmp_path / 'work'} lies on another disk .* remove that mount or link"):
        put_in_place(tmp_path / "work" / "complete", tmp_path / "stack")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_is_given_to_what_is_flushed_and_flushed_itself(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order: all contents, the rename, the folder that holds the name; a loss of power comes anywhere."""
    told: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        told.append(("flush", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        told.append(("rename", new.name))
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with replacing(tmp_path / "a") as temporary:
        if kind == "folder":
            temporary.mkdir()
        (temporary / "b" if kind == "folder" else temporary).write_text("content")
    contents = ["b", temporary.name] if kind == "folder" else [temporary.name]
    assert told == [*(("flush", name) for name in contents), ("rename", "a"), ("flush", tmp_path.name)]


def test_of_several_first_texts_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert write_once(path, "one")
    assert not write_once(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_the_first_text_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    test_of_several_first_texts_one_wins(tmp_path)
