"""What people hand to ``InferenceManager.predict``, made a volume: lists, arrays of any library, volumes and paths."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.in_memory import ArrayVolume
from connectomics.volumes.opened import OpenedVolume
from connectomics.volumes.opening import open_channels
from connectomics.volumes.source import READ_ERRORS, reason
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

AXES = {2: "yx", 3: "zyx", 4: "czyx"}
EXPECTED = "numbers with axes (c, z, y, x), (z, y, x) or (y, x)"


@runtime_checkable
class LazyArray(Protocol):
    """An array that is read where it is indexed: of dask, zarr, h5py, TensorStore, xarray."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: Any) -> Any: ...


@runtime_checkable
class _Chunked(Protocol):
    chunks: Any


@runtime_checkable
class _Named(Protocol):
    dims: Any


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An image as a volume.

    Parameters
    ----------
    volume
        It.
    dimensions
        How many axes it was given with: 2, 3 or 4.
    owned
        Whether it was opened here, so that it is to be closed here.
    """

    volume: VolumeReader
    dimensions: int
    owned: bool = False

    def close(self) -> None:
        """Close what was opened here."""
        if self.owned:
            self.volume.close()


def image_of(
    given: Any,
    what: str = "the image",
    *,
    opening: Callable[[Sequence[str | os.PathLike[str]]], VolumeReader] = open_channels,
) -> GivenImage:
    """What somebody gave, as a volume; nothing is read of what is lazy.

    Parameters
    ----------
    given
        Real numbers with axes (c, z, y, x), (z, y, x) for one channel, or (y, x): an array, a tensor on any device, a
        list of lists, a lazy array; or a volume that ``open_volume`` gave, a path, or a list of paths, one a channel.
    what
        It is, for messages.
    opening
        Opens paths, one a channel, so that what the configuration says of files holds for them.

    Raises
    ------
    VolumeError
        If it is none of these, or has another number of axes.
    """
    if isinstance(given, OpenedVolume | ArrayVolume):
        return GivenImage(given, 4)
    if isinstance(given, str | os.PathLike):
        return GivenImage(opening([given]), 4, owned=True)
    if isinstance(given, list | tuple) and given and all(isinstance(part, str | os.PathLike) for part in given):
        return GivenImage(opening(given), 4, owned=True)
    if isinstance(given, LazyArray) and not isinstance(given, np.ndarray | np.generic | torch.Tensor):
        volume = _LazyVolume(given, what)
        return GivenImage(volume, volume.dimensions)
    array = _array(given, what)
    shape = _shape(array.shape, array.dtype, what)
    return GivenImage(ArrayVolume(array.reshape(shape)), array.ndim)


def _shape(shape: Sequence[Any], dtype: object, what: str) -> tuple[int, ...]:
    """A shape as (c, z, y, x)."""
    usable = len(shape) in AXES and all(isinstance(n, int | np.integer) and n > 0 for n in shape)
    real = isinstance(dtype, np.dtype) and dtype.kind in "uifb" and dtype.itemsize <= 8
    if not usable or not real:
        raise VolumeError(f"{what} has shape {tuple(shape)!s:.80} and dtype {dtype!s:.40}; expected {EXPECTED}")
    return ((1,) * (4 - len(shape))) + tuple(int(n) for n in shape)


def _array(given: Any, what: str) -> Array:
    """An array in memory, of anything that numpy takes for one."""
    try:
        if isinstance(given, torch.Tensor):
            return _of_tensor(given)
        if isinstance(given, list | tuple):
            given = [_array(part, what) if not isinstance(part, int | float) else part for part in given]
        array = np.asarray(given)
    except (*READ_ERRORS, NotImplementedError) as error:
        raise VolumeError(f"{what} cannot be read as an array: {reason(error)}; expected {EXPECTED}") from error
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise VolumeError(f"{what} is masked, and masked voxels have no intensity; give image.filled(0)")
    return array


def _of_tensor(tensor: torch.Tensor) -> Array:
    plain = tensor.detach()
    if plain.dtype == torch.bfloat16:  # which numpy does not know
        plain = plain.float()
    array: Array = plain.cpu().resolve_neg().numpy()
    return array


class _LazyVolume:
    """A VolumeReader over a lazy array, which is asked for the voxels of each box."""

    def __init__(self, array: LazyArray, what: str) -> None:
        self._array, self._what = array, what
        self.identity: dict[str, object] = {}
        stored = tuple(array.shape)
        shape = _shape(stored, self._dtype(), what)
        self.dimensions = len(stored)
        self._require_order()
        found = self._dtype()
        dtype = np.dtype(np.uint8) if found.kind == "b" else found.newbyteorder("=")
        c, z, y, x = shape
        self.info = VolumeInfo((c, z, y, x), dtype, self._chunk(vec3([z, y, x])))

    def _dtype(self) -> np.dtype[Any]:
        try:
            found: np.dtype[Any] = np.dtype(self._array.dtype)
        except TypeError:  # TensorStore's types are its own
            found = np.asarray(self._array[(slice(0, 1),) * len(self._array.shape)]).dtype
        return found

    def _require_order(self) -> None:
        """Refuse named axes in another order, as xarray has them."""
        if not isinstance(self._array, _Named):
            return
        names = [str(name).lower() for name in self._array.dims]
        usual = AXES[len(names)]
        if set(names) <= set("czyx") and names != list(usual):
            raise VolumeError(
                f"{self._what} has the axes {', '.join(names)}, expected {', '.join(usual)}; give "
                f"image.transpose({', '.join(map(repr, usual))})"
            )

    def _chunk(self, extent: Vec3) -> Vec3:
        """What is cheapest to read at once: the array's own chunks, else a section."""
        stored = self._array.chunks if isinstance(self._array, _Chunked) else None
        try:
            lengths = [int(max(n)) if isinstance(n, tuple) else int(n) for n in stored or ()]
        except (TypeError, ValueError):
            lengths = []
        if len(lengths) != self.dimensions:
            return (1, extent[1], extent[2])
        padded = [1, 1, *lengths][-3:]
        return vec3([max(1, min(n, whole)) for n, whole in zip(padded, extent, strict=True)])

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` as a new (c, z, y, x) array; see ``VolumeReader``."""
        index = (slice(None), *box.slices)[4 - self.dimensions :]
        try:
            block = np.asarray(self._array[index])
            shape = (self.info.channels, *box.shape)
            if block.size != math.prod(shape):
                raise ValueError(f"gave shape {block.shape}, expected {shape}")
            return np.array(block.reshape(shape), dtype=self.info.dtype, order="C")
        except (*READ_ERRORS, NotImplementedError) as error:
            raise VolumeError(f"cannot read {self._what}, voxels {box.start} to {box.stop}: {reason(error)}") from error

    def close(self) -> None:
        """Nothing is held."""
