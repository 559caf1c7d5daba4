"""What a value of the configuration must be: rules with the sentence that is said where one does not hold.

``key`` declares a field of a section with its default, what it means and its rules; ``validation`` asks the rules.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DOC, RULES = "doc", "rules"
LARGEST_WINDOW = 4096
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a step"}


@dataclass(frozen=True, slots=True)
class KeyRule:
    """Whether a value is possible, and what is said where it is not; with ``each`` it is asked of a list's values."""

    holds: Callable[[Any], bool]
    text: str
    each: bool = False


def key(default: Any, doc: str, *rules: KeyRule) -> Any:
    """Declare a key of the configuration; what is returned is a field of the section's dataclass.

    Parameters
    ----------
    default
        Its value where none is stated; null is never held against the rules.
    doc
        What it means, in Markdown; the guide, the tutorial and ``connectomics config keys`` show it.
    rules
        What its values must be.
    """
    known = {DOC: doc, RULES: rules}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=known)
    return dataclasses.field(default=default, metadata=known)


def kind_in_words(kind: Any) -> str:
    """Say what a key takes.

    Examples
    --------
    >>> kind_in_words(list[int] | None)
    'a list, each a whole number, or null'
    """
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return f"{kind_in_words(inner[0])}, or null"
    if typing.get_origin(kind) is not list:
        return _KINDS[kind]
    if typing.get_origin(inner[0]) is list:
        return "a list of lists, each of whole numbers"  # the one kind of nested list there is
    return f"a list, each {_KINDS[inner[0]]}"


def at_least(minimum: int) -> KeyRule:
    """Take a number that is not smaller."""
    return KeyRule(lambda value: value >= minimum, f"must be {minimum} or more")


def one_of(*allowed: str, otherwise: str = "", each: bool = False) -> KeyRule:
    """Take a word that is known."""
    return KeyRule(lambda value: value in allowed, f"must be one of {', '.join(allowed)}{otherwise}", each)


def matching(pattern: str, text: str) -> KeyRule:
    """Take a text of a certain form."""
    return KeyRule(lambda value: re.fullmatch(pattern, value) is not None, text)


def not_empty(text: str) -> KeyRule:
    """Take a text or a list with anything in it."""
    return KeyRule(lambda value: len(value) > 0, text)


def some_of(*allowed: str) -> tuple[KeyRule, ...]:
    """Take a list of known words, at least one and each but once."""
    return not_empty(f"must name at least one of {', '.join(allowed)}"), one_of(*allowed, each=True), DISTINCT


def extents(*lengths: int, largest: int = 1 << 62) -> KeyRule:
    """Take the edges of a box of voxels, as many as are allowed."""
    text = f"must be {' or '.join(map(str, lengths))} whole numbers of 1 or more, in voxels, ending with y, x"
    return KeyRule(
        lambda value: len(value) in lengths and 1 <= min(value) <= max(value) <= largest,
        text if largest > LARGEST_WINDOW else f"{text}, none above {largest}",
    )


def edges(unit: str) -> KeyRule:
    """Take lengths along z, y and x."""
    text = f"must be 3 positive numbers (z, y, x), in {unit}"
    return KeyRule(lambda value: len(value) == 3 and all(0 < v < math.inf for v in value), text)


def positive(text: str) -> KeyRule:
    """Take a finite number above 0."""
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
