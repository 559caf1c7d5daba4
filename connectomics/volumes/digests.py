"""sha256 of the files of a finished output, kept in the form that ``sha256sum --check`` reads beside the output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from connectomics.core.files import make_folder, replacing
from connectomics.core.fingerprint import sha256_of_file
from connectomics.volumes.source import files_below

SUFFIX = ".sha256"


def write_digests(output: Path, record: Path, name: str = "") -> None:
    """Keep the sha256 of a file, or of every file in a folder, in ``record``; its lines appear whole or not at all.

    ``name`` is that of the output where it is called otherwise now.
    """
    make_folder(record.parent)
    with replacing(record) as temporary, temporary.open("w") as stream:
        stream.writelines(digest_lines(output, name))


def digest_lines(output: Path, name: str = "") -> Iterator[str]:
    """Lines of such a record: the sha256 of a file, or of every file in a folder, and its path."""
    return (f"{sha256_of_file(path)}  {name or output.name}{below}\n" for below, path in _files(output))


def digests(record: Path) -> Iterator[tuple[str, str]]:
    """Each file's path, from the folder of the output on, and its sha256."""
    with record.open() as stream:
        for line in stream:
            checksum, _, name = line.rstrip("\n").partition("  ")
            yield name, checksum


def is_intact(folder: Path, name: str, checksum: str) -> bool:
    """Whether a file below ``folder`` is there, can be read and has this sha256."""
    try:
        return sha256_of_file(folder / name) == checksum
    except OSError:
        return False


def _files(output: Path) -> Iterator[tuple[str, Path]]:
    if output.is_dir():
        yield from ((f"/{name}", path) for name, path in files_below(output))
    else:
        yield "", output
