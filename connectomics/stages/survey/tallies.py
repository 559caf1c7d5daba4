"""What the survey knows of some voxels, and how that is merged: statistics, nonzero boxes, ranges of sections."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from connectomics.core.geometry import Box, vec3
from connectomics.inference.case import Case, Range
from connectomics.inference.normalise import ChannelSummary, IntensityStats
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey.mask import is_inside
from connectomics.volumes.volume import Array


class CaseTally:
    """What is known of some voxels: statistics of each channel, the nonzero box, voxels that are not zero."""

    __slots__ = ("box", "inside", "stats")

    def __init__(self, stats: list[IntensityStats], box: Box | None = None, inside: int = 0) -> None:
        self.stats, self.box, self.inside = stats, box, inside

    @property
    def exact(self) -> bool:
        """Whether statistics are integer sums, which merge in any order."""
        return self.stats[0].exact

    @classmethod
    def empty(cls, channels: int, exact: bool) -> CaseTally:
        """The tally of no voxels; ``exact`` says whether statistics are integer sums."""
        return cls([IntensityStats(0, exact, 0, 0)] * channels)

    @classmethod
    def of(cls, voxels: Array, nonzero: Array, origin: Box) -> CaseTally:
        """The tally of voxels (c, z, y, x), the first of which is that of ``origin``; ``nonzero`` says which are."""
        found = nonzero_box(nonzero[None])
        box = None if found is None else found.shift(origin.start)
        return cls([IntensityStats.of(values) for values in voxels], box, int(np.count_nonzero(nonzero)))

    def add(self, other: CaseTally) -> None:
        """Add what is known of other voxels; of float moments the order decides the last bits."""
        self.stats = [mine + theirs for mine, theirs in zip(self.stats, other.stats, strict=True)]
        self.inside += other.inside
        if other.box is not None:
            self.box = other.box if self.box is None else _hull(self.box, other.box)

    def case(self, region: Box, schemes: Sequence[ChannelNormalisation]) -> Case:
        """The case that these voxels are."""
        box = self.box or region
        found = zip(schemes, self.stats, strict=True)
        summaries = (stats.summary(self.inside if scheme.masked else box.voxels) for scheme, stats in found)
        return Case(region, box, tuple(summaries))


TileTallies = tuple[Box, Iterable[CaseTally]]
"""A box, and the tally of its part of each section (z), valid until the next tile is taken."""


def rows(tiles: Iterable[TileTallies]) -> Iterator[list[CaseTally]]:
    """The tallies of the sections of each row of tiles along z; tiles come in raster order and are added in it."""
    for _, row in itertools.groupby(tiles, key=lambda tile: tile[0].start[0]):
        tallies: list[CaseTally] = []
        for _, others in row:
            if not tallies:
                tallies = list(others)
                continue
            for tally, other in zip(tallies, others, strict=True):
                tally.add(other)
        yield tallies


class SectionExtremes:
    """Number, minimum and maximum of the nonzero voxels of the sections of a box along an axis; 24 bytes a channel."""

    def __init__(self, box: Box, channels: int, axis: int) -> None:
        self._axis, self._first = axis, box.start[axis]
        self._others = tuple(a + 1 for a in range(3) if a != axis)
        self.nonzero = np.zeros((box.shape[axis], channels), np.int64)
        self.low = np.full((box.shape[axis], channels), math.inf)
        self.high = np.full((box.shape[axis], channels), -math.inf)

    def add(self, tile: Array, box: Box) -> None:
        """Add a tile (c, z, y, x) that stands at ``box``."""
        nonzero = tile != 0
        counts = nonzero.sum(self._others).T
        limits = np.finfo(tile.dtype) if tile.dtype.kind == "f" else np.iinfo(tile.dtype)
        low = tile.min(self._others, initial=limits.max, where=nonzero).T
        high = tile.max(self._others, initial=limits.min, where=nonzero).T
        self.merge(counts, low, high, box)

    def merge(self, counts: Array, low: Array, high: Array, box: Box) -> None:
        """Add what is known of the sections of a box: arrays [n, c] as this one's."""
        here = slice(box.start[self._axis] - self._first, box.stop[self._axis] - self._first)
        self.nonzero[here] += counts
        self.low[here] = np.where(counts > 0, np.minimum(self.low[here], low), self.low[here])
        self.high[here] = np.where(counts > 0, np.maximum(self.high[here], high), self.high[here])

    def ranges(
        self, case: Case, schemes: Sequence[ChannelNormalisation], inside: Array | None
    ) -> tuple[tuple[Range, ...], ...]:
        """Limits of each section inside the case's box, by channel; ``inside``: voxels of each in the mask."""
        start, stop = case.box.start[self._axis], case.box.stop[self._axis]
        voxels = case.box.voxels // (stop - start)
        result = []
        for p in range(start, stop):
            counted = voxels if inside is None else int(inside[p])
            found = zip(self.nonzero[p].tolist(), self.low[p].tolist(), self.high[p].tolist(), strict=True)
            plane = [IntensityStats(n, True, 0, 0, minimum=low, maximum=high) for n, low, high in found]
            result.append(
                tuple(
                    _range(stats, summary, counted if scheme.masked else voxels, voxels)
                    for stats, summary, scheme in zip(plane, case.channels, schemes, strict=True)
                )
            )
        return tuple(result)


def _range(stats: IntensityStats, summary: ChannelSummary, inside: int, voxels: int) -> Range:
    """Limits of ``inside`` voxels; what is left out of ``voxels`` is normalised to 0, which the mean is too."""
    low, high = stats.limits(inside)
    return (low, high) if inside == voxels else (min(low, summary.mean), max(high, summary.mean))


def nonzero_box(array: Array) -> Box | None:
    """The smallest box around the voxels of a (c, z, y, x) array that are not zero in every channel, or None."""
    mask = is_inside(array)
    if all(face.any() for face in (mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[..., 0], mask[..., -1])):
        return Box.of_shape(vec3(mask.shape))
    planes = np.asarray(mask.any(axis=0))
    lines = (mask.any(axis=(1, 2)), planes.any(axis=1), planes.any(axis=0))
    if not lines[1].any():
        return None
    spans = [np.flatnonzero(line)[[0, -1]] for line in lines]
    return Box(vec3([a for a, _ in spans]), vec3([b + 1 for _, b in spans]))


def _hull(a: Box, b: Box) -> Box:
    start = [min(p, q) for p, q in zip(a.start, b.start, strict=True)]
    stop = [max(p, q) for p, q in zip(a.stop, b.stop, strict=True)]
    return Box(vec3(start), vec3(stop))
