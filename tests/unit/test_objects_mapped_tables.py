from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.core.errors import StorageError
from connectomics.objects.mapped_tables import changeable, flush, mapped, table

ROWS = 100_000
KIND = np.dtype([("first", "u8"), ("start", "i8", 3), ("border", "?")])


def refuse_to_allocate(*_: object) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.fixture(params=["allocated", "written"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of taking the room: as the file system offers, and by writing zeros."""
    if request.param == "written":
        monkeypatch.setattr(os, "posix_fallocate", refuse_to_allocate)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("kind", [np.dtype(np.uint64), np.dtype(np.bool_), KIND])
def test_a_table_is_numpys_file_of_zeros_and_has_all_its_room(tmp_path: Path, kind: np.dtype) -> None:
    made = table(tmp_path / "a.npy", ROWS, kind)
    found = (tmp_path / "a.npy").stat()
    assert found.st_blocks * 512 >= ROWS * kind.itemsize, "a page of it could have no room"
    assert made.shape == (ROWS,) and made.dtype == kind and not np.asarray(made).view(np.uint8).any()
    made[7] = np.ones((), kind)
    flush(made)
    read = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(read, made)
    again = changeable(tmp_path / "a.npy")
    again[8] = again[7]
    flush(again)
    assert np.load(tmp_path / "a.npy")[8] == read[7]


def test_a_table_without_rows_is_a_file(tmp_path: Path) -> None:
    assert table(tmp_path / "a.npy", 0, np.int64).shape == (1,)
    assert len(mapped(tmp_path / "absent", 0, np.int64)) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("by")
def test_a_disk_that_is_too_small_is_a_sentence(small_disk: Path) -> None:
    """The file was sparse, and the process was killed when it wrote the page for which there was no room."""
    with pytest.raises(StorageError, match=r"a\.npy, 800000 bytes: No space left on device\. Free disk space .* again"):
        table(small_disk / "a.npy", ROWS, np.uint64)
    (small_disk / "a.npy").unlink()
    table(small_disk / "b.npy", 100, np.uint64)[:] = 1


def test_a_table_that_cannot_be_flushed_is_named(tmp_path: Path) -> None:
    class Refusing(np.memmap):
        def flush(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match=r"Input/output error.*a\.npy"):
        flush(Refusing(tmp_path / "a.npy", np.uint8, "w+", shape=(3,)))
