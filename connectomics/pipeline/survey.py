"""The survey: one streaming pass that gives every case its nonzero box and exact statistics.

Tiles depend on the input's own chunks only, never on blocks or workers, and merge in raster order.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import VolumeError
from connectomics.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.inference.case import Case, Range, ReadBox
from connectomics.inference.mask import fill_holes
from connectomics.inference.normalise import ChannelSummary, IntensityStats, check_intensities
from connectomics.io.atomic import write_text
from connectomics.io.volume import Array, VolumeInfo, VolumeReader
from connectomics.models.spec import ChannelNormalisation

TILE_VOXELS = 1 << 23


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


class _Tally:
    """What is known of one section so far."""

    def __init__(self, channels: int) -> None:
        self.stats: list[IntensityStats | None] = [None] * channels
        self.box: Box | None = None
        self.inside = 0  # voxels in the mask

    def count(self, tile: Array) -> None:
        for c, values in enumerate(tile):
            stats, before = IntensityStats.of(values), self.stats[c]
            self.stats[c] = stats if before is None else before + stats

    def add(self, tile: Array, mask: Array, origin: Box) -> None:
        self.count(tile)
        self.inside += int(np.count_nonzero(mask))
        box = nonzero_box(mask[None])
        if box is not None:
            box = box.shift(origin.start)
            self.box = box if self.box is None else _hull(self.box, box)

    def known(self) -> list[IntensityStats]:
        """Statistics of each channel, every tile having been added."""
        return [s for s in self.stats if s is not None]


def _case_of(
    sections: Sequence[_Tally],
    region: Box,
    schemes: Sequence[ChannelNormalisation],
    planes: Sequence[_Tally],
    axis: int = 0,
    mask: Array | None = None,
) -> Case:
    """The case made of some sections: their statistics merged in order, their boxes joined, ranges of its planes."""
    boxes = [t.box for t in sections if t.box is not None]
    box = functools.reduce(_hull, boxes) if boxes else region
    inside = sum(t.inside for t in sections)
    channels = zip(schemes, zip(*(t.known() for t in sections), strict=True), strict=True)
    summaries = tuple(
        functools.reduce(operator.add, stats).summary(inside if scheme.masked else box.voxels)
        for scheme, stats in channels
    )
    plane = box.voxels // box.shape[axis]
    ranges = tuple(
        tuple(
            _range(stats, summary, t.inside if scheme.masked else plane, plane)
            for scheme, stats, summary in zip(schemes, t.known(), summaries, strict=True)
        )
        for t in planes[box.start[axis] - region.start[axis] : box.stop[axis] - region.start[axis]]
    )
    part = None if mask is None else mask[box.slices]
    return Case(region, box, summaries, ranges, part)


def _range(stats: IntensityStats, summary: ChannelSummary, inside: int, voxels: int) -> Range:
    """Limits of ``inside`` voxels; what is left out of ``voxels`` is normalised to 0, which the mean is too."""
    low, high = stats.limits(inside)
    return (low, high) if inside == voxels else (min(low, summary.mean), max(high, summary.mean))


def nonzero_box(array: Array) -> Box | None:
    """The smallest box around the voxels of a (c, z, y, x) array that are not zero in every channel, or None."""
    mask = (array != 0).any(axis=0)
    planes = mask.any(axis=0)
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
    workers: int = 1,
    plane_axis: int = 0,
    with_mask: bool = False,
    previous: ReadBox | None = None,
) -> tuple[Case, ...]:
    """Read the whole volume once and describe its cases.

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
    workers
        Threads that read ahead; the result does not depend on them.
    plane_axis
        The axis (0 = z, 1 = y, 2 = x) whose sections' ranges are gathered; z where each section is a case.
    with_mask
        Whether the case of a volume is given its mask although no channel is normalised within it.
    previous
        Gives labels (1, z, y, x) of a cascade's previous stage, which nnU-Net counts as within the mask.

    Raises
    ------
    VolumeError
        If a voxel is not a finite number, or intensities do not fit the normalisation.
    """
    info = reader.info
    whole = Box.of_shape(info.extent)
    sections = [_Tally(info.channels) for _ in range(info.extent[0])]
    planes = sections if plane_axis == 0 else [_Tally(info.channels) for _ in range(info.extent[plane_axis])]
    mask = np.zeros(info.extent, bool) if with_mask or keeps_mask(schemes, by_slice=by_slice) else None
    for box, tile in _tiles(reader, workers):
        _check_finite(tile, box, name)
        nonzero = (tile != 0).any(axis=0)
        if mask is not None:
            mask[box.slices] = nonzero
        for i, z in enumerate(range(box.start[0], box.stop[0])):
            sections[z].add(tile[:, i : i + 1], nonzero[i : i + 1], box.shift((i, 0, 0)))
        if planes is not sections:
            for i, p in enumerate(range(box.start[plane_axis], box.stop[plane_axis])):
                planes[p].count(tile.take(i, plane_axis + 1))
    if mask is not None:
        fill_holes(mask)
        if previous is not None:
            boxes = [t.box for t in sections if t.box is not None]
            _include(previous, mask, functools.reduce(_hull, boxes) if boxes else whole, tile_shape(info))
        for tallies, axis in ((sections, 0), (planes, plane_axis)):
            for i, tally in enumerate(tallies):
                tally.inside = int(np.count_nonzero(mask.take(i, axis)))
    if by_slice:
        cases = tuple(_case_of([t], region, schemes, [t]) for t, region in zip(sections, _sections(whole), strict=True))
    else:
        cases = (_case_of(sections, whole, schemes, planes, plane_axis, mask),)
    for case in cases:
        for c, (scheme, summary) in enumerate(zip(schemes, case.channels, strict=True)):
            check_intensities(scheme, summary, f"{name}, channel {c}, voxels {case.box.start} to {case.box.stop}")
    return cases


def _include(labels: ReadBox, mask: Array, box: Box, tile: Vec3) -> None:
    """Add what is labelled to the mask, within the nonzero box."""
    for block in BlockGrid(box.shape, tile):
        part = block.core.shift(box.start)
        mask[part.slices] |= labels(part)[0] != 0


def keeps_mask(schemes: Sequence[ChannelNormalisation], *, by_slice: bool) -> bool:
    """Whether the survey finds a mask that stays in memory: masked channels and a volume that is one case."""
    return not by_slice and any(scheme.masked for scheme in schemes)


def _sections(whole: Box) -> list[Box]:
    _, y, x = whole.shape
    return [Box((z, 0, 0), (z + 1, y, x)) for z in range(whole.shape[0])]


def _tiles(reader: VolumeReader, workers: int) -> Iterator[tuple[Box, Array]]:
    """Tiles in raster order, ``workers`` of them read ahead."""
    boxes = [block.core for block in BlockGrid(reader.info.extent, tile_shape(reader.info))]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending = [pool.submit(reader.read, box) for box in boxes[:workers]]
        for i, box in enumerate(boxes):
            tile = pending.pop(0).result()
            if i + workers < len(boxes):
                pending.append(pool.submit(reader.read, boxes[i + workers]))
            yield box, tile


def _check_finite(tile: Array, box: Box, name: str) -> None:
    if tile.dtype.kind != "f":
        return
    finite = np.isfinite(tile)
    if finite.all():
        return
    bad = nonzero_box(~finite)
    assert bad is not None
    bad = bad.shift(box.start)
    raise VolumeError(
        f"{name}: NaN or infinite values in voxels (z, y, x) {bad.start} to {bad.stop}; nnU-Net cannot normalise them, "
        "replace them (for example by 0) and run again"
    )


def save_survey(surveyed: Sequence[Sequence[Case]], path: Path) -> None:
    """Keep the cases of each member beside the ledger, so that a rerun need not read the volume again."""
    write_text(path, json.dumps([[asdict(case) for case in cases] for cases in surveyed]))


def load_survey(path: Path) -> tuple[tuple[Case, ...], ...] | None:
    """What is kept at ``path``, or None where there is nothing that is whole."""
    try:
        return tuple(tuple(_case(entry) for entry in entries) for entries in json.loads(path.read_text())) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _case(entry: dict[str, Any]) -> Case:
    channels = tuple(ChannelSummary(**c) for c in entry["channels"])
    return Case(_box(entry["region"]), _box(entry["box"]), channels, _ranges(entry))


def _ranges(entry: dict[str, list[list[list[float]]]]) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((low, high) for low, high in plane) for plane in entry["plane_ranges"])


def _box(entry: dict[str, list[int]]) -> Box:
    return Box(vec3(entry["start"]), vec3(entry["stop"]))
