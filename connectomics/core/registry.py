"""Features by name: those of this package, and those that other packages add through entry points.

A registry knows where each feature lives and imports it when it is asked for, so that looking at names costs nothing.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from connectomics.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The features of one kind.

    Parameters
    ----------
    kind
        What a feature is called in messages: ``backend``.
    group
        The entry points by which other packages add some: ``connectomics.backends``.
    built_in
        Where those of this package live, ``module:attribute``, by name; or a small value itself, which is no text.
        Nobody else may take these names.
    """

    kind: str
    group: str
    built_in: Mapping[str, str | T]

    @functools.cached_property
    def _added(self) -> Mapping[str, EntryPoint]:
        return {point.name: point for point in _installed().select(group=self.group) if point.name not in self.built_in}

    def names(self) -> tuple[str, ...]:
        """All names, those of this package first."""
        return (*self.built_in, *sorted(self._added))

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._added

    def look_again(self) -> None:
        """Find features of packages that were installed, or taken away, while this process ran."""
        vars(self).pop("_added", None)
        _installed.cache_clear()

    def load(self, name: str) -> T:
        """Import a feature.

        Raises
        ------
        ConfigError
            If there is none of this name, or the package that adds it cannot be imported.
        """
        if name in self.built_in:
            place = self.built_in[name]
            if not isinstance(place, str):
                return place
            module, _, attribute = place.partition(":")
            found: T = vars(importlib.import_module(module))[attribute]
            return found
        if name not in self._added:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no {self.kind} '{name}'; known are {', '.join(self.names())}{hint}")
        point = self._added[name]
        try:
            added: T = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the {self.kind} '{name}' cannot be imported from {point.value} ({error}); mend or uninstall "
                f"{point.dist.name if point.dist else 'the package that adds it'}"
            ) from error
        return added


@functools.cache
def _installed() -> Any:  # its kind differs between versions of Python
    """Look through all installed packages, which takes a tenth of a second, once."""
    return entry_points()
