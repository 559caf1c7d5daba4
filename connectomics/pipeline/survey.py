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

import numpy as np

from connectomics.errors import VolumeError
from connectomics.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.inference.case import Case, Range
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

    def count(self, tile: Array) -> None:
        for c, values in enumerate(tile):
            stats, before = IntensityStats.of(values), self.stats[c]
            self.stats[c] = stats if before is None else before + stats

    def add(self, tile: Array, origin: Box) -> None:
        self.count(tile)
        box = nonzero_box(tile)
        if box is not None:
            box = box.shift(origin.start)
            self.box = box if self.box is None else _hull(self.box, box)

    def known(self) -> list[IntensityStats]:
        """Statistics of each channel, every tile having been added."""
        return [s for s in self.stats if s is not None]


def _case_of(sections: Sequence[_Tally], region: Box, planes: Sequence[_Tally], axis: int) -> Case:
    """The case made of some sections: their statistics merged in order, their boxes joined."""
    boxes = [t.box for t in sections if t.box is not None]
    box = functools.reduce(_hull, boxes) if boxes else region
    channels = zip(*(t.known() for t in sections), strict=True)
    summaries = tuple(functools.reduce(operator.add, stats).summary(box.voxels) for stats in channels)
    plane = box.voxels // box.shape[axis]
    inside = planes[box.start[axis] - region.start[axis] : box.stop[axis] - region.start[axis]]
    ranges = tuple(tuple(s.limits(plane) for s in t.known()) for t in inside)
    return Case(region, box, summaries, ranges)


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
) -> tuple[Case, ...]:
    """Read the whole volume once and describe its cases.

    Parameters
    ----------
    reader
        The volume, channels as the model expects them.
    name
        Of the volume, for messages.
    schemes
        Normalisation of each channel, for checks.
    by_slice
        Whether each section is a case of its own, or the volume is one.
    workers
        Threads that read ahead; the result does not depend on them.
    plane_axis
        The axis (0 = z, 1 = y, 2 = x) whose sections' ranges are gathered; z where each section is a case.

    Raises
    ------
    VolumeError
        If a voxel is not a finite number, or intensities do not fit the normalisation.
    """
    info = reader.info
    whole = Box.of_shape(info.extent)
    sections = [_Tally(info.channels) for _ in range(info.extent[0])]
    planes = sections if plane_axis == 0 else [_Tally(info.channels) for _ in range(info.extent[plane_axis])]
    for box, tile in _tiles(reader, workers):
        _check_finite(tile, box, name)
        for i, z in enumerate(range(box.start[0], box.stop[0])):
            sections[z].add(tile[:, i : i + 1], box.shift((i, 0, 0)))
        if planes is not sections:
            for i, p in enumerate(range(box.start[plane_axis], box.stop[plane_axis])):
                planes[p].count(tile.take(i, plane_axis + 1))
    if by_slice:
        cases = tuple(_case_of([t], region, [t], 0) for t, region in zip(sections, _sections(whole), strict=True))
    else:
        cases = (_case_of(sections, whole, planes, plane_axis),)
    for case in cases:
        for c, (scheme, summary) in enumerate(zip(schemes, case.channels, strict=True)):
            check_intensities(scheme, summary, f"{name}, channel {c}, voxels {case.box.start} to {case.box.stop}")
    return cases


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


def save_survey(cases: Sequence[Case], path: Path) -> None:
    """Keep a survey beside the ledger, so that a rerun need not repeat it."""
    write_text(path, json.dumps([asdict(case) for case in cases]))


def load_survey(path: Path) -> tuple[Case, ...] | None:
    """The survey kept at ``path``, or None where there is none that is whole."""
    try:
        entries = json.loads(path.read_text())
        cases = tuple(
            Case(_box(e["region"]), _box(e["box"]), tuple(ChannelSummary(**c) for c in e["channels"]), _ranges(e))
            for e in entries
        )
        return cases or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ranges(entry: dict[str, list[list[list[float]]]]) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((low, high) for low, high in plane) for plane in entry["plane_ranges"])


def _box(entry: dict[str, list[int]]) -> Box:
    return Box(vec3(entry["start"]), vec3(entry["stop"]))
