"""The survey: one streaming pass that gives every case its nonzero box and exact statistics.

Tiles depend on the input's own chunks only, never on blocks or workers, and merge in raster order. With a workspace the
pass is shared by all processes of a run, band by band.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from connectomics.core.files import replacing
from connectomics.core.geometry import AxisOrder, Box, vec3
from connectomics.execution.stage import Workspace
from connectomics.inference.case import Case, Range, ReadBox
from connectomics.inference.normalise import ChannelSummary, check_intensities
from connectomics.inference.section_cases import SectionCases
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey.bands import STAGE, band_bytes, bands_of
from connectomics.stages.survey.mask import make_mask, sections_of
from connectomics.stages.survey.tallies import CaseTally, SectionExtremes, rows
from connectomics.stages.survey.tiles import SurveyPass, survey_pass, tile_shape
from connectomics.volumes.reoriented import Orientation
from connectomics.volumes.volume import VolumeInfo, VolumeReader

STATISTICS_BYTES = 48 << 20  # float64 and index copies of the values that are summed at once
TALLY_BYTES = 512  # of a section whose tiles are being read, and as much for each of its channels


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
    stage: str = STAGE,
) -> Sequence[Case]:
    """Read the whole volume once and describe its cases; memory holds a few tiles and a table of the sections.

    Parameters
    ----------
    reader, name
        The volume, channels as the model expects them, and its name for messages.
    schemes
        Normalisation of each channel, which says whether a mask is needed.
    by_slice, section_axis
        Whether each section is a case of its own, or the volume is one; the axis (0 = z, 1 = y, 2 = x) across which
        sections that are cases lie.
    workers
        Threads that read ahead; the result does not depend on them.
    plane_axis
        The axis (0 = z, 1 = y, 2 = x) along which the range of each section of a volume is gathered; None: of none.
    with_mask
        Whether the case of a volume is given its mask although no channel is normalised within it.
    previous
        Gives labels (1, z, y, x) of a cascade's previous stage, which nnU-Net counts as within the mask.
    workspace
        Where bands of the pass, which processes share, and the mask are kept; None: all is done here, in memory.
    stage
        Name of the stage of the bands, one for each pass over a volume.

    Raises
    ------
    VolumeError
        If a voxel is no finite number (nor clipped by CTNormalization), or intensities do not fit the normalisation.
    """
    across = section_axis if by_slice else None
    look = survey_pass(reader, name, schemes, section_axis=across, plane_axis=plane_axis, workers=workers)
    planes = look.planes(Box.of_shape(look.info.extent))
    tallies = _tallies(look, planes, workspace, stage)
    if by_slice:
        cases = _section_cases(look, tallies, schemes)
        return SectionCases.of(cases, reader.info.extent[section_axis], reader.info.channels, section_axis)
    whole = CaseTally.empty(reader.info.channels, look.exact)
    for tally in tallies:
        whole.add(tally)
    mask, inside, region = None, None, Box.of_shape(reader.info.extent)
    if with_mask or keeps_mask(schemes, by_slice=False):
        mask = make_mask(reader, whole.box or region, previous, workspace)
        inside = sections_of(mask, reader.info, plane_axis or 0)
        whole.inside = int(inside.sum())
    case = dataclasses.replace(_checked(whole.case(region, schemes), name, schemes), mask=mask)
    return (dataclasses.replace(case, plane_ranges=() if planes is None else planes.ranges(case, schemes, inside)),)


def _tallies(
    look: SurveyPass, planes: SectionExtremes | None, workspace: Workspace | None, stage: str
) -> Iterator[CaseTally]:
    """What is known of each section, in order; ``planes`` learn of each."""
    bands = bands_of(look, workspace, stage)
    if bands is None:
        tiles = look.tiles(Box.of_shape(look.info.extent), planes)
    else:
        bands.do()
        tiles = bands.tiles(planes)
    return itertools.chain.from_iterable(rows(tiles))


def _section_cases(
    look: SurveyPass, tallies: Iterable[CaseTally], schemes: Sequence[ChannelNormalisation]
) -> Iterator[Case]:
    """The case of each section; the volume was read with the axis across which they lie as its first."""
    back = look.order.inverse
    for i, tally in enumerate(tallies):
        turned = tally.case(Box((i, 0, 0), (i + 1, *look.info.extent[1:])), schemes)
        region, box = back.turn_box(turned.region), back.turn_box(turned.box)
        yield _checked(Case(region, box, turned.channels), look.name, schemes)


def _checked(case: Case, name: str, schemes: Sequence[ChannelNormalisation]) -> Case:
    for c, (scheme, summary) in enumerate(zip(schemes, case.channels, strict=True)):
        check_intensities(scheme, summary, f"{name}, channel {c}, voxels {case.box.start} to {case.box.stop}")
    return case


def keeps_mask(schemes: Sequence[ChannelNormalisation], *, by_slice: bool) -> bool:
    """Whether the survey makes a mask: masked channels and a volume that is one case."""
    return not by_slice and any(scheme.masked for scheme in schemes)


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
    return waiting + tile * (2 + info.channels) + STATISTICS_BYTES + tables + band_bytes(info)


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
