"""Kept artefacts: what comes out is what went in, or nothing; never what another user may have put there."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from connectomics.models.backends import artefacts as artefacts_module
from connectomics.models.backends.artefacts import Artefacts

FACTS = {"model": "a", "shape": [1, 2]}


def content_of(kept: Artefacts, facts: Mapping[str, object] = FACTS) -> bytes | None:
    found = kept.get(facts)
    return None if found is None else bytes(found.content)


def test_facts_find_their_content_and_no_other(tmp_path: Path) -> None:
    kept = Artefacts(tmp_path / "deep" / "cache")
    assert kept.get(FACTS) is None
    kept.put(FACTS, b"compiled")
    assert content_of(kept, dict(reversed(FACTS.items()))) == b"compiled"
    assert kept.get({**FACTS, "shape": [2, 2]}) is None
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "deep" / "cache", *tmp_path.rglob("*.compiled"))] == [
        "0o700",
        "0o600",
    ]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:]])
def test_damage_counts_as_absent(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    kept = Artefacts(tmp_path)
    kept.put(FACTS, b"compiled network")
    (path,) = tmp_path.glob("*.compiled")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert kept.get(FACTS) is None
    assert "is damaged and is made again" in caplog.text
    kept.put(FACTS, b"compiled network")
    assert content_of(kept) == b"compiled network"


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_may_write_to_is_never_read(tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache"
    kept = Artefacts(folder)
    kept.put(FACTS, b"planted")
    (path,) = folder.glob("*.compiled")
    (folder if which == "folder" else path).chmod(0o777)
    assert kept.get(FACTS) is None
    assert "others may write to it" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_what_another_user_owns_is_never_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Artefacts(tmp_path)
    kept.put(FACTS, b"mine")
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert kept.get(FACTS) is None
    kept.put({"model": "b"}, b"theirs")
    assert len(list(tmp_path.iterdir())) == 1
    assert tmp_path not in kept.compiler_folder().parents


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for kept in (Artefacts(tmp_path / "file" / "cache"), Artefacts(None)):
        kept.put(FACTS, b"compiled")
        assert kept.get(FACTS) is None
        assert kept.compiler_folder().is_dir()


def test_a_disk_that_refuses_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    Artefacts(tmp_path).put(FACTS, b"compiled")
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    content = os.urandom(1 << 16)
    threads = [threading.Thread(target=Artefacts(tmp_path).put, args=(FACTS, content)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content_of(Artefacts(tmp_path)) == content
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts_module, "LARGEST_BYTES", 2 * (64 + 100))
    kept = Artefacts(tmp_path)
    for age, name in ((300, "a"), (200, "b")):
        kept.put({"model": name}, bytes(100))
        (path,) = set(tmp_path.glob("*.compiled")) - {p for p in tmp_path.glob("*.compiled") if p.stat().st_mtime < 1e9}
        os.utime(path, (1e8 - age, 1e8 - age))
    assert content_of(kept, {"model": "a"}) == bytes(100)  # used just now
    kept.put({"model": "c"}, bytes(100))
    assert [kept.get({"model": name}) is not None for name in "abc"] == [True, False, True]


def test_memory_given_back_is_read_again(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    Artefacts(tmp_path).put(FACTS, content)
    found = Artefacts(tmp_path).get(FACTS)
    assert found is not None
    (path,) = tmp_path.glob("*.compiled")
    path.unlink()  # another process made room
    found.give_back()
    assert bytes(found.content) == content
