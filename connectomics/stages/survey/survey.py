"""The survey: one streaming pass that gives every case its nonzero box and exact statistics.

Tiles depend on the input's own chunks only, never on blocks or workers, and merge in raster order.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.core.files import replacing
from connectomics.core.geometry import AxisOrder, BlockGrid, Box, Vec3, vec3
from connectomics.execution.stage import Workspace
from connectomics.inference.case import Case, Range, ReadBox
from connectomics.inference.normalise import ChannelSummary, IntensityStats, check_intensities, is_exact
from connectomics.inference.section_cases import SectionCases
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey.finite import check_finite, clipped_channels, finite
from connectomics.stages.survey.mask import is_inside, make_mask, sections_of
from connectomics.volumes.reoriented import Orientation, ReorientedVolume
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

TILE_VOXELS = 1 << 23
STATISTICS_BYTES = 48 << 20  # float64 and index copies of the values that are summed at once
TALLY_BYTES = 512  # of a section whose tiles are being read, and as much for each of its channels
AS_THEY_ARE = AxisOrder()


def tile_shape(info: VolumeInfo) -> Vec3:
    """Shape (z, y, x) of the pieces the survey reads: whole input chunks, about 8 million voxels.

    Examples
    --------
    >>> tile_shape(VolumeInfo((1, 100, 4096, 4096), np.dtype(np.uint8), (1, 4096, 4096)))
    (1, 2048, 4096)
    """
    shape = [min(c, n) for c, n in zip(info.chunk_shape, info.extent, strict=True)]
    for axis in (2, 1, 0):
        while shape[axis] < info.extent[axis] and math.prod(shape) * 2 <= TILE_VOXELS:
            shape[axis] = min(info.extent[axis], shape[axis] * 2)
    for axis in (0, 1, 2):
        excess = math.prod(shape) / TILE_VOXELS
        if excess > 1:
            shape[axis] = max(1, int(shape[axis] / excess))
    return vec3(shape)


class _CaseTally:
    """What is known of some voxels: statistics of each channel, the nonzero box, voxels inside the mask."""

    def __init__(self, channels: int, exact: bool) -> None:
        self.stats = [IntensityStats(0, exact, 0, 0)] * channels
        self.box: Box | None = None
        self.inside = 0

    def add_tile(self, tile: Array, mask: Array, origin: Box) -> None:
        """Add a part (c, z, y, x) of a section, whose first voxel is that of ``origin``."""
        found = nonzero_box(mask[None])
        box = None if found is None else found.shift(origin.start)
        self._merge([IntensityStats.of(values) for values in tile], box, int(np.count_nonzero(mask)))

    def add(self, other: _CaseTally) -> None:
        """Add what is known of other voxels."""
        self._merge(other.stats, other.box, other.inside)

    def _merge(self, stats: list[IntensityStats], box: Box | None, inside: int) -> None:
        self.stats = [mine + theirs for mine, theirs in zip(self.stats, stats, strict=True)]
        self.inside += inside
        if box is not None:
            self.box = box if self.box is None else _hull(self.box, box)

    def case(self, region: Box, schemes: Sequence[ChannelNormalisation]) -> Case:
        """The case that these voxels are."""
        box = self.box or region
        found = zip(schemes, self.stats, strict=True)
        summaries = (stats.summary(self.inside if scheme.masked else box.voxels) for scheme, stats in found)
        return Case(region, box, tuple(summaries))


class _SectionExtremes:
    """Number, minimum and maximum of the nonzero voxels of each section along one axis; 24 bytes for each channel."""

    def __init__(self, info: VolumeInfo, axis: int) -> None:
        extent, channels = info.extent[axis], info.channels
        self._axis = axis
        self._others = tuple(a + 1 for a in range(3) if a != axis)
        self._nonzero = np.zeros((extent, channels), np.int64)
        self._low = np.full((extent, channels), math.inf)
        self._high = np.full((extent, channels), -math.inf)

    def add(self, tile: Array, box: Box) -> None:
        """Add a tile (c, z, y, x) that stands at ``box``."""
        nonzero = tile != 0
        counts = nonzero.sum(self._others).T
        limits = np.finfo(tile.dtype) if tile.dtype.kind == "f" else np.iinfo(tile.dtype)
        low = tile.min(self._others, initial=limits.max, where=nonzero).T
        high = tile.max(self._others, initial=limits.min, where=nonzero).T
        here = slice(box.start[self._axis], box.stop[self._axis])
        self._nonzero[here] += counts
        self._low[here] = np.where(counts > 0, np.minimum(self._low[here], low), self._low[here])
        self._high[here] = np.where(counts > 0, np.maximum(self._high[here], high), self._high[here])

    def ranges(
        self, case: Case, schemes: Sequence[ChannelNormalisation], inside: Array | None
    ) -> tuple[tuple[Range, ...], ...]:
        """Limits of each section inside the case's box, by channel; ``inside``: voxels of each in the mask."""
        start, stop = case.box.start[self._axis], case.box.stop[self._axis]
        voxels = case.box.voxels // (stop - start)
        result = []
        for p in range(start, stop):
            counted = voxels if inside is None else int(inside[p])
            found = zip(self._nonzero[p].tolist(), self._low[p].tolist(), self._high[p].tolist(), strict=True)
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


def survey(
    reader: VolumeReader,
    name: str,
    schemes: Sequence[ChannelNormalisation],
    *,
    by_slice: bool,
    section_axis: int = 0,
    workers: int = 1,
    plane_axis: int | None = 0,
    with_mask: bool = False,
    previous: ReadBox | None = None,
    workspace: Workspace | None = None,
) -> Sequence[Case]:
    """Read the whole volume once and describe its cases; memory holds a few tiles and a table of the sections.

    Parameters
    ----------
    reader
        The volume, channels as the model expects them.
    name
        Of the volume, for messages.
    schemes
        Normalisation of each channel, which says whether a mask is needed.
    by_slice
        Whether each section is a case of its own, or the volume is one.
    section_axis
        The axis (0 = z, 1 = y, 2 = x) across which sections that are cases lie.
    workers
        Threads that read ahead; the result does not depend on them.
    plane_axis
        The axis (0 = z, 1 = y, 2 = x) along which the range of each section of a volume is gathered; None: of none.
    with_mask
        Whether the case of a volume is given its mask although no channel is normalised within it.
    previous
        Gives labels (1, z, y, x) of a cascade's previous stage, which nnU-Net counts as within the mask.
    workspace
        Where the mask is kept; None: in memory, whole.

    Raises
    ------
    VolumeError
        If a voxel is no finite number (nor clipped by CTNormalization), or intensities do not fit the normalisation.
    """
    if by_slice:
        cases = _section_cases(reader, name, schemes, workers, axis=section_axis)
        return SectionCases.of(cases, reader.info.extent[section_axis], reader.info.channels, section_axis)
    planes = None if plane_axis is None else _SectionExtremes(reader.info, plane_axis)
    region, clipped = Box.of_shape(reader.info.extent), clipped_channels(schemes)
    whole = _volume_tally(reader, name, workers, planes, clipped=clipped)
    mask, inside = None, None
    if with_mask or keeps_mask(schemes, by_slice=False):
        mask = make_mask(reader, whole.box or region, previous, workspace)
        inside = sections_of(mask, reader.info, plane_axis or 0)
        whole.inside = int(inside.sum())
    case = dataclasses.replace(_checked(whole.case(region, schemes), name, schemes), mask=mask)
    ranges = () if planes is None else planes.ranges(case, schemes, inside)
    return (dataclasses.replace(case, plane_ranges=ranges),)


def _section_cases(
    reader: VolumeReader, name: str, schemes: Sequence[ChannelNormalisation], workers: int, axis: int
) -> Iterator[Case]:
    """The case of each section across ``axis``; the volume is read with that axis as its first."""
    order = AxisOrder.across(axis)
    source = reader if order.identity else ReorientedVolume(reader, Orientation(order=order))
    tallies = _tallies(source, name, workers, lambda tile, box: None, order=order, clipped=clipped_channels(schemes))
    for i, tally in enumerate(tallies):
        region = Box((i, 0, 0), (i + 1, *source.info.extent[1:]))
        turned = tally.case(region, schemes)
        region, box = order.inverse.turn_box(turned.region), order.inverse.turn_box(turned.box)
        yield _checked(Case(region, box, turned.channels), name, schemes)


def _volume_tally(
    reader: VolumeReader, name: str, workers: int, planes: _SectionExtremes | None, clipped: Sequence[int]
) -> _CaseTally:
    """What is known of a whole volume; ``planes`` learn of each section."""

    def see(tile: Array, box: Box) -> None:
        if planes is not None:
            planes.add(tile, box)

    whole = _CaseTally(reader.info.channels, is_exact(reader.info.dtype))
    for tally in _tallies(reader, name, workers, see, clipped=clipped):
        whole.add(tally)
    return whole


def _tallies(
    reader: VolumeReader,
    name: str,
    workers: int,
    see: Callable[[Array, Box], None],
    order: AxisOrder = AS_THEY_ARE,
    clipped: Sequence[int] = (),
) -> Iterator[_CaseTally]:
    """What is known of each section, in order of z; ``see`` gets each tile and its box.

    ``order`` is how the volume was turned into what ``reader`` gives, for messages. ``clipped`` are channels that may
    hold infinities, which count as float32's largest numbers.
    """
    channels, exact = reader.info.channels, is_exact(reader.info.dtype)
    band: list[_CaseTally] = []  # the sections of the tiles at one z
    for box, tile in _tiles(reader, workers):
        if box.start[1:] == (0, 0):
            yield from band
            band = [_CaseTally(channels, exact) for _ in range(box.shape[0])]
        tile = finite(tile, clipped)
        check_finite(tile, box, name, order)
        nonzero = is_inside(tile)
        see(tile, box)
        for i, tally in enumerate(band):
            tally.add_tile(tile[:, i : i + 1], nonzero[i : i + 1], box.shift((i, 0, 0)))
    yield from band


def _checked(case: Case, name: str, schemes: Sequence[ChannelNormalisation]) -> Case:
    for c, (scheme, summary) in enumerate(zip(schemes, case.channels, strict=True)):
        check_intensities(scheme, summary, f"{name}, channel {c}, voxels {case.box.start} to {case.box.stop}")
    return case


def keeps_mask(schemes: Sequence[ChannelNormalisation], *, by_slice: bool) -> bool:
    """Whether the survey makes a mask: masked channels and a volume that is one case."""
    return not by_slice and any(scheme.masked for scheme in schemes)


def _tiles(reader: VolumeReader, workers: int) -> Iterator[tuple[Box, Array]]:
    """Tiles in raster order, ``workers`` of them read ahead."""
    boxes = (block.core for block in BlockGrid(reader.info.extent, tile_shape(reader.info)))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending = deque((box, pool.submit(reader.read, box)) for box in itertools.islice(boxes, workers))
        while pending:
            box, tile = pending.popleft()
            values = tile.result()
            pending.extend((ahead, pool.submit(reader.read, ahead)) for ahead in itertools.islice(boxes, 1))
            yield box, values


def survey_bytes(info: VolumeInfo, workers: int, section_axis: int = 0) -> int:
    """Most memory that a survey takes: tiles read ahead and looked at, sums of pieces, the table of sections.

    While a tile is turned there are two of it.
    """
    order = AxisOrder.across(section_axis)
    info = Orientation(order=order).of_info(info)
    shape = tile_shape(info)
    tile, held = math.prod(shape), workers + 2 if order.identity else 2 * workers + 2
    waiting = tile * info.channels * info.dtype.itemsize * held
    tables = info.extent[0] * (32 + 64 * info.channels) + shape[0] * TALLY_BYTES * (1 + info.channels)
    return waiting + tile * (2 + info.channels) + STATISTICS_BYTES + tables


def save_survey(surveyed: Sequence[Sequence[Case]], path: Path) -> None:
    """Keep the cases of each member beside the ledger, so that a rerun need not read the volume again.

    The first line says how many cases each member has, each following one is a case; they are never all in memory.
    Masks are stores of their own.
    """
    heads = [
        {
            "cases": len(cases),
            "channels": len(cases[0].channels),
            "section_axis": cases.axis if isinstance(cases, SectionCases) else None,
        }
        for cases in surveyed
    ]
    with replacing(path) as temporary, temporary.open("w") as stream:
        stream.write(json.dumps(heads) + "\n")
        for case in itertools.chain.from_iterable(surveyed):
            stream.write(json.dumps(asdict(dataclasses.replace(case, mask=None))) + "\n")


def load_survey(path: Path) -> tuple[Sequence[Case], ...] | None:
    """What is kept at ``path``, or None where there is nothing that is whole."""
    try:
        with path.open() as stream:
            return tuple(_cases(stream, **head) for head in json.loads(stream.readline())) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cases(stream: Iterator[str], cases: int, channels: int, section_axis: int | None) -> Sequence[Case]:
    found = (_case(json.loads(line)) for line in itertools.islice(stream, cases))
    if section_axis is not None:
        return SectionCases.of(found, cases, channels, section_axis)
    result = tuple(found)
    if len(result) != cases:
        raise ValueError(f"expected {cases} cases, found {len(result)}")
    return result


def _case(entry: dict[str, Any]) -> Case:
    channels = tuple(ChannelSummary(**c) for c in entry["channels"])
    return Case(_box(entry["region"]), _box(entry["box"]), channels, _ranges(entry))


def _ranges(entry: dict[str, list[list[list[float]]]]) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((low, high) for low, high in plane) for plane in entry["plane_ranges"])


def _box(entry: dict[str, list[int]]) -> Box:
    return Box(vec3(entry["start"]), vec3(entry["stop"]))
