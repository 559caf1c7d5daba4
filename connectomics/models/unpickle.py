"""Reads a checkpoint and runs nothing it brings: our allow-list first, then torch's restricted unpickler.

Called by ``checkpoint`` alone.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.models.legacy_checkpoint import is_legacy, read_legacy
from connectomics.models.pickle_names import named_globals

_NUMPY_CORES = ("numpy._core", "numpy.core")
_LARGEST_PICKLE_BYTES = 1 << 24  # everything but the weights, which lie beside it
_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    ImportError,
    AssertionError,
    OverflowError,
)


class _PlainDtype:
    """Stands in for a pickled numpy dtype; only plain numbers pass."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(name, str) or not _PLAIN_DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"numpy dtype {name!r} is not a plain number")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Take the byte order, the one part of a plain dtype's state that matters."""
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _ArrayPlaceholder:
    """Stands in for a pickled numpy array; nnU-Net keeps arrays in its training log only."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """The values are not needed."""


def _plain_scalar(dtype: _PlainDtype, data: bytes) -> object:
    """Stands in for numpy's scalar factory; gives a Python number."""
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


_STANDINS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _PlainDtype,
    "numpy.ndarray": _ArrayPlaceholder,
    **{f"{core}.multiarray.scalar": _plain_scalar for core in _NUMPY_CORES},
    **{f"{core}.multiarray._reconstruct": _ArrayPlaceholder for core in _NUMPY_CORES},
}
_ALLOWED = frozenset(
    [
        *_STANDINS,
        "_codecs.encode",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char")),
        *(f"torch.{kind}Storage" for kind in ("Byte", "Bool")),
    ]
)


def _refuse(path: Path, finding: str) -> UnsafeModelError:
    return UnsafeModelError(
        f"{path}: the checkpoint holds more than the plain values and tensors nnU-Net writes ({finding}); "
        "nothing of it was run; if you trust where the file comes from, set model.trust_code=true"
    )


def _check_name(path: Path, name: str) -> None:
    if name not in _ALLOWED:
        raise _refuse(path, f"it asks for '{name}'")


def _check_names(path: Path) -> None:
    """Raise unless the file is a torch zip archive whose pickle names only what is allowed."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream, contextlib.suppress(ValueError, IndexError, KeyError, OverflowError):
            for name in named_globals(stream):
                raise _refuse(path, f"it asks for '{name}'")
        raise ModelError(
            f"{path}: the file is damaged, cut short or not a PyTorch checkpoint ({path.stat().st_size} "
            "bytes, no zip archive); copy it again and compare its sha256 with the source's"
        )
    with zipfile.ZipFile(path) as archive:
        pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
        for entry in pickles:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _LARGEST_PICKLE_BYTES:
                raise ModelError(
                    f"{path}: its {entry.filename:.80} is packed or takes {entry.file_size} bytes, expected at most "
                    f"{_LARGEST_PICKLE_BYTES} as they are; it is not a checkpoint written by torch.save"
                )
            opened: Any = archive.open(entry)
            with io.BufferedReader(opened) as stream:  # instructions take a few bytes each
                for name in named_globals(stream):
                    _check_name(path, name)
    if len(pickles) != 1:
        raise ModelError(
            f"{path}: the zip archive holds {len(pickles)} data.pkl, expected one; it is not a checkpoint "
            "written by torch.save"
        )


def _damaged(path: Path, error: Exception) -> ModelError:
    finding = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"{path}: the checkpoint is damaged or incomplete ({finding[0][:160]}); copy it again and compare "
        "its sha256 with the source's"
    )


def read_checkpoint(path: Path, *, trust_code: bool = False) -> dict[str, Any]:
    """The top-level mapping of a checkpoint, tensors memory-mapped on the CPU, or read where torch before 1.6 wrote it.

    Numpy scalars come back as Python numbers, numpy arrays (nnU-Net has them in its training log) as
    placeholders.

    Parameters
    ----------
    path
        A file written by ``torch.save``.
    trust_code
        Unpickle without restriction: whatever code the file brings runs.

    Raises
    ------
    UnsafeModelError
        If the file asks for anything but plain values and tensors; nothing of it has run.
    ModelError
        If the file cannot be read, is damaged, or holds something other than a mapping.
    """
    try:
        if trust_code:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            content = _read_restricted(path)
    except OSError as error:
        raise ModelError(
            f"{path}: the checkpoint cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    except pickle.UnpicklingError as error:
        if trust_code:
            raise _damaged(path, error) from error
        reason = re.search(r"WeightsUnpickler error:\s*(.{1,160})", str(error))
        raise _refuse(path, reason[1].strip() if reason else "PyTorch's restricted reader refuses it") from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: the file holds a {type(content).__name__}, expected the mapping that nnU-Net's trainer "
            "saves; give the checkpoint of a nnU-Net v2 training"
        )
    return content


def _read_restricted(path: Path) -> Any:
    standins: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    standins = [(function, name) for name, function in _STANDINS.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(standins):
        warnings.simplefilter("ignore")  # about the pickle's protocol and odd strings in garbled ones
        if is_legacy(path):
            return read_legacy(path, functools.partial(_check_name, path))
        _check_names(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
