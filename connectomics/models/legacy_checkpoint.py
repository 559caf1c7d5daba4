"""Reads checkpoints in torch's format before 1.6: pickles one after the other, then weights. Called by ``unpickle``.

The names that the pickles ask for are checked first, then torch's restricted unpickler reads them, and the storages
may not be larger than the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch._weights_only_unpickler import Unpickler

from connectomics.models.pickle_names import BoundedStream, named_globals

_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the first pickle, a number of 10 bytes
_PROTOCOL = 1001
_PICKLES = 5  # magic number, protocol, system, content, names of the storages
_LARGEST_PICKLE_BYTES = 1 << 24


def is_legacy(path: Path) -> bool:
    """Whether a file begins as torch.save began it before 1.6."""
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read_legacy(path: Path, check: Callable[[str], None]) -> Any:
    """What such a file holds, its tensors in memory.

    Parameters
    ----------
    path
        The file.
    check
        Raises for the name of a function or class that is not allowed; it sees all before anything is unpickled.

    Raises
    ------
    pickle.UnpicklingError
        If torch's restricted unpickler refuses something.
    ValueError, EOFError, RuntimeError
        If the file is damaged, or states more than it holds.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        for _ in range(_PICKLES):
            for name in named_globals(BoundedStream(stream, _LARGEST_PICKLE_BYTES)):
                check(name)
        stream.seek(0)
        storages = _Storages(size)
        _, protocol, system, content, names = (_unpickled(stream, storages) for _ in range(_PICKLES))
        if protocol != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError("the byte order or the version of its format is not that of torch.save")
        storages.fill(stream, names)
    return content


def _unpickled(stream: IO[bytes], storages: _Storages) -> Any:
    unpickler = Unpickler(BoundedStream(stream, _LARGEST_PICKLE_BYTES), encoding="utf-8")
    unpickler.persistent_load = storages.of  # type: ignore[method-assign]
    return unpickler.load()  # type: ignore[no-untyped-call]


class _Storages:
    """The storages that a pickle names, together not larger than its file."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._by_name: dict[str, Any] = {}

    def of(self, stated: tuple[Any, ...]) -> Any:
        """The storage of a persistent id ("storage", type, name, place, elements, view); its bytes are read later."""
        if len(stated) != 6 or stated[0] != "storage" or stated[5] is not None:
            raise pickle.UnpicklingError(f"unknown persistent id {stated!r:.60}")
        _, kind, name, _, count, _ = stated
        if not isinstance(name, str) or not isinstance(count, int) or not isinstance(kind.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {stated!r:.60}")
        if name not in self._by_name:
            self._left -= count * kind.dtype.itemsize
            if count < 0 or self._left < 0:
                raise ValueError("its storages are larger than the file")
            plain = torch.empty(count * kind.dtype.itemsize, dtype=torch.uint8).untyped_storage()
            self._by_name[name] = torch.storage.TypedStorage(wrap_storage=plain, dtype=kind.dtype, _internal=True)  # type: ignore[no-untyped-call]
        return self._by_name[name]

    def fill(self, stream: IO[bytes], names: object) -> None:
        """Read the storages, each behind its number of elements, in the order of ``names``."""
        if not isinstance(names, list) or sorted(map(str, names)) != sorted(self._by_name):
            raise ValueError("its list of storages is not that of its tensors")
        for name in names:
            storage = self._by_name[name]
            voxels = torch.empty(0, dtype=torch.uint8).set_(storage.untyped()).numpy()
            count = int.from_bytes(stream.read(8), "little")
            if count * storage.dtype.itemsize != voxels.nbytes or stream.readinto(voxels) != voxels.nbytes:  # type: ignore[attr-defined]
                raise EOFError("it ends before its weights do")
