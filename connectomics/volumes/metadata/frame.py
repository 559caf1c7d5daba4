"""Where the voxels of a volume are: voxel size and origin from the attributes that HDF5, Zarr and N5 arrays carry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.axes import SPATIAL
from connectomics.volumes.metadata.units import length_of, nanometres
from connectomics.volumes.source import Source, three_positive
from connectomics.volumes.volume import Nanometres

SIZES = {"voxel_size_nm": "nm", "element_size_um": "um", "resolution": None, "voxel_size": None}
"""Attributes that state a voxel size, with their unit; None: that of the attribute beside them, else nanometres."""
OFFSET = "offset"
UNITS = ("units", "unit")
ATTRIBUTES = (*SIZES, OFFSET, *UNITS)
TOLERANCE = 1e-5
NOWHERE = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Frame:
    """Voxel size and position of the first voxel (z, y, x), as far as metadata state them, and where they do."""

    voxel_size_nm: Nanometres | None = None
    origin_nm: Nanometres = NOWHERE
    where: str = ""
    origin_where: str = ""

    @property
    def found(self) -> dict[str, str]:
        """Where each of the two was found, for ``VolumeInfo``."""
        both = {"voxel size": self.where, "origin": self.origin_where or self.where}
        return {fact: where for fact, where in both.items() if where}


@dataclass(frozen=True, slots=True)
class AttributeHolder:
    """The attributes of one array or of what it lies in, and how to read numbers that they give an axis each.

    Parameters
    ----------
    source
        The request.
    values
        The attributes; only those in ``ATTRIBUTES`` are looked at.
    name
        Of the holder, for messages: "/raw".
    order
        Letters of the space axes in the order in which three numbers count them.
    letters
        Those of all stored axes, in which as many numbers count them.
    """

    source: Source
    values: Mapping[str, object]
    name: str
    order: str = SPATIAL
    letters: str = field(default="")

    def key(self, name: str) -> str:
        """An attribute in a message."""
        return f"attribute `{name}` of `{self.name}`"

    def frame(self) -> Frame:
        """Voxel size and origin.

        Raises
        ------
        VolumeError
            If a size is not three positive numbers, a unit is unknown, or two attributes state different sizes.
        """
        size, where = self._size()
        origin = self._origin()
        found = "" if origin is None else f"{self.key(OFFSET)}{self._beside()}"
        return Frame(size, origin or NOWHERE, where, found)

    def _size(self) -> tuple[Nanometres | None, str]:
        stated = list(self._sizes())
        for other, where in stated[1:]:
            require_same_size(self.source, stated[0], (other, where))
        return stated[0] if stated else (None, "")

    def _sizes(self) -> Iterator[tuple[Nanometres, str]]:
        if self.source.voxel_size_nm is not None:
            return
        for name, unit in SIZES.items():
            values = self._lengths(name)
            if values is None or not any(values):  # zeros stand for an unknown size
                continue
            factors = self._factors(name) if unit is None else self._fixed(name, unit)
            if factors is None:
                continue
            size = three_positive(np.multiply(values, factors))
            if size is None:
                raise self._unusable(name, "three positive numbers")
            yield size, f"{self.key(name)}{self._beside() if unit is None else ''}"

    def _lengths(self, name: str) -> tuple[float, float, float] | None:
        """The numbers (z, y, x) of an attribute; None where it is absent, or states an image's plane alone."""
        stated = self.values.get(name)
        if stated is None:
            return None
        numbers = numbers_in(stated)
        if numbers is not None and len(numbers) == 2 and not set(SPATIAL) <= set(self.letters or SPATIAL):
            return None
        if numbers is not None and len(numbers) == len(self.letters) != 3:
            numbers = [numbers[self.letters.index(a)] for a in SPATIAL if a in self.letters]
            if len(numbers) == 3:
                return (numbers[0], numbers[1], numbers[2])
        if numbers is None or len(numbers) != 3:
            raise self._unusable(name, f"three numbers ({', '.join(self.order)})")
        z, y, x = (numbers[self.order.index(a)] for a in SPATIAL)
        return (z, y, x)

    def _factors(self, of: str) -> tuple[float, float, float] | None:
        """Nanometres in the units (z, y, x); None where one says that nothing is calibrated."""
        name, stated = self._stated_units()
        if name is None:
            return (1.0, 1.0, 1.0)
        texts = _texts(stated)
        if len(texts) == 1:
            texts = texts * 3
        elif len(texts) == len(self.letters) != 3:
            texts = [texts[self.letters.index(a)] for a in SPATIAL if a in self.letters]
        elif len(texts) == 3:
            texts = [texts[self.order.index(a)] for a in SPATIAL]
        if len(texts) != 3:
            raise self._unusable(name, f"one unit, or one for each number of `{of}`")
        factors = [nanometres(self.source, text, self.key(name)) for text in texts]
        return None if None in factors else (factors[0] or 0.0, factors[1] or 0.0, factors[2] or 0.0)

    def _fixed(self, name: str, unit: str) -> tuple[float, float, float]:
        """Nanometres in the unit that an attribute's own name tells, with which one beside it must agree."""
        factor = length_of(unit) or math.nan
        beside, stated = self._stated_units()
        if beside is not None and not any(other in self.values for other, own in SIZES.items() if own is None):
            lengths = [length_of(text) for text in _texts(stated)]
            if any(length not in (None, factor) and not math.isnan(length or 0) for length in lengths):
                raise self._unusable(beside, f"{unit}, as the name of `{name}` says")
        return (factor, factor, factor)

    def _origin(self) -> Nanometres | None:
        """Position of the first voxel."""
        numbers = numbers_in(self.values.get(OFFSET))
        if OFFSET not in self.values or (numbers is not None and len(numbers) == 1):
            return None  # one number belongs to the values of voxels
        found, factors = self._lengths(OFFSET), self._factors(OFFSET)
        if found is None or factors is None:
            return None
        if not all(math.isfinite(value) for value in found):
            raise self._unusable(OFFSET, "three numbers")
        z, y, x = np.multiply(found, factors).tolist()
        return (z, y, x)

    def _stated_units(self) -> tuple[str | None, object]:
        return next(((name, self.values[name]) for name in UNITS if name in self.values), (None, None))

    def _beside(self) -> str:
        name, _ = self._stated_units()
        return "" if name is None else f" in its `{name}`"

    def _unusable(self, name: str, expected: str) -> VolumeError:
        shown = _shown(self.values[name])
        return VolumeError(
            f"{self.source.uri}: {self.key(name)} is {shown}, expected {expected}; correct it, or state the size as "
            "inference.voxel_size_nm=[z,y,x]."
        )


def require_same_size(source: Source, one: tuple[Nanometres, str], other: tuple[Nanometres, str]) -> None:
    """Refuse two statements of a voxel size that differ, by a VolumeError; the request's own goes before both.

    ``one`` and ``other`` are sizes, and where they stand.
    """
    (first, where), (second, there) = one, other
    if source.voxel_size_nm is None and not np.allclose(first, second, rtol=TOLERANCE, atol=0):
        raise VolumeError(
            f"{source.uri}: {where} says that voxels are {first} nm (z, y, x), but {there} says {second}; correct one, "
            "or state the size as inference.voxel_size_nm=[z,y,x]."
        )


def agreed_frame(source: Source, frames: Sequence[Frame]) -> Frame:
    """The first frame that states a size, with which the others must agree; origins are taken from where one is."""
    sized = [frame for frame in frames if frame.voxel_size_nm is not None]
    for other in sized[1:]:
        assert sized[0].voxel_size_nm is not None and other.voxel_size_nm is not None
        require_same_size(source, (sized[0].voxel_size_nm, sized[0].where), (other.voxel_size_nm, other.where))
    moved = [frame for frame in frames if frame.origin_nm != NOWHERE or frame.origin_where]
    chosen = sized[0] if sized else Frame()
    placed = next((frame for frame in [chosen, *moved] if frame.origin_nm != NOWHERE), chosen)
    if placed is chosen:
        return chosen
    where = placed.origin_where or placed.where
    return Frame(chosen.voxel_size_nm, placed.origin_nm, chosen.where, where)


def numbers_in(stated: object) -> list[float] | None:
    """Finite or other numbers in an attribute, or None where it holds something else."""
    try:
        array = np.asarray(stated)
        if array.dtype.kind not in "iuf" or array.size > 16:
            return None
        return [float(value) for value in array.ravel()]
    except (TypeError, ValueError):
        return None


def _texts(stated: object) -> list[object]:
    """A unit for all, or one an axis; what HDF5 and JSON give as arrays, lists, bytes or text."""
    if isinstance(stated, np.ndarray):
        stated = stated.tolist()
    return list(stated) if isinstance(stated, list | tuple) else [stated]


def _shown(value: object) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 80 else f"{text[:80]} …"
