"""numpy's ``.npy`` volumes in C or Fortran order, memory-mapped; pickled objects are refused; for ``opening``."""

from __future__ import annotations

import contextlib
import tokenize
import warnings
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from connectomics.volumes.formats.mapped import MappedArray
from connectomics.volumes.source import READ_ERRORS, Source, refuse_inner, unreadable
from connectomics.volumes.stored import StoredVolume, info_of, layout_of, native_dtype
from connectomics.volumes.watched import WatchedFiles


def open_npy(source: Source) -> StoredVolume:
    """Open an array that ``numpy.save`` wrote for lazy reading.

    Raises
    ------
    VolumeError
        If the file is damaged, cut short, holds objects or has a shape that is no volume's.
    """
    refuse_inner(source)
    try:
        with contextlib.ExitStack() as opened:
            watched = WatchedFiles(source.path)
            stream = opened.enter_context(source.path.open("rb"))
            shape, fortran, dtype = _header(stream)
            native_dtype(source, dtype)  # refuses objects before anything is mapped
            layout = layout_of(source, shape, None)
            array = MappedArray(stream, dtype, shape, stream.tell(), order="F" if fortran else "C")
            info = info_of(source, layout, dtype, array.chunk)
            release = opened.pop_all().close
    except READ_ERRORS as error:
        raise unreadable(source, "npy", error) from error
    return StoredVolume(source, info, layout, fetch=array.fetch, watched=watched, release=release)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran order, and dtype; the stream then stands at the first voxel."""
    version = npy_format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version[0]}.{version[1]}, expected 1.0 or 2.0")
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that Python 2 wrote
        try:
            shape, fortran, dtype = read(stream)
        except (tokenize.TokenError, MemoryError) as error:  # brackets without end, or too deep for Python's parser
            raise ValueError("its header cannot be parsed") from error
    return shape, fortran, dtype
