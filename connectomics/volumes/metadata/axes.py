"""Names of axes as programs spell them, as the letters t, c, z, y, x; every reader that finds names asks here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from connectomics.core.errors import VolumeError
from connectomics.volumes.source import Source

SPATIAL = "zyx"
_WORDS = {
    **{letter: letter for letter in "tczyx"},
    **dict.fromkeys(("channel", "channels", "ch", "sample", "samples", "color", "colour", "rgb", "class"), "c"),
    **dict.fromkeys(("time", "frame", "frames", "timepoint"), "t"),
    **dict.fromkeys(("depth", "section", "sections", "slice", "slices", "plane"), "z"),
    **dict.fromkeys(("height", "row", "rows"), "y"),
    **dict.fromkeys(("width", "col", "cols", "column", "columns"), "x"),
}
_SAYS_NOTHING = re.compile(r"|none|null|d\d+\^?|(phony_)?(dim|axis)[_-]?\d+")
"""Names that libraries give to axes which nobody has named: xarray's dim_0, netCDF's phony_dim_0, funlib's d0."""

StatedAxes = tuple[str, str]
"""Letters, and where they were found."""


def letters_of(names: Sequence[object]) -> str | None:
    """The letter of each axis, ``?`` for a name nobody knows, ``_`` for an axis without one; None where none has one.

    Examples
    --------
    >>> letters_of(["X", "Y", "Z"]), letters_of([b"c^", "z", "y", "x"]), letters_of(["angle", "y", None])
    ('xyz', 'czyx', '?y_')
    >>> letters_of(["dim_0", "dim_1"]) is None
    True
    """
    words = [_word(name) for name in names]
    letters = "".join("_" if _SAYS_NOTHING.fullmatch(word) else _letter(word) for word in words)
    return None if set(letters) <= {"_"} else letters


def completed(letters: str, shape: Sequence[int]) -> str:
    """Letters in which axes without a name have that of the usual order, where the others stand in it.

    Examples
    --------
    >>> completed("_yx", (5, 48, 64)), completed("_zy", (5, 48, 64))
    ('zyx', '?zy')
    """
    order = usual(shape) or ""
    fits = len(order) == len(letters) and all(a in ("_", b) for a, b in zip(letters, order, strict=True))
    return order if "_" in letters and fits else letters.replace("_", "?")


def _word(name: object) -> str:
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else "" if name is None else str(name)
    return text.strip().lower()


def _letter(word: str) -> str:
    bare = word.removesuffix("^")  # funlib's mark of an axis that is no length
    return _WORDS.get(bare) or _WORDS.get(bare.removeprefix("axis_").rstrip("0123456789")) or "?"


def agreed(source: Source, stated: Sequence[StatedAxes]) -> StatedAxes | None:
    """The order of axes on which all statements agree, or None where there is none; each names what others leave open.

    Raises
    ------
    VolumeError
        If two differ; ``axes`` of the request goes before all.
    """
    if not stated:
        return None
    letters, where = stated[0]
    for others, there in stated[1:]:
        pairs = list(zip(letters, others, strict=False))
        differ = len(letters) != len(others) or any(a != b and not {a, b} & set("?_") for a, b in pairs)
        if differ and source.axes is None:
            raise VolumeError(
                f"{source.uri}: {where} says that the axes are {letters!r}, but {there} says {others!r}; "
                "state what they are with axes=, for example 'zyx' (inference.axes)."
            )
        letters = letters if differ else "".join(b if a in "?_" else a for a, b in pairs)
    return letters, where


def usual(shape: Sequence[int]) -> str | None:
    """Letters of an array whose axes nobody names, or None where its shape leaves several readings.

    Beyond four axes those of length one are dropped (``t``), and no more than three may be longer, as the fourth could
    be channels in front or behind. Nothing is one voxel wide, so a last axis of length one holds the only channel.

    Examples
    --------
    >>> usual((5, 48, 64)), usual((1, 1, 5, 48, 64)), usual((5, 48, 64, 1)), usual((1, 5, 48, 64, 1))
    ('zyx', 'tczyx', 'zyxt', 'tzyxt')
    >>> usual((1, 2, 5, 48, 64)) is None
    True
    """
    if len(shape) < 2:
        return None
    marks = ["" for _ in shape]
    if len(shape) > 2 and shape[-1] == 1 and shape[-2] > 1:
        marks[-1] = "t"
    if len(shape) > 4:
        if sum(length > 1 for length in shape) > 3:
            return None
        for i, length in enumerate(shape):
            if marks.count("") > 4 and length == 1 and not marks[i]:
                marks[i] = "t"
    first = marks.index("")
    if marks.count("") == 4 and marks[-1] and shape[first] == 1:
        marks[first] = "t"
    order = {2: "yx", 3: "zyx", 4: "czyx"}.get(marks.count(""))
    letters = iter(order or "")
    return order and "".join(mark or next(letters) for mark in marks)
