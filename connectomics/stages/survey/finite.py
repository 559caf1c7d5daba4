"""Which values the survey takes: finite numbers, and infinities where the normalisation clips. Called by ``survey``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import AxisOrder, Box
from connectomics.models.spec import ChannelNormalisation
from connectomics.volumes.volume import Array


def clipped_channels(schemes: Sequence[ChannelNormalisation]) -> tuple[int, ...]:
    """The channels whose normalisation takes infinities: it clips to constants of the plans and needs no statistics."""
    return tuple(c for c, scheme in enumerate(schemes) if scheme.scheme == "CTNormalization")


def finite(tile: Array, channels: Sequence[int]) -> Array:
    """The tile (c, z, y, x) with large numbers for the infinities of these channels; itself where there are none."""
    if tile.dtype.kind != "f" or not channels or not np.isinf(tile[list(channels)]).any():
        return tile
    largest = min(float(np.finfo(tile.dtype).max), float(np.finfo(np.float32).max))
    result = tile.copy()
    for channel in channels:
        infinite = np.isinf(tile[channel])
        result[channel][infinite] = np.copysign(largest, tile[channel][infinite])
    return result


def check_finite(tile: Array, box: Box, name: str, order: AxisOrder) -> None:
    """Refuse values that no normalisation makes numbers of.

    Parameters
    ----------
    tile
        Part of the volume ``name`` (c, z, y, x), in the axes that ``order`` turned it to.
    box
        Where it stands, in those axes.

    Raises
    ------
    VolumeError
        If a value is infinite or not a number; the message says where, in the volume's own axes.
    """
    if tile.dtype.kind != "f":
        return
    right = np.isfinite(tile)
    if right.all():
        return
    places = np.nonzero(~right.all(axis=0))
    start, stop = ([int(limit(p)) for p in places] for limit in (np.min, np.max))
    bad = Box((start[0], start[1], start[2]), (stop[0] + 1, stop[1] + 1, stop[2] + 1)).shift(box.start)
    bad = order.inverse.turn_box(bad)
    raise VolumeError(
        f"{name}: NaN or infinite values in voxels (z, y, x) {bad.start} to {bad.stop}; nnU-Net cannot normalise them, "
        "replace them (for example by 0) and run again"
    )
