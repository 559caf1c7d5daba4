"""Two volumes on disk become one ``Contingency``, piece by piece; their formats, types and chunks may differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from connectomics.core.errors import ResourceError, VolumeError
from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.evaluate.contingency import Contingency, Tally
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

PIECE: Vec3 = (16, 1024, 1024)  # voxels compared at once, about
LARGEST_PIECE = 1 << 26  # voxels
Within = Callable[[Box], tuple[Box, Array | None]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prediction and what it is held against.

    Parameters
    ----------
    name
        In the scores.
    prediction, truth
        Volumes of labels or ids, of one channel and one extent.
    ignore
        A volume of that extent; voxels that are not 0 in it are not counted.
    within
        Gives the part of a box that is counted, and which of its voxels (z, y, x) are, None for all; None counts all.
    """

    name: str
    prediction: str
    truth: str
    ignore: str | None = None
    within: Within | None = None


def compare(job: Comparison, block_shape: Vec3 | None = None, most_pairs: int | None = None) -> Contingency:
    """Count the pairs of ids of two volumes, read piece by piece.

    Parameters
    ----------
    job
        The volumes.
    block_shape
        (z, y, x) of a piece; None: about 16 million voxels, in whole chunks. The result does not depend on it.
    most_pairs
        How many pairs of ids memory holds; None for any number.

    Raises
    ------
    VolumeError
        If one cannot be read, their extents differ, one has several channels, or a value is negative or not whole.
    ResourceError
        If there are more pairs.
    """
    with ExitStack() as opened:

        def opening(uri: str) -> VolumeReader:
            return opened.enter_context(closing(open_volume(uri)))

        given, true = opening(job.prediction), opening(job.truth)
        mask = opening(job.ignore) if job.ignore is not None else None
        _require_extent(job.truth, "truth", true.info, given.info)
        if mask is not None:
            _require_extent(job.ignore or "", "mask of what to ignore", mask.info, given.info)
        total = Tally()
        for block in BlockGrid(true.info.extent, block_shape or _piece(given.info, true.info)):
            box, flags = (block.core, None) if job.within is None else job.within(block.core)
            if box.voxels:
                counted = None if flags is None else flags[None]
                if mask is not None:
                    counted = (mask.read(box) == 0) & (True if counted is None else counted)
                total.add(Contingency.from_arrays(given.read(box), true.read(box), counted))
                if most_pairs is not None and total.pairs > most_pairs and total.total().counts.size > most_pairs:
                    raise ResourceError(
                        f"{job.prediction}: more than {most_pairs} pairs of its ids and those of {job.truth} share "
                        "voxels, which the memory budget does not hold; raise system.memory_budget_gb, or drop small "
                        "objects first with connectomics decode and the step filters"
                    )
        return total.total()


def _require_extent(name: str, role: str, info: VolumeInfo, prediction: VolumeInfo) -> None:
    if prediction.channels != 1:
        raise VolumeError(
            f"the prediction that {name} is for has shape (c, z, y, x) {prediction.shape}; expected one "
            "channel of labels"
        )
    if info.shape != prediction.shape:
        raise VolumeError(
            f"{name}: the {role} has shape (c, z, y, x) {info.shape}, the prediction {prediction.shape}; state the "
            f"{role} of this image"
        )


def _piece(given: VolumeInfo, true: VolumeInfo) -> Vec3:
    """About ``PIECE``, in whole chunks of the coarser of both where that is not too large."""
    chunk = [max(a, b) for a, b in zip(given.chunk_shape, true.chunk_shape, strict=True)]
    whole = [c * max(1, p // c) for c, p in zip(chunk, PIECE, strict=True)]
    piece = whole if math.prod(whole) <= LARGEST_PIECE else PIECE
    return vec3([min(n, p) for n, p in zip(true.extent, piece, strict=True)])
