"""Records that processes agree on: four verbs, and nothing else that a disk or an object store can do.

``lease`` is written in these verbs alone. There is no rename, delete, append, time stamp or lock among them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from connectomics.core.errors import StorageError
from connectomics.core.process import is_dead, new_mark
from connectomics.execution.retry import PAUSES_S, retried

T = TypeVar("T")
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
"""What file systems say that know no hard links, or no more of them."""


@dataclass(frozen=True, slots=True)
class Version:
    """A record as it was read or written: its number, which grows with each change, and its content.

    Content that is empty is that of a writer who has not come further yet, or never will.
    """

    number: int
    content: bytes


class CoordinationStore(Protocol):
    """Records by name. Each verb is done again where the storage fails for a moment.

    Contents must tell their writer and differ from change to change: a reply can be lost, and a writer then learns of
    its success by finding its own content there.

    Raises
    ------
    StorageError
        From every verb, if the storage refuses or is gone.
    """

    def create(self, name: str, content: bytes) -> Version | None:
        """Make a record unless there is one of this name; None where another has made it."""
        ...

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        """Change a record that still is as it was seen; None where it is not."""
        ...

    def read(self, name: str) -> Version | None:
        """The record as it is now, or None where there is none; what others changed last may be hidden for a while."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Names of the records that begin so, sorted; new ones may be hidden for a while."""
        ...


class DiskStore:
    """Records in a folder, which must exist: version n of NAME is the file NAME.n, and the highest is the current one.

    Works on every file system whose exclusive creation is exclusive: a file is written under a name of its own
    and linked to NAME.n; where there are no links it is created exclusively and then filled.
    """

    def __init__(self, folder: Path, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        self._folder = folder
        self._pauses_s = pauses_s
        self._known: dict[str, int] = {}  # the highest version that was seen
        self._links = True

    @property
    def folder(self) -> Path:
        """Where the records are."""
        return self._folder

    def create(self, name: str, content: bytes) -> Version | None:
        """Make a record unless there is one of this name."""
        return self._make(name, Version(0, content))

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        """Change a record that still is as it was seen."""
        return self._make(name, Version(seen.number + 1, content))

    def read(self, name: str) -> Version | None:
        """The record as it is now."""

        def current() -> Version | None:
            number = self._highest(name)
            return None if number < 0 else Version(number, self._path(name, number).read_bytes())

        return self._patiently(current, f"reading {name}")

    def list(self, prefix: str) -> list[str]:
        """Names of the records that begin so, sorted."""

        def names() -> set[str]:
            with os.scandir(self._folder) as entries:
                parts = (entry.name.rpartition(".") for entry in entries if entry.name.startswith(prefix))
                return {name for name, dot, number in parts if dot and number.isdecimal()}

        return sorted(self._patiently(names, f"listing {self._folder}"))

    def sweep(self) -> None:
        """Remove what processes of this machine left that ended while they made a record."""
        for path in self._folder.glob(".*"):
            if is_dead(path.name.removeprefix(".")):
                path.unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}"

    def _make(self, name: str, version: Version) -> Version | None:
        path = self._path(name, version.number)

        def made() -> bool:
            if self._links:
                try:
                    return self._linked(path, version.content)
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    self._links = False
            return _created(path, version.content)

        if not self._patiently(made, f"making {path.name}") and self._content(path) != version.content:
            return None
        if version.number and not self._path(name, version.number - 1).exists():
            path.unlink(missing_ok=True)  # the record ended, and its files were removed, since it was seen
            return None
        self._known[name] = max(version.number, self._known.get(name, -1))
        return version

    def remove(self, name: str) -> None:
        """Take a record away that nobody needs any more; whoever saw it once cannot change it then."""
        for number in range(self._highest(name), -1, -1):
            self._path(name, number).unlink(missing_ok=True)
        self._known.pop(name, None)

    def _linked(self, path: Path, content: bytes) -> bool:
        own = self._folder / f".{new_mark()}"
        try:
            own.write_bytes(content)
            os.link(own, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
        return True

    def _content(self, path: Path) -> bytes:
        return self._patiently(path.read_bytes, f"reading {path.name}")

    def _highest(self, name: str) -> int:
        """Number of the current version, -1 where there is none: versions are without gaps, so it is searched for."""
        low = self._known.get(name, -1)
        step = 1
        while self._path(name, low + step).exists():
            low, step = low + step, 2 * step
        high = low + step  # is absent; all up to ``low`` are there
        while high - low > 1:
            middle = (low + high) // 2
            if self._path(name, middle).exists():
                low = middle
            else:
                high = middle
        if low >= 0:
            self._known[name] = low
        return low

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        try:
            return retried(action, f"{what} in {self._folder}", self._pauses_s)
        except OSError as error:
            why = "it was removed or unmounted" if isinstance(error, FileNotFoundError) else error.strerror
            raise StorageError(
                f"{self._folder}: the records of the run cannot be read or written ({why}); mend the disk and run "
                "again, finished blocks are kept"
            ) from error


def _created(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb", buffering=0) as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True
