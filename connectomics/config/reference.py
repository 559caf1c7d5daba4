"""What each key of the configuration is called, its default and what it means, for ``connectomics config keys``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from connectomics.config.key_rules import DOC
from connectomics.config.schema import Config
from connectomics.config.validation import shown
from connectomics.core.features import DECODING_STEPS

_POINTER = re.compile(r"[,;] see \[[^\]]+\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key, its default as YAML has it, and what it means in Markdown; for keys of steps what the step does."""

    key: str
    default: str
    meaning: str

    @property
    def plain(self) -> str:
        """The meaning without the marks of Markdown."""
        return _LINK.sub(r"\1", _POINTER.sub("", self.meaning)).replace("`", "")


def entries(prefix: str = "") -> list[KeyEntry]:
    """All keys that begin with ``prefix``, in the schema's order, then those of each step of ``decoding``.

    Examples
    --------
    >>> [(entry.key, entry.default) for entry in entries("inference.output.t")]
    [('inference.output.table', 'parquet')]
    """
    steps = (entry for name in DECODING_STEPS.names() for entry in _of_step(name, DECODING_STEPS.load(name)))
    return [entry for entry in (*_of_section(Config(), ""), *steps) if entry.key.startswith(prefix)]


def sections() -> dict[str, str]:
    """What each section is about, by its dotted name."""

    def within(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                first = (type(value).__doc__ or "").partition("\n")[0]
                yield prefix + field.name, first.partition(": ")[2].replace("`", "").rstrip(".")
                yield from within(value, f"{prefix}{field.name}.")

    return dict(within(Config(), ""))


def _of_section(section: Any, prefix: str) -> Iterator[KeyEntry]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _of_section(value, f"{prefix}{field.name}.")
        else:
            yield KeyEntry(prefix + field.name, _written(value), field.metadata[DOC])


def _of_step(name: str, kind: type[Any]) -> Iterator[KeyEntry]:
    first = (kind.__doc__ or "").partition("\n")[0]
    for field in dataclasses.fields(kind):
        default = name if field.name == "name" else _written(field.default)
        yield KeyEntry(f"decoding[{name}].{field.name}", default, first)


def _written(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return shown(value).strip("'") or '""'
