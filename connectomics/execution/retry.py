"""What is tried again: reading and writing that fails for a moment. What never is: a disk that is full or gone."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from connectomics.core.errors import ConnectomicsError
from connectomics.core.geometry import Box
from connectomics.volumes.source import READ_ERRORS
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

T = TypeVar("T")
log = logging.getLogger(__name__)
PAUSES_S = (0.2, 0.8, 3.2, 12.8)
_BUSY = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT}
_NO_ANSWER = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN}
TRANSIENT = frozenset({errno.ECONNRESET, errno.ECONNABORTED} | _BUSY | _NO_ANSWER)
_FULL_OR_FORBIDDEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
SYSTEMIC = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESHUTDOWN} | _FULL_OR_FORBIDDEN)
STATED = re.compile(r"os_error_code='(\d+)'|errno = (\d+)")  # TensorStore's and HDF5's messages
UNAVAILABLE = re.compile(r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")  # TensorStore's own words


def errno_of(error: BaseException) -> int | None:
    """The operating system's number of what went wrong, found in an error or in what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        text = str(seen)
        stated = STATED.search(text)
        if stated is not None:
            return int(stated[1] or stated[2])
        if UNAVAILABLE.search(text):
            return errno.EAGAIN
        seen = seen.__cause__ or seen.__context__
    return None


def retried(action: Callable[[], T], what: str, pauses_s: tuple[float, ...] = PAUSES_S) -> T:
    """The result of ``action``, which is done again after each of the pauses while it fails for a moment.

    Parameters
    ----------
    action
        Safe to repeat.
    what
        Of it, for the log.
    pauses_s
        How long to wait before each further attempt.
    """
    for attempt, pause in enumerate(pauses_s, start=1):
        try:
            return action()
        except (ConnectomicsError, *READ_ERRORS) as error:
            if errno_of(error) not in TRANSIENT:
                raise
            log.warning("%s failed (%s); attempt %d follows in %g s", what, error, attempt + 1, pause)
        time.sleep(pause)
    return action()


class RetryingReader:
    """A volume whose reading is tried again as ``retried`` does; whoever made the volume closes it."""

    def __init__(self, reader: VolumeReader, name: str, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        self._reader = reader
        self._name = name
        self._pauses_s = pauses_s

    @property
    def info(self) -> VolumeInfo:
        """What the volume says of itself."""
        return self._reader.info

    @property
    def identity(self) -> dict[str, object]:
        """What the volume says of itself."""
        return self._reader.identity

    def read(self, box: Box) -> Array:
        """Voxels (c, z, y, x) of a box."""
        what = f"reading voxels {box.start} to {box.stop} of {self._name}"
        return retried(lambda: self._reader.read(box), what, self._pauses_s)

    def close(self) -> None:
        """Close the volume."""
        self._reader.close()
