"""Where the voxels of a mask lie in the volume it belongs to: by voxel size and origin, else by the extents alone.

``assembly`` places a mask; ``RegionOfInterest`` asks which of the mask's voxels decides over one of the volume's.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Vec3
from connectomics.volumes.volume import Nanometres, VolumeInfo

ALIKE = 0.01  # part of a size by which written numbers may be off
SHIFTED = 0.45  # of a voxel, by which a mask may lie beside the volume's voxels
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AxisPlacement:
    """How one axis of a mask lies along that of the volume.

    Parameters
    ----------
    length, cells
        Voxels of the volume and of the mask.
    factor
        Voxels of the volume that one of the mask is long; None where they are spread over all of the volume.
    begin
        Of the mask's first voxel, in voxels of the volume; 0 or less.
    """

    length: int
    cells: int
    factor: int | None = None
    begin: int = 0

    def seen(self, voxels: Indices) -> Indices:
        """The mask's voxels that decide over the volume's; beyond its last one that one does.

        Examples
        --------
        >>> AxisPlacement(10, 3, 4).seen(np.arange(10)).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
        """
        if self.factor is None:
            return voxels * self.cells // self.length
        return np.minimum((voxels - self.begin) // self.factor, self.cells - 1)

    @property
    def spread(self) -> bool:
        """Whether it is the same as if they were spread over all of the volume."""
        voxels = np.arange(self.length)
        return np.array_equal(self.seen(voxels), voxels * self.cells // self.length)


Placement = tuple[AxisPlacement, AxisPlacement, AxisPlacement]


def placed_by_extent(extent: Vec3, mask: VolumeInfo, name: str) -> Placement:
    """Place a mask of which nothing but its extent is known.

    Its extent is the volume's, divided along each axis by a whole number and rounded up or down. Where that number may
    be a power of two, rounded up, as in pyramids, it is taken; else the mask's voxels are spread over the volume.

    Raises
    ------
    VolumeError
        If the extent is another.
    """
    if not all(_is_reduced(m, n) for m, n in zip(mask.extent, extent, strict=True)):
        raise VolumeError(
            f"{name}: the mask has (z, y, x) = {mask.extent} voxels, expected the volume's {extent} or these divided "
            "by a whole number along each axis, rounded up or down; make it of this volume"
        )
    z, y, x = (AxisPlacement(n, m, _halved(n, m)) for n, m in zip(extent, mask.extent, strict=True))
    return z, y, x


def placed(volume: VolumeInfo, mask: VolumeInfo, name: str, *, stated_size: bool = False) -> Placement:
    """Place a mask by voxel size and origin where both volumes state a size, else by its extent.

    Parameters
    ----------
    volume, mask
        The volumes.
    name
        Of the mask, for messages.
    stated_size
        Whether the volume's voxel size was stated in place of its file's; then a mask of its extent is taken as it is.

    Raises
    ------
    VolumeError
        If extent, voxel size and origin of the mask contradict each other, or it does not cover the volume.
    """
    size, own = volume.voxel_size_nm, mask.voxel_size_nm
    same = mask.extent == volume.extent
    if size is None or own is None or (same and stated_size):
        return placed_by_extent(volume.extent, mask, name)

    def lying_at(origin: Nanometres) -> Placement:
        extents, origins = zip(volume.extent, mask.extent, strict=True), (volume.origin_nm, origin)
        z, y, x = (_axis(a, both, size, own, origins=origins, name=name) for a, both in enumerate(extents))
        return z, y, x

    try:
        return lying_at(mask.origin_nm)
    except VolumeError:
        if mask.origin_nm != (0.0, 0.0, 0.0):  # which formats without an origin have, too
            raise
        return lying_at(volume.origin_nm)


def _axis(
    axis: int,
    voxels: tuple[int, int],
    size: Nanometres,
    own: Nanometres,
    *,
    origins: tuple[Nanometres, Nanometres],
    name: str,
) -> AxisPlacement:
    (length, cells), ratio, letter = voxels, own[axis] / size[axis], "zyx"[axis]
    factor = max(1, round(ratio))
    if length == 1 == cells:
        return AxisPlacement(1, 1, 1)
    if abs(ratio - factor) > ALIKE * factor:
        raise VolumeError(
            f"{name}: the mask's voxels are {own[axis]:g} nm along {letter}, the volume's {size[axis]:g} nm; expected "
            "the same, or a whole multiple; correct the voxel size of the mask, or of the volume with "
            "inference.voxel_size_nm"
        )
    starts = f"{origins[1][axis]:g} nm, the volume at {origins[0][axis]:g} nm"
    begin = _begin((origins[1][axis] - origins[0][axis]) / size[axis], factor)
    if begin is None:
        raise VolumeError(
            f"{name}: along {letter} the mask begins at {starts}, so voxels of {own[axis]:g} nm do not cover it; make "
            "the mask of this volume, or save it without an origin if it begins where the volume does"
        )
    if cells not in _counts(length - begin, factor):
        expected = " or ".join(map(str, sorted(_counts(length - begin, factor))))
        raise VolumeError(
            f"{name}: the mask has {cells} voxels of {own[axis]:g} nm along {letter}, the volume {length} of "
            f"{size[axis]:g} nm; expected {expected} of that size; correct the mask's voxel size, make it of this "
            "volume, or save it without a voxel size to have it placed by its extent"
        )
    return AxisPlacement(length, cells, factor, begin)


def _counts(length: int, factor: int) -> set[int]:
    """How many voxels a mask may have along an axis: rounded up or down."""
    return {-(-length // factor), max(1, length // factor)}


def _begin(offset: float, factor: int) -> int | None:
    """Begin of the mask's first voxel; None where that does not cover the volume's first one.

    Some formats state the centre of the first voxel (OME-Zarr, N5), some its corner (precomputed).

    Parameters
    ----------
    offset
        From the volume's origin to the mask's, in voxels of the volume.

    Examples
    --------
    >>> _begin(1.5, 4), _begin(0.0, 4), _begin(-1.0, 2), _begin(4.0, 4)
    (0, 0, -1, None)
    """
    begins = (offset, offset - (factor - 1) / 2)
    covering = [(abs(b - round(b)), round(b)) for b in begins if -factor < round(b) <= 0]
    off, nearest = min(covering, default=(1.0, 0), key=itemgetter(0))  # of equals the corner
    return nearest if off <= SHIFTED else None


def _halved(length: int, cells: int) -> int | None:
    """The power of two by which a length, rounded up, becomes so many cells; None where there is none."""
    factor = 1
    while -(-length // factor) > cells:
        factor *= 2
    return factor if -(-length // factor) == cells else None


def _is_reduced(reduced: int, length: int) -> bool:
    """Whether ``reduced`` is ``length`` divided by some whole number, rounded up or down.

    Examples
    --------
    >>> [n for n in range(1, 8) if _is_reduced(n, 7)]
    [1, 2, 3, 4, 7]
    """
    if reduced > length:
        return False
    return length // (length // reduced) == reduced or -(-length // -(-length // reduced)) == reduced
