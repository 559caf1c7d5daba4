"""The other files that an HDF5 dataset is read from: parts of virtual datasets, external links, raw storage.

HDF5 itself reads what is absent as zeros; here it is an error. Called by ``formats.hdf5``.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.codecs.hdf5_filters import require_filters
from connectomics.volumes.source import Source, some_of

MOST_NUMBERED = 1 << 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems say that know no locks, such as NFS without its lock service."""
NamedFile = tuple[str, Path]
"""Name as the file states it, and where it is."""


def opened_file(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; one that somebody is writing is refused where the file system knows locks."""
    return h5py.File(path, "r", locking="best-effort" if _knows_locks(path) else False)


def _knows_locks(path: Path) -> bool:
    """Whether the file system of a file knows locks; asked first, for HDF5 refuses to open a file in two ways."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    return True


def parts_of(source: Source, dataset: Any) -> list[NamedFile]:
    """All other files that a dataset is read from, each once.

    Raises
    ------
    VolumeError
        If one is absent, lacks what is read from it or is shorter; if virtual datasets are made of virtual ones; or if
        raw storage lies outside the folder of the file that names it.
    """
    path = Path(dataset.file.filename)
    parts: dict[str, Path] = {} if path == source.path else {_relative(path, source.path.parent): path}
    parts |= _raw_storage(source, dataset, path)
    if dataset.is_virtual:
        parts |= _virtual(source, dataset, path)
    return list(parts.items())


def _raw_storage(source: Source, dataset: Any, path: Path) -> dict[str, Path]:
    """Files that hold a dataset's voxels as plain numbers."""
    found: dict[str, Path] = {}
    folder, stored = path.parent, dataset.external or ()
    if len(stored) > 1:
        raise VolumeError(
            f"{source.uri}: dataset {dataset.name} keeps its voxels in {len(stored)} files without headers, expected "
            "one; copy the voxels into a dataset of their own."
        )
    for name, offset, _ in stored:
        part = folder / name
        if not part.resolve().is_relative_to(folder.resolve()):
            raise VolumeError(
                f"{source.uri}: dataset {dataset.name} keeps its voxels in {name}, outside the folder of {path.name}; "
                "files are read from that folder only, so copy the voxels into a dataset of their own."
            )
        _require_file(source, dataset, name, part)
        expected, size = offset + dataset.size * dataset.dtype.itemsize, part.stat().st_size
        if size < expected:
            raise VolumeError(
                f"{source.uri}: {name}, which holds the voxels of dataset {dataset.name}, has {size} bytes, expected "
                f"{expected}; it was cut short, so copy it again."
            )
        found[name] = part
    return found


def _virtual(source: Source, dataset: Any, path: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for mapped in dataset.virtual_sources():
        for name in [mapped.file_name] if "%b" not in mapped.file_name else _numbered(source, mapped.file_name, path):
            part = path if name == "." else _located(name, path)
            if name != ".":
                _require_file(source, dataset, name, part)
                found[name] = part
            _check(source, dataset, mapped, part)
    return found


def _check(source: Source, dataset: Any, mapped: Any, part: Path) -> None:
    """Refuse a part that is absent, is a virtual dataset or in raw storage, or lacks voxels that are read from it."""
    same = part == Path(dataset.file.filename)
    with contextlib.nullcontext(dataset.file) if same else opened_file(part) as file:
        for name in [mapped.dset_name] if "%b" not in mapped.dset_name else []:
            node = file.get(name)
            if not isinstance(node, h5py.Dataset):
                raise VolumeError(
                    f"{source.uri}: dataset {dataset.name} is made of {name!r} in {part.name}, which is absent there; "
                    "copy or write that file again."
                )
            if node.external:
                raise VolumeError(
                    f"{source.uri}: dataset {dataset.name} is made of {node.name} in {part.name}, whose voxels are in "
                    "a file without header; copy the voxels into a dataset of their own."
                )
            if node.is_virtual:
                raise VolumeError(
                    f"{source.uri}: dataset {dataset.name} is made of parts that are virtual themselves, which may "
                    "lead in a circle; copy the voxels into a dataset of their own."
                )
            require_filters(source, node)
            _require_extent(f"{source.uri}: dataset {dataset.name}", mapped, node, part)


def _require_extent(dataset: str, mapped: Any, node: Any, part: Path) -> None:
    if any(h5py.h5s.UNLIMITED in space.get_simple_extent_dims(True) for space in (mapped.vspace, mapped.src_space)):
        return
    if mapped.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        wanted: tuple[int, ...] = (mapped.vspace.get_select_npoints(),)
        short = wanted[0] != node.size
    else:
        _, last = mapped.src_space.get_select_bounds()
        wanted = tuple(end + 1 for end in last)
        short = len(wanted) != node.ndim or any(n > length for n, length in zip(wanted, node.shape, strict=True))
    if short:
        raise VolumeError(
            f"{dataset} takes {' × '.join(map(str, wanted))} voxels from {part.name}, whose "
            f"{node.name} has shape {node.shape}; the part was cut short or replaced, so write it again."
        )


def _numbered(source: Source, pattern: str, path: Path) -> Iterator[str]:
    """Names of the parts that a pattern counts with ``%b`` from 0; a gap is an error that names the first absent."""
    absent = next(n for n in range(MOST_NUMBERED) if not _located(pattern.replace("%b", str(n)), path).is_file())
    place = _located(pattern, path)
    number = len(place.name.partition("%b")[0]), len(place.name.partition("%b")[2])
    later = [
        found.name
        for found in place.parent.glob(place.name.replace("%b", "*"))
        if (text := found.name[number[0] : len(found.name) - number[1]]).isdecimal() and int(text) > absent
    ]
    if later or absent == 0:
        name = pattern.replace("%b", str(absent))
        raise VolumeError(
            f"{source.uri}: is made of other files, of which {name} is absent"
            f"{f', while there are {some_of(sorted(later))}' if later else ''}; copy it too."
        )
    return (pattern.replace("%b", str(n)) for n in range(absent))


def _located(name: str, path: Path) -> Path:
    """Where HDF5 looks for a part: beside the file that names it, else from the working folder."""
    beside = path.parent / name
    return beside if beside.is_file() or not Path(name).is_file() else Path(name)


def _require_file(source: Source, dataset: Any, name: str, part: Path) -> None:
    if not part.is_file():
        raise VolumeError(
            f"{source.uri}: dataset {dataset.name} is made of other files, of which {name} is absent; HDF5 would read "
            "zeros in its place. Copy it too, beside the file as it is named there."
        )


def _relative(path: Path, folder: Path) -> str:
    """The name of a file from a folder on, without where that folder is."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def require_links(source: Source, file: Any, wanted: str) -> None:
    """Refuse a name that leads over a link to a file that is absent, or to nothing in it, by a VolumeError."""
    at = ""
    for word in [word for word in wanted.split("/") if word]:
        at = f"{at}/{word}"
        try:
            link = file.get(at, getlink=True) if file.get(at) is None else None
        except (KeyError, OSError):
            return  # nothing of that name
        if isinstance(link, h5py.ExternalLink):
            path = Path(file.filename).parent / link.filename
            why = f"{link.path} is absent in it" if path.is_file() else "that file is absent"
            raise VolumeError(
                f"{source.uri}: {at} is a link to {link.filename}, but {why}; copy or write that file again."
            )
        if isinstance(link, h5py.SoftLink):
            raise VolumeError(f"{source.uri}: {at} is a link to {link.path}, which is absent; name another dataset.")
