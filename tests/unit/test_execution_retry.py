"""What is tried again and what never is: the error's number is found wherever a library puts it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

import pytest

from connectomics.core.errors import OutputError, VolumeError
from connectomics.core.geometry import Box
from connectomics.execution.retry import PAUSES_S, SYSTEMIC, TRANSIENT, RetryingReader, errno_of, retried

from small_runs import IMAGE, Reader

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/a/c/0": Failed writing: "/a/c/0.__lock": Failed to write 65572 '
    "bytes to file 3: No space left on device [os_error_code='28']"
)
HDF5 = "Can't read data (file read failed: time = Mon, fd = 4, errno = 5, error message = 'Input/output error')"


def caused(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, "x"), errno.EIO),
        (ValueError(TENSORSTORE), errno.ENOSPC),
        (OSError(HDF5), errno.EIO),
        (ValueError("UNAVAILABLE: the server is away"), errno.EAGAIN),
        (caused(OutputError("cannot write"), ValueError(TENSORSTORE)), errno.ENOSPC),
        (
            caused(VolumeError("cannot read"), caused(RuntimeError("b"), PermissionError(errno.EACCES, "x"))),
            errno.EACCES,
        ),
        (ValueError("is not AVAILABLE: here"), None),
        (VolumeError("errno of nothing"), None),
    ],
)
def test_the_number_of_an_error(error: Exception, number: int | None) -> None:
    assert errno_of(error) == number


def test_nothing_is_both() -> None:
    assert not TRANSIENT & SYSTEMIC
    assert 5 < sum(PAUSES_S) < 60
    assert list(PAUSES_S) == sorted(PAUSES_S)


class Shaky:
    """Fails so many times, then works."""

    def __init__(self, failures: int, error: Callable[[], Exception]) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error()
        return "done"


def test_what_fails_for_a_moment_is_done_again_after_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    shaky = Shaky(3, lambda: OSError(errno.ESTALE, "stale handle"))
    assert retried(shaky, "reading a box") == "done"
    assert slept == list(PAUSES_S[:3])
    assert "reading a box failed ([Errno 116] stale handle); attempt 2 follows in 0.2 s" in caplog.text


def test_in_the_end_the_error_is_told() -> None:
    shaky = Shaky(9, lambda: OSError(errno.EIO, "x"))
    with pytest.raises(OSError, match="x"):
        retried(shaky, "it", (0.0, 0.0))
    assert shaky.calls == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), VolumeError("NaN"), ValueError("a mistake")])
def test_nothing_else_is_done_again(error: Exception) -> None:
    shaky = Shaky(9, lambda: error)
    with pytest.raises(type(error)):
        retried(shaky, "it")
    assert shaky.calls == 1


def test_a_patient_reader_is_the_volume() -> None:
    reader = Reader()
    calls = Shaky(2, lambda: VolumeError("cannot read"))

    def read(box: Box) -> object:
        try:
            calls()
        except VolumeError as error:
            raise error from OSError(errno.EIO, "x")
        return IMAGE[(slice(None), *box.slices)]

    reader.read = read  # type: ignore[method-assign, assignment]  # a disk that is shaky
    retrying = RetryingReader(reader, "v", (0.0, 0.0))
    assert (retrying.info, retrying.identity) == (reader.info, reader.identity)
    box = Box((1, 2, 3), (2, 4, 6))
    assert (retrying.read(box) == IMAGE[(slice(None), *box.slices)]).all()
    assert calls.calls == 3
    retrying.close()
