from __future__ import annotations

from pathlib import Path

import pytest

from connectomics.io.atomic import discard, put_in_place, replacing, write_text


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


def test_a_folder_replaces_a_folder_and_leftovers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    path.mkdir()
    (path / "old").touch()
    leftover = tmp_path / ".stack.partial"
    leftover.mkdir()
    (leftover / "rubbish").touch()
    with replacing(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "new").write_text("x")
    assert sorted(p.name for p in path.rglob("*")) == ["inner", "new"]
    assert list(tmp_path.iterdir()) == [path]
    discard(path)
    discard(path)
    assert not path.exists()


def test_a_kill_between_the_two_renames_leaves_no_half_removed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, complete = tmp_path / "stack", tmp_path / "new"
    for folder in (path, complete):
        folder.mkdir()
        (folder / folder.name).touch()

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(complete, path)
    assert not path.exists()
    monkeypatch.undo()
    put_in_place(complete, path)
    assert [p.name for p in tmp_path.iterdir()] == ["stack"]
    assert [p.name for p in path.iterdir()] == ["new"]
