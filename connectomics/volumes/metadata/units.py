"""Units of length as programs spell them; every reader asks ``nanometres``, so that a spelling means one thing."""

from __future__ import annotations

import html
import math
import re

from connectomics.core.errors import VolumeError
from connectomics.volumes.source import Source

_POWERS = {
    "f": ("femto", -6),
    "p": ("pico", -3),
    "n": ("nano", 0),
    "u": ("micro", 3),
    "m": ("milli", 6),
    "c": ("centi", 7),
    "d": ("deci", 8),
    "k": ("kilo", 12),
}
NM_PER_UNIT = {
    **{f"{letter}m": 10.0**power for letter, (_, power) in _POWERS.items()},
    **{f"{word}{end}": 10.0**power for word, power in _POWERS.values() for end in ("meter", "metre")},
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
    **dict.fromkeys(("å", "angstrom", "ångström", "ångstrom", "angström"), 0.1),
    **dict.fromkeys(("u", "micron"), 1e3),
    **dict.fromkeys(("in", "inch", "inche"), 2.54e7),
}
"""In small letters, without the plural's s and with u for µ."""

UNCALIBRATED = frozenset({"", "none", "null", "pixel", "px", "voxel", "vx", "reference frame", "dimensionless"})
"""What says that no length is known."""

_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_MICRO = re.compile("Â?[µμ]")  # U+00B5, U+03BC, and the first as UTF-8 that was taken for Latin-1


def nanometres(source: Source, unit: object, key: str) -> float | None:
    """Nanometres in one ``unit``, or None where it is none: nothing, ``pixel``, or what the caller's size replaces.

    Parameters
    ----------
    source
        The request; where it states the voxel size, a unit that nobody knows does no harm.
    unit
        As a file states it: text, bytes, or None where it states nothing.
    key
        Where the file states it, for the message: "attribute ``units`` of /raw".

    Raises
    ------
    VolumeError
        If nobody knows the unit.
    """
    found = length_of(unit)
    if found is None or not math.isnan(found):
        return found
    if source.voxel_size_nm is not None:
        return None
    raise VolumeError(
        f"{source.uri}: {key} is {plain(unit)!r:.80}, which is no known unit of length (nm, µm, mm, angstrom, …); "
        "correct it, or state the size as inference.voxel_size_nm=[z,y,x]."
    )


def length_of(unit: object) -> float | None:
    """Nanometres in one ``unit``; None where it says that nothing is calibrated, not a number where nobody knows it.

    Examples
    --------
    >>> [length_of(unit) for unit in ("um", "microns", r"\\u03BCm", "Angstrom", "pixel", "furlong")]
    [1000.0, 1000.0, 1000.0, 0.1, None, nan]
    """
    text = plain(unit)
    if text in ("Mm", "Pm"):  # mega and peta, which small letters would make milli and pico
        return math.nan
    word = _MICRO.sub("u", text).lower()
    names = (word, word.removesuffix("s"))
    if UNCALIBRATED.intersection(names):
        return None
    return next((NM_PER_UNIT[name] for name in names if name in NM_PER_UNIT), math.nan)


def plain(unit: object) -> str:
    """A unit as text: decoded, and without the escapes that ImageJ and JSON in JSON write."""
    text = unit.decode("utf-8", "replace") if isinstance(unit, bytes) else "" if unit is None else str(unit)
    return html.unescape(_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)).strip().strip("\0")
