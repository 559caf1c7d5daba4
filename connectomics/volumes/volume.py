"""What a volume is to the program: VolumeInfo and the reader's contract.

Formats implement these; ``connectomics.volumes.opening`` picks the format. Inside the program axes are (c, z, y, x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import Box, Vec3

Array = npt.NDArray[Any]
Nanometres = tuple[float, float, float]
Spacing = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """Shape, dtype and physical frame of a volume.

    Parameters
    ----------
    shape
        (c, z, y, x) in voxels; single-channel volumes have c = 1.
    dtype
        Element type.
    chunk_shape
        (z, y, x) of the storage unit that is cheapest to read at once.
    voxel_size_nm
        (z, y, x) in nanometres, or None when nothing states it.
    origin_nm
        Position of the first voxel's centre (z, y, x) in nanometres.
    spacing
        (z, y, x) as nnU-Net's readers would state it, without a unit: that of the plan the volume was prepared for.
        None where the file states none. Never derived from ``voxel_size_nm``, nor the other way round.
    found
        Where a fact was found, such as ``{"voxel size": "attribute 'resolution' of /raw"}``; it tells no volumes apart.
    notes
        What of the files' names may be a mistake, each in a sentence; a run says them at its start.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    chunk_shape: Vec3
    voxel_size_nm: Nanometres | None = None
    origin_nm: Nanometres = (0.0, 0.0, 0.0)
    spacing: Spacing | None = None
    found: Mapping[str, str] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if len(self.shape) != 4 or min(self.shape) < 1:
            raise ValueError(f"a volume has four axes (c, z, y, x) of at least one voxel, got shape {self.shape}")
        if len(self.chunk_shape) != 3 or min(self.chunk_shape) < 1:
            raise ValueError(f"a chunk has three axes (z, y, x) of at least one voxel, got {self.chunk_shape}")
        if self.voxel_size_nm is not None and not all(np.isfinite(v) and v > 0 for v in self.voxel_size_nm):
            raise ValueError(f"voxel size must be positive nanometres (z, y, x), got {self.voxel_size_nm}")
        if self.spacing is not None and not all(np.isfinite(v) and v > 0 for v in self.spacing):
            raise ValueError(f"spacing must be three positive numbers (z, y, x), got {self.spacing}")

    @property
    def extent(self) -> Vec3:
        """(z, y, x) in voxels."""
        return self.shape[1:]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0]


class VolumeReader(Protocol):
    """Lazy access to one volume; safe to call from several threads.

    ``identity`` is a JSON-able mapping that changes when the input may have changed (file names, sizes,
    modification times), cheap to get and free of absolute paths; it goes into the result key.
    """

    @property
    def info(self) -> VolumeInfo: ...

    @property
    def identity(self) -> dict[str, object]: ...

    def read(self, box: Box) -> Array:
        """Voxels of ``box`` (inside the volume) as a new (c, z, y, x) array of ``info.dtype``.

        Raises
        ------
        VolumeError
            If the storage cannot be read; the message names the file and the box.
        """
        ...

    def close(self) -> None: ...
