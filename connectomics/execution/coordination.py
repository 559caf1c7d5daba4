"""Records that processes agree on: four verbs, and nothing else that a disk or an object store can do.

``lease`` is written in these verbs alone. There is no rename, delete, append, time stamp or lock among them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from connectomics.core.errors import StorageError
from connectomics.execution.retry import PAUSES_S, retried

T = TypeVar("T")
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EACCES)
"""What file systems say that know no symbolic links, or do not allow them."""
LONGEST_LINK = 1000  # bytes of a content that a link may carry


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
    """Records in a folder, which must exist: version n of NAME is the name NAME.n, and the highest is the current one.

    A name is a symbolic link to nowhere that carries the content, so that both come into being at once, after a loss of
    power too. Where there are no links it is a file, which is created exclusively and then filled. Works on every
    file system whose exclusive creation is exclusive.
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
        return self._make(name, Version(0, content), None)

    def replace(self, name: str, seen: Version, content: bytes) -> Version | None:
        """Change a record that still is as it was seen."""
        return self._make(name, Version(seen.number + 1, content), seen)

    def read(self, name: str) -> Version | None:
        """The record as it is now."""

        def current() -> Version | None:
            while (number := self._highest(name)) >= 0:
                try:
                    return Version(number, content_of(self._path(name, number)))
                except FileNotFoundError:
                    self._known.pop(name, None)  # the record ended since it was seen; another may have begun
            return None

        return self._patiently(current, f"reading {name}")

    def list(self, prefix: str) -> list[str]:
        """Names of the records that begin so, sorted."""

        def names() -> set[str]:
            with os.scandir(self._folder) as entries:
                parts = (entry.name.rpartition(".") for entry in entries if entry.name.startswith(prefix))
                return {name for name, dot, number in parts if dot and number.isdecimal()}

        return sorted(self._patiently(names, f"listing {self._folder}"))

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}"

    def _make(self, name: str, version: Version, seen: Version | None) -> Version | None:
        path = self._path(name, version.number)

        def made() -> bool:
            if self._links and len(version.content) <= LONGEST_LINK:
                try:
                    return _linked(path, version.content)
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    self._links = False
            return _created(path, version.content)

        def found() -> bytes:
            return content_of(path)

        won = self._patiently(made, f"making {path.name}")
        if not won and self._patiently(found, f"reading {path.name}") != version.content:
            return None
        if seen is not None and not self._stands(name, seen):
            path.unlink(missing_ok=True)  # the record ended since it was seen, and another may have begun
            return None
        self._known[name] = max(version.number, self._known.get(name, -1))
        return version

    def _stands(self, name: str, version: Version) -> bool:
        """Whether a version is there as it was seen."""

        def same() -> bool:
            try:
                return content_of(self._path(name, version.number)) == version.content
            except FileNotFoundError:
                return False

        return self._patiently(same, f"reading {name}")

    def remove(self, name: str) -> None:
        """Take a record away that nobody needs any more; whoever saw it once cannot change it then."""
        for number in range(self._highest(name), -1, -1):
            self._path(name, number).unlink(missing_ok=True)
        self._known.pop(name, None)

    def _highest(self, name: str) -> int:
        """Number of the current version, -1 where there is none: versions are without gaps, so it is searched for."""
        low = self._known.get(name, -1)
        step = 1
        while os.path.lexists(self._path(name, low + step)):
            low, step = low + step, 2 * step
        high = low + step  # is absent; all up to ``low`` are there
        while high - low > 1:
            middle = (low + high) // 2
            if os.path.lexists(self._path(name, middle)):
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


def _linked(path: Path, content: bytes) -> bool:
    try:
        os.symlink(content, os.fsencode(path))  # noqa: PTH211 - pathlib would tidy the content up
    except FileExistsError:
        return False
    return True


def content_of(path: Path) -> bytes:
    """What the name of a version carries."""
    try:
        return os.readlink(os.fsencode(path))  # noqa: PTH115
    except OSError as error:
        if error.errno != errno.EINVAL:  # it is no link but a file
            raise
        return path.read_bytes()


def _created(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb", buffering=0) as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True
