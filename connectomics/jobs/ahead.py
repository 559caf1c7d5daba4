"""RUN folders of the volumes that come next, made together, so that one flush is enough for many."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from connectomics.core.files import fsync_path

AHEAD = 256  # volumes


class FoldersAhead:
    """Makes the RUN folders of a list of volumes some time before each is begun; a context manager.

    What cannot be made is left to whoever begins the volume, who tells why. At the end folders go that nobody began.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(dict.fromkeys(folders))
        self._made: set[Path] = set()

    def __enter__(self) -> FoldersAhead:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def make(self, folder: Path) -> None:
        """Make a folder and those after it, unless this was done; other processes may make them too."""
        if folder in self._made or len(self._folders) < 2:
            return
        first = self._folders.index(folder)
        coming = self._folders[first : first + AHEAD]
        self._made.update(coming)
        for each in coming:
            with contextlib.suppress(OSError):
                each.mkdir(exist_ok=True)
        for above in {each.parent for each in coming}:
            with contextlib.suppress(OSError):
                fsync_path(above)
