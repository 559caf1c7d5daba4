"""Stores of records: on disks with and without links, and the one in memory that the state machine runs on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from simulation import MemoryStore, World

from connectomics.core.errors import StorageError
from connectomics.execution.coordination import CoordinationStore, DiskStore
from connectomics.testing.coordination_store import CoordinationStoreContract


class TestDiskStore(CoordinationStoreContract):
    def store(self, folder: Path) -> CoordinationStore:
        return DiskStore(folder)


class TestDiskStoreWithoutLinks(CoordinationStoreContract):
    @pytest.fixture(autouse=True)
    def no_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "symlink", refused)

    def store(self, folder: Path) -> CoordinationStore:
        return DiskStore(folder)

    def test_an_empty_one_is_of_somebody_unknown(self, tmp_path: Path) -> None:
        """Its maker died between making and filling it."""
        (tmp_path / "name.0").touch()
        store = self.store(tmp_path)
        seen = store.read("name")
        assert seen is not None and seen.content == b""
        assert store.create("name", b"mine") is None
        assert store.replace("name", seen, b"mine") is not None


class TestMemoryStore(CoordinationStoreContract):
    def store(self, folder: Path) -> CoordinationStore:
        return MemoryStore(World(), RECORDS.setdefault(folder, {}))


RECORDS: dict[Path, dict[str, list[bytes]]] = {}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
@pytest.mark.parametrize("done", [False, True], ids=["refused", "reply lost"])
def test_what_fails_for_a_moment_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, done: bool
) -> None:
    store, link, failures = DiskStore(tmp_path, pauses_s=(0.0, 0.0)), os.symlink, [code]

    def failing(*arguments: Any) -> None:
        if not failures:
            link(*arguments)
            return
        if done:
            link(*arguments)
        failures.clear()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "symlink", failing)
    made = store.create("name", b"mine")
    assert made is not None and not failures
    assert DiskStore(tmp_path).read("name") == made


def test_a_folder_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "absent")
    with pytest.raises(StorageError, match=r"it was removed or unmounted.*run again"):
        store.create("name", b"")


def test_a_record_that_was_taken_away_cannot_be_changed(tmp_path: Path) -> None:
    store, other = DiskStore(tmp_path), DiskStore(tmp_path)
    first = store.create("name", b"0")
    assert first is not None
    seen = other.read("name")
    assert seen == first
    store.remove("name")
    assert other.replace("name", seen, b"1") is None
    assert not list(tmp_path.iterdir())
    assert store.create("name", b"2") is not None


def test_a_record_that_has_begun_anew_is_not_changed_by_who_saw_the_former(tmp_path: Path) -> None:
    """A process that slept until its run had ended, and another had begun, takes no lease of that one."""
    store, sleeper = DiskStore(tmp_path), DiskStore(tmp_path)
    assert store.create("name", b"0") is not None
    seen = sleeper.read("name")
    assert seen is not None
    store.remove("name")
    anew = store.create("name", b"1")
    assert sleeper.replace("name", seen, b"2") is None
    assert DiskStore(tmp_path).read("name") == anew


def test_a_record_that_ended_since_it_was_seen_is_none(tmp_path: Path) -> None:
    """Also where the folder is gone with it: that is no disk to be mended."""
    store, sleeper = DiskStore(tmp_path / "claims"), DiskStore(tmp_path / "claims")
    (tmp_path / "claims").mkdir()
    first = store.create("name", b"0")
    assert first is not None and store.replace("name", first, b"1") is not None
    assert sleeper.read("name") is not None
    store.remove("name")
    assert sleeper.read("name") is None
    anew = store.create("name", b"2")
    assert sleeper.read("name") == anew
    store.remove("name")
    (tmp_path / "claims").rmdir()
    assert sleeper.read("name") is None


def test_a_long_content_is_kept_in_a_file(tmp_path: Path) -> None:
    long = b"x" * 5000
    made = DiskStore(tmp_path).create("name", long)
    assert made is not None and DiskStore(tmp_path).read("name") == made
    assert DiskStore(tmp_path).replace("name", made, b"short") is not None
