"""The request to open a volume, and what every format says of its files: identity, failures, units.

Every file of a format imports this; it knows nothing about arrays.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.fingerprint import key_of
from connectomics.volumes.library_text import in_our_words
from connectomics.volumes.volume import Nanometres

READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    EOFError,
    ImportError,
    MemoryError,
    SyntaxError,
    struct.error,
    zlib.error,
)
"""What the storage libraries raise on a file that is damaged, missing or not theirs."""

LARGEST_JSON_BYTES = 1 << 26
BELIEVED_BYTES = 1 << 44
"""A volume up to this size may be stored as nothing, because chunks that are absent are zeros."""
BELIEVED_RATIO = 1 << 20
"""A larger one takes at least this part of its size on disk."""

DEEPEST = 8
"""Levels of groups that are searched below a folder for arrays, and above an array for what describes it."""

PRECOMPUTED_PREFIXES = ("precomputed://file://", "precomputed://")
"""What may stand before the path of a precomputed volume, longest first."""


def without_prefix(uri: str) -> tuple[str, str]:
    """``precomputed://`` or nothing, and the rest of a URI.

    Examples
    --------
    >>> without_prefix("precomputed:///data/em::1"), without_prefix("cell.h5")
    (('precomputed://', '/data/em::1'), ('', 'cell.h5'))
    """
    prefix = next((prefix for prefix in PRECOMPUTED_PREFIXES if uri.startswith(prefix)), "")
    return prefix, uri.removeprefix(prefix)


def absolute_uri(uri: str) -> str:
    """Return the URI that means the same volume from any folder.

    Examples
    --------
    >>> absolute_uri("phantom:1x8x8"), absolute_uri("precomputed:///data/em::1"), absolute_uri("/a/b.h5::raw")
    ('phantom:1x8x8', 'precomputed:///data/em::1', '/a/b.h5::raw')
    """
    prefix, local = without_prefix(uri)
    if uri.startswith("phantom:") or "://" in local:
        return uri
    path, inner = path_and_inner(local)
    return f"{prefix}{Path(path).absolute()}{'::' if inner else ''}{inner}"


def path_and_inner(local: str) -> tuple[str, str]:
    """The path of a URI without prefix, and what stands after ``::``; a path that has ``::`` in it is taken whole.

    Where several readings are possible, that of the longest path that is there counts, else the shortest one.

    Examples
    --------
    >>> path_and_inner("raw.h5::volumes/raw"), path_and_inner("cell.h5")
    (('raw.h5', 'volumes/raw'), ('cell.h5', ''))
    """
    parts = local.split("::")
    for count in range(len(parts), 1, -1):
        path = "::".join(parts[:count])
        if os.path.lexists(path):
            return path, "::".join(parts[count:])
    return parts[0], "::".join(parts[1:])


@dataclass(frozen=True, slots=True)
class Source:
    """A request to open one volume.

    Parameters
    ----------
    uri
        As the user wrote it; error messages name it.
    path
        File or folder on disk.
    inner
        What stands after ``::`` (dataset, array or level), or None.
    axes
        Letters of the stored array's axes that override what the file says, or None.
    voxel_size_nm
        (z, y, x) in nanometres that override what the file says, or None.
    channels
        How many the caller expects, or None: grey that was saved as so many colours is read as these.
    """

    uri: str
    path: Path
    inner: str | None = None
    axes: str | None = None
    voxel_size_nm: Nanometres | None = None
    channels: int | None = None


def three_positive(values: object, factor: float = 1.0) -> Nanometres | None:
    """``values`` times ``factor`` as (z, y, x), or None unless they are three positive finite numbers."""
    try:
        z, y, x = (float(v) * factor for v in np.asarray(values, dtype=np.float64).ravel())
    except (TypeError, ValueError):
        return None
    return (z, y, x) if all(np.isfinite(v) and v > 0 for v in (z, y, x)) else None


def some_of(names: Sequence[str]) -> str:
    """Names in a message, at most ten."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for one sentence; libraries put the cause at its start or its end."""
    if isinstance(error, PermissionError):
        return "permission denied; make it readable for this user"
    theirs = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = in_our_words(theirs.strip())
    if text is None:
        lines = theirs.strip().splitlines()
        text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:90]} … {text[-110:]}"


def unreadable(source: Source, kind: str, error: BaseException) -> VolumeError:
    """The error for a file that its library cannot open as ``kind``."""
    return VolumeError(f"cannot open {source.uri} as {kind}: {reason(error)}.{again(error)}")


def again(error: BaseException) -> str:
    """What to do about a file that its library cannot read; of one that is forbidden ``reason`` says it."""
    if isinstance(error, PermissionError):
        return ""
    return (
        " Copy it again from its source, for it may be incomplete; if other programs read it, save it there as HDF5, "
        "OME-Zarr or TIFF."
    )


def refuse_inner(source: Source) -> None:
    """Refuse ``path::inner``, by a VolumeError, for a format whose files hold one array."""
    if source.inner is not None:
        raise VolumeError(
            f"{source.uri}: the file holds one array and has no inner part {source.inner!r}; name the file alone."
        )


def is_folder(source: Source) -> bool:
    """Whether the path is a folder; a VolumeError if it is absent, an empty file, or neither of both."""
    path = source.path
    try:
        found = path.stat()
    except FileNotFoundError as error:
        broken = path.is_symlink()
        why = f"a symbolic link to {path.readlink()}, which is absent" if broken else "no such file or folder"
        raise VolumeError(f"cannot open {source.uri}: {why}.") from error
    except OSError as error:
        raise VolumeError(f"cannot open {source.uri}: {reason(error)}.") from error
    if stat.S_ISDIR(found.st_mode):
        return True
    if not stat.S_ISREG(found.st_mode):
        raise VolumeError(f"cannot open {source.uri}: neither a file nor a folder; name a stored volume.")
    if found.st_size == 0:
        raise VolumeError(f"cannot open {source.uri}: the file is empty (0 bytes); copy or write it again.")
    return False


def file_identity(path: Path, name: str | None = None) -> dict[str, object]:
    """Name, size and modification time of a file; they change when its content may have changed."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{name or path.name} is neither a file nor a folder")
    return {"name": name or path.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def folded_identity(name: str, files: Sequence[tuple[str, Path]]) -> dict[str, object]:
    """One identity for many files: their count and a sha256 over the identity of each, in the order given."""
    parts = [file_identity(path, relative) for relative, path in files]
    return {"name": name, "files": len(parts), "sha256": key_of({"files": parts})}


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files below a folder with their relative names, in a fixed order; TensorStore's locks are left out.

    A folder that links lead to again is left out, so that circles end.
    """
    yield from _below(folder, "", set())


def _below(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, Path]]:
    if not _first_visit(folder, seen):
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _below(Path(entry.path), f"{prefix}{entry.name}/", seen)
            elif not entry.name.endswith("__lock"):
                yield prefix + entry.name, Path(entry.path)


def arrays_below(folder: Path, is_array: Callable[[Path], bool]) -> list[str]:
    """Names of the folders of arrays in a folder, relative to it and sorted; none is looked for inside an array."""
    return sorted(str(path.relative_to(folder)) for path in _arrays(folder, is_array, DEEPEST, set()))


def _arrays(folder: Path, is_array: Callable[[Path], bool], depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    if not _first_visit(folder, seen):
        return
    if is_array(folder):
        yield folder
    elif depth > 0:
        for child in folder.iterdir():
            if child.is_dir():
                yield from _arrays(child, is_array, depth - 1, seen)


def _first_visit(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder is not in ``seen`` yet, under whatever name; it is afterwards."""
    found = folder.stat()
    place = (found.st_dev, found.st_ino)
    if place in seen:
        return False
    seen.add(place)
    return True


def json_at(path: Path) -> Any:
    """The JSON value in a metadata file; nothing is waited for and no bomb is read.

    Raises OSError, ValueError or RecursionError if it is no file, too large, or not JSON.
    """
    file_identity(path)  # refuses pipes, at which opening would wait for ever
    with path.open("rb") as stream:
        text = stream.read(LARGEST_JSON_BYTES + 1)
    if len(text) > LARGEST_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {LARGEST_JSON_BYTES} bytes, too large for metadata")
    return json.loads(text)


def require_believable(source: Source, claimed_bytes: int) -> None:
    """Refuse a volume that claims to be vast while next to nothing of it is stored, by a VolumeError."""
    if claimed_bytes <= BELIEVED_BYTES:
        return
    stored = 0
    files = files_below(source.path) if source.path.is_dir() else [("", source.path)]
    for _, path in files:
        stored += path.stat().st_size
        if stored * BELIEVED_RATIO >= claimed_bytes:
            return
    raise VolumeError(
        f"{source.uri}: its metadata promise {float(claimed_bytes):.3g} bytes of voxels, but only {stored} bytes are "
        "stored; the shape is damaged or files are missing, so copy or write it again."
    )
