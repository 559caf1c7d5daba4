"""Which images of a folder are sections and which are channels of one, by their names; called by ``images``."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from connectomics.core.errors import VolumeError
from connectomics.volumes.source import Source, some_of

CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")
MOST_CHANNELS = 4
"""More different ``_0000`` suffixes than this in one folder number the sections, not the channels."""
COPY = re.compile(
    r"(?: ?\((?:copy|Kopie|copie|\d{1,2})(?: \d+)?\)| - (?:Copy|Kopie|Copie)(?: \(\d+\))?| copy(?: \d+)?)$",
    re.IGNORECASE,
)
MASK = re.compile(
    r"[-_ .](mask|masks|label|labels|seg|segmentation|gt|annotation|annotations|membrane|prediction)$", re.I
)
CHANNEL_WORD = re.compile(r"^(.*?[-_ .])(?:ch|channel|chan|c|w)[-_ ]?(\d{1,2})(?=$|[-_ .])(.*)$", re.IGNORECASE)
_NUMBERS = re.compile(r"\d+")


def sections_of(source: Source, images: Sequence[Path], *, colours: bool) -> list[tuple[Path, ...]]:
    """Group the files into sections, each the files of its channels in order; one with colours has them all.

    Suffixes ``_0000`` to ``_000n`` that every name before them shares are channels; any others number the sections.

    Raises
    ------
    VolumeError
        If a section lacks a channel that others have, or the stated axes do not fit a folder of images.
    """
    axes = source.axes
    if axes is not None and (not {"y", "x"} <= set(axes) <= set("czyx") or len(set(axes)) < len(axes)):
        raise VolumeError(
            f"{source.uri}: cannot use the axes {axes!r} for a folder of images; state inference.axes=zyx, cyx or czyx."
        )
    if axes is not None and "z" not in axes:
        if "c" not in axes and len(images) > 1:
            raise VolumeError(
                f"{source.uri}: the axes {axes!r} leave no axis for {len(images)} files; state "
                "inference.axes=zyx where each is a section."
            )
        return [tuple(images)]
    matches = [CHANNEL_SUFFIX.fullmatch(path.stem) for path in images]
    suffixes = sorted({match[2] for match in matches if match})
    separate = colours or (axes is not None and "c" not in axes) or not all(matches)
    if separate or (axes is None and not _number_channels(suffixes)):
        return [(path,) for path in images]
    sections: dict[str, dict[str, Path]] = {}
    for path, match in zip(images, matches, strict=True):
        if match:
            sections.setdefault(match[1], {})[match[2]] = path
    for stem, channels in sections.items():
        missing = [suffix for suffix in suffixes if suffix not in channels]
        if missing:
            raise VolumeError(
                f"{source.uri}: section {stem} lacks channel {', '.join(missing)} (file "
                f"{stem}_{missing[0]}*) that others have; "
                "add it, or state inference.axes=zyx if every file is a section of its own."
            )
    return [tuple(channels[suffix] for suffix in suffixes) for channels in sections.values()]


def _number_channels(suffixes: Sequence[str]) -> bool:
    return len(suffixes) <= MOST_CHANNELS and [int(suffix) for suffix in suffixes] == list(range(len(suffixes)))


def notes_on(sections: Sequence[tuple[Path, ...]]) -> list[str]:
    """What a user should know of the names of a folder's files: a sentence for each thing that may be a mistake.

    Examples
    --------
    >>> notes_on([(Path("s1.tif"),), (Path("s2.tif"),), (Path("s5.tif"),)])
    ['the section numbers leave out 3 to 4, so sections that are no neighbours are read as if they were']
    """
    names = [section[0].stem for section in sections]
    notes = []
    if len(sections[0]) > 1 and len(sections) == 1:
        notes.append(
            f"{len(sections[0])} files are read as the channels of one section; state axes 'zyx' where "
            "they are sections"
        )
    copies = [name for name in names if COPY.search(name) and COPY.sub("", name) in set(names)]
    if copies:
        notes.append(f"copies are read as sections of their own: {some_of(copies)}; remove them if they are not wanted")
    notes += _of_masks(names)
    channels = _interleaved(names)
    if channels:
        notes.append(
            f"the names count {channels} channels, but each file is read as a section; rename the files to "
            "NAME_0000, NAME_0001, … where they are channels"
        )
    elif gaps := _gaps(
        [len(section) > 1 for section in sections], [s[0].stem for s in sections if s[0].stem not in copies]
    ):
        notes.append(
            f"the section numbers leave out {some_of(gaps)}, so sections that are no neighbours "
            "are read as if they were"
        )
    return notes


def _of_masks(names: Sequence[str]) -> list[str]:
    stems = set(names)
    masks = [name for name in names if MASK.search(name) and MASK.sub("", name) in stems]
    if not masks:
        return []
    return [
        f"what looks like masks beside the images is read as sections, too: {some_of(masks)}; "
        "move them to another folder"
    ]


def _interleaved(names: Sequence[str]) -> int:
    """How many channels the names count in turn, as in ``s1_ch0``, ``s1_ch1``, ``s2_ch0``; 0 where they do not."""
    found = [CHANNEL_WORD.match(name) for name in names]
    if not all(found):
        return 0
    numbers: dict[str, list[int]] = collections.defaultdict(list)
    for match in found:
        if match:
            numbers[match[1] + match[3]].append(int(match[2]))
    counts = {tuple(sorted(channels)) for channels in numbers.values()}
    return len(next(iter(counts))) if len(counts) == 1 and len(next(iter(counts))) > 1 else 0


def _gaps(channels: Sequence[bool], names: Sequence[str]) -> list[str]:
    """The numbers that are left out where exactly one number in the names counts the sections."""
    stems = [
        CHANNEL_SUFFIX.sub(r"\1", name) if of_channels else name
        for of_channels, name in zip(channels, names, strict=False)
    ]
    words = {_NUMBERS.sub("#", stem) for stem in stems}
    rows = [[int(number) for number in _NUMBERS.findall(stem)] for stem in stems]
    if len(words) != 1 or len(rows) < 3:
        return []
    counting = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
    if len(counting) != 1:
        return []
    values = sorted(counting[0])
    steps = [b - a for a, b in pairwise(values)]
    step = min(steps)
    if step < 1 or steps.count(step) * 2 < len(steps):
        return []
    return [
        str(a + step) if b - a == 2 * step else f"{a + step} to {b - step}" for a, b in pairwise(values) if b - a > step
    ]
