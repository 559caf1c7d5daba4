"""The files that a volume is read from: what they were when it was opened, and whether they still are that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectomics.volumes.source import file_identity, folded_identity


class WatchedFiles:
    """Sizes and times of the files of a volume, as they were when it was opened.

    Parameters
    ----------
    path
        The volume's own file.
    parts
        Further files that it is made of, with the names by which they go: those of a virtual dataset, of an external
        link, of raw storage.

    Raises
    ------
    OSError
        If one is absent, or no file.
    """

    def __init__(self, path: Path, parts: Sequence[tuple[str, Path]] = ()) -> None:
        self._path = path
        self._files = [(path.name, path), *dict(parts).items()]
        self._before = self._now()

    @property
    def identity(self) -> dict[str, object]:
        """Name, size and time of the file, and of all others as one."""
        own = file_identity(self._path)
        return own if len(self._files) == 1 else own | {"parts": folded_identity("parts", self._files[1:])}

    def require_same(self) -> None:
        """Raise ValueError, naming the file, if one was cut short, written to, replaced or removed since."""
        try:
            now = self._now()
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} was removed since the volume was opened") from error
        for (name, _), before, found in zip(self._files, self._before, now, strict=True):
            if found != before:
                sizes = f"it had {before['bytes']} bytes, now it has {found['bytes']}"
                changed = sizes if found["bytes"] != before["bytes"] else "it was written to"
                raise ValueError(
                    f"{name} changed since the volume was opened: {changed}; run again when nothing writes to it"
                )

    def _now(self) -> list[dict[str, object]]:
        return [file_identity(path, name) for name, path in self._files]


def changed_input(name: str) -> str:
    """What is said of a volume whose files, mask or previous stage changed while it was read."""
    return (
        f"{name}: its files, or those of its mask, probabilities or previous stage, are not any more what they were "
        "when the run began, so nothing is written under a final name; run again when nothing writes to them."
    )
