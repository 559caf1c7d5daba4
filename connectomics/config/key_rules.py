"""What a value of the configuration must be: rules with the sentence that is said where one does not hold.

``key`` declares a field of a section with its default, what it means and its rules; ``validation`` asks the rules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DOC, RULES = "doc", "rules"
LARGEST_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class KeyRule:
    """Whether a value is possible, and what is said where it is not; with ``each`` it is asked of a list's values."""

    holds: Callable[[Any], bool]
    text: str
    each: bool = False


def key(default: Any, doc: str, *rules: KeyRule) -> Any:
    """Declare a key of the configuration.

    Parameters
    ----------
    default
        Its value where none is stated; null is never held against the rules.
    doc
        What it means, in Markdown; the guide, the tutorial and ``connectomics config keys`` show it.
    rules
        What its values must be.

    Returns
    -------
    field
        Of the section's dataclass.
    """
    known = {DOC: doc, RULES: rules}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=known)
    return dataclasses.field(default=default, metadata=known)


def at_least(minimum: int) -> KeyRule:
    """A number that is not smaller."""
    return KeyRule(lambda value: value >= minimum, f"must be {minimum} or more")


def one_of(allowed: Sequence[str], otherwise: str = "", *, each: bool = False) -> KeyRule:
    """A word that is known."""
    return KeyRule(lambda value: value in allowed, f"must be one of {', '.join(allowed)}{otherwise}", each)


def matching(pattern: str, text: str, *, each: bool = False) -> KeyRule:
    """A text of a certain form."""
    return KeyRule(lambda value: re.fullmatch(pattern, value) is not None, text, each)


def not_empty(text: str) -> KeyRule:
    """A text or a list with anything in it."""
    return KeyRule(lambda value: len(value) > 0, text)


def some_of(allowed: Sequence[str]) -> tuple[KeyRule, ...]:
    """A list of known words, at least one and each but once."""
    return not_empty(f"must name at least one of {', '.join(allowed)}"), one_of(allowed, each=True), DISTINCT


def extents(*lengths: int, largest: int = 1 << 62) -> KeyRule:
    """Edges of a box of voxels, as many as are allowed."""
    counts = " or ".join(map(str, lengths))
    rule = f"must be {counts} whole numbers of 1 or more, in voxels, ending with y, x"
    return KeyRule(
        lambda value: len(value) in lengths and 1 <= min(value) <= max(value) <= largest,
        rule if largest > LARGEST_WINDOW else f"{rule}, none above {largest}",
    )


def edges(unit: str) -> KeyRule:
    """Lengths along z, y and x."""
    return KeyRule(
        lambda value: len(value) == 3 and all(0 < v < math.inf for v in value),
        f"must be 3 positive numbers (z, y, x), in {unit}",
    )


def positive(text: str) -> KeyRule:
    """A finite number above 0."""
    return KeyRule(lambda value: 0 < value < math.inf, text)


DISTINCT = KeyRule(lambda values: len(set(values)) == len(values), "each value may stand only once")
NAMES = KeyRule(
    lambda values: len(values) > 0 and all(values), "must hold at least one name and no empty one, or be null"
)
DEVICE = matching(r"auto|cpu|mps|cuda(:\d+)?", "must be auto, cpu, mps, cuda or cuda:N")
ONE_GPU = KeyRule(
    lambda count: count <= 1,
    "one process drives one device, so it must be 0, 1 or null; start one process per GPU with "
    "inference.volume_mode.start_index and step",
)
