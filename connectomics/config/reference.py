"""What each key of the configuration is called, takes and means, and its default, for ``connectomics config keys``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from connectomics.config.key_rules import DOC, RULES, kind_in_words
from connectomics.config.load import kinds
from connectomics.config.schema import Config
from connectomics.config.validation import shown, stated_values
from connectomics.core.features import DECODING_STEPS

_POINTER = re.compile(r"[,;] see \[[^\]]+\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key, its default as YAML has it, what it means in Markdown, and what it takes."""

    key: str
    default: str
    meaning: str
    allowed: str

    @property
    def plain(self) -> str:
        """The meaning without the marks of Markdown."""
        return _LINK.sub(r"\1", _POINTER.sub("", self.meaning)).replace("`", "")


def entries(prefix: str = "") -> list[KeyEntry]:
    """Return all keys that begin with ``prefix``, in the schema's order, then those of each step of ``decoding``.

    Examples
    --------
    >>> [(entry.key, entry.default, entry.allowed) for entry in entries("inference.output.t")]
    [('inference.output.table', 'parquet', 'text; must be one of parquet, csv, none')]
    """
    steps = (entry for name in DECODING_STEPS.names() for entry in _of_step(name, DECODING_STEPS.load(name)))
    return [entry for entry in (*_of_schema(), *steps) if entry.key.startswith(prefix)]


def sections() -> dict[str, str]:
    """Return what each section is about, by its dotted name."""
    found = {key: kind for key, kind in kinds().items() if dataclasses.is_dataclass(kind)}
    first = {key: (kind.__doc__ or "").partition("\n")[0] for key, kind in found.items()}
    return {key: line.partition(": ")[2].replace("`", "").rstrip(".") for key, line in first.items()}


def _of_schema() -> Iterator[KeyEntry]:
    for key, value, field in stated_values(Config()):
        rules = [f"{'each ' * rule.each}{rule.text}" for rule in field.metadata[RULES]]
        yield KeyEntry(key, _written(value), field.metadata[DOC], "; ".join([kind_in_words(kinds()[key]), *rules]))


def _of_step(name: str, kind: type[Any]) -> Iterator[KeyEntry]:
    """Yield a step's keys; what they mean, its docstring says, and its rules what they must be."""
    text, hints = inspect.getdoc(kind) or "", typing.get_type_hints(kind)
    told, rules = _told(text), {key: words for key, (_, words) in kind().rules().items()}
    for field in dataclasses.fields(kind):
        default = name if field.name == "name" else _written(field.default)
        allowed = "; ".join([kind_in_words(hints[field.name]), *filter(None, [rules.get(field.name)])])
        yield KeyEntry(
            f"decoding[{name}].{field.name}", default, told.get(field.name, text.partition("\n")[0]), allowed
        )


def _told(text: str) -> dict[str, str]:
    """Return what a docstring of numpydoc says of each parameter."""
    told: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("\nParameters\n")[2].splitlines()[1:]:
        if line.startswith(" "):
            told |= {name: f"{told.get(name, '')} {line.strip()}".strip() for name in names}
        else:
            names = line.split(", ")
    return {name: re.sub(r"\bNone\b", "null", words) for name, words in told.items()}


def _written(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return shown(value).strip("'") or '""'
