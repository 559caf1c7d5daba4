"""A folder of compiled networks, kept between runs; only what this user wrote is ever taken out of it.

A file is named by what it was compiled from and begins with a digest of its content. It appears whole (temporary,
rename), so processes may share the folder; what is damaged counts as absent and is compiled again.
"""

from __future__ import annotations

import atexit
import functools
import logging
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from connectomics.core.fingerprint import key_of, sha256_of_bytes

log = logging.getLogger(__name__)
SUFFIX = ".compiled"
DIGEST_BYTES = 64
LARGEST_BYTES = 4 << 30  # of all files together; those that were not used for the longest time go first


class MappedArtefact:
    """A kept file in memory: its pages are the file's own, and can be given back while its content is still held."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self.content = memoryview(mapped)[DIGEST_BYTES:]

    def give_back(self) -> None:
        """Free the memory; what is looked at later is read from the file again."""
        if sys.platform != "win32":
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Artefacts:
    """Compiled networks by the facts they were made from, in a folder that is made when needed; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, facts: Mapping[str, object]) -> MappedArtefact | None:
        """What was kept for these facts; None where nothing is, it is damaged, or others may have written it."""
        folder = self._usable()
        if folder is None:
            return None
        path = folder / (key_of(facts) + SUFFIX)
        try:
            with path.open("rb") as file:
                if not _ours(os.fstat(file.fileno())):
                    log.warning("%s: others may write to it, so it is not used", path)
                    return None
                stated = file.read(DIGEST_BYTES)
                kept = MappedArtefact(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if stated else None
            os.utime(path)
        except OSError:
            return None
        if kept is None or sha256_of_bytes(kept.content).encode() != stated:
            log.warning("%s: is damaged and is made again", path)
            return None
        return kept

    def put(self, facts: Mapping[str, object], content: bytes) -> None:
        """Keep something; a disk that refuses is no error, for it can be made again."""
        folder = self._usable()
        if folder is None:
            return
        path = folder / (key_of(facts) + SUFFIX)
        try:
            descriptor, temporary = tempfile.mkstemp(suffix=".partial", dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(sha256_of_bytes(content).encode())
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            _trim(folder)
        except OSError as error:
            log.info("%s: compiled networks are not kept (%s)", folder, error)

    def compiler_folder(self) -> Path:
        """A folder for a compiler's own files: within this one, or a private one that is gone with the process."""
        folder = self._usable()
        if folder is None:
            return _vanishing()
        own = folder / "generated"
        own.mkdir(mode=0o700, exist_ok=True)
        return own

    def _usable(self) -> Path | None:
        """The folder, if it can be made and is this user's alone."""
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _ours(self._folder.stat()):
                return self._folder
            log.warning(
                "%s: others may write to it, so no compiled network is kept there; make it yours alone (chmod 700), or "
                "set system.cache_dir to a folder that is",
                self._folder,
            )
        except OSError as error:
            log.info("%s: compiled networks are not kept (%s)", self._folder, error)
        return None


@functools.cache
def _vanishing() -> Path:
    folder = tempfile.mkdtemp(prefix="connectomics_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _ours(found: os.stat_result) -> bool:
    """Whether this user owns it and nobody else may write to it; where there are no such owners, yes."""
    if os.name != "posix":
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _trim(folder: Path) -> None:
    """Remove what was used longest ago until the rest is small enough."""
    files = sorted(((p.stat(), p) for p in folder.glob("*" + SUFFIX)), key=lambda each: each[0].st_mtime, reverse=True)
    total = 0
    for found, path in files:
        total += found.st_size
        if total > LARGEST_BYTES:
            path.unlink(missing_ok=True)
