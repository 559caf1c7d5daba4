"""OME-Zarr 0.1 to 0.6: which arrays are levels of an image, their axes, sizes and origins; for ``formats.zarr``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.axes import SPATIAL, letters_of
from connectomics.volumes.metadata.frame import Frame, numbers_in
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import Source, three_positive

OLD_AXES = "tczyx"
"""Axes of 0.1 and 0.2, which name none."""
DEEPEST_SEQUENCE = 8
_KINDS = {"channel": "c", "time": "t"}


@dataclass(frozen=True, slots=True)
class OmeLevel:
    """What OME metadata say of one array: letters of its axes, where its voxels are, and the name of the statement."""

    letters: str
    frame: Frame
    where: str


def image_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The first entry of ``multiscales`` in a group's attributes; empty where there is none."""
    entries = ome_of(attributes).get("multiscales")
    first = entries[0] if isinstance(entries, list) and entries else {}
    return first if isinstance(first, dict) else {}


def levels_of(image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arrays of an image, the finest first."""
    datasets = image.get("datasets", [])
    return [dataset for dataset in datasets if isinstance(dataset, dict)] if isinstance(datasets, list) else []


def refuse_plates(source: Source, attributes: Mapping[str, Any]) -> None:
    """Refuse a plate of wells, or a well of fields, which is many images, by a VolumeError that tells how to name one.

    Raises VolumeError.
    """
    for kind, of, name in (("plate", "wells", "A/1/0"), ("well", "images", "0")):
        if isinstance(ome_of(attributes).get(kind), dict):
            raise VolumeError(
                f"{source.uri}: a {kind} of OME-Zarr{'' if kind == 'plate' else ' (part of a plate)'}, whose {of} are "
                f"images of their own; name one, such as {source.path.name}/{name}."
            )


def ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OME metadata in a group's attributes, which up to 0.4 are these themselves."""
    ome = attributes.get("ome")
    return ome if isinstance(ome, dict) else attributes


def level_of(source: Source, image: Mapping[str, Any], dataset: Mapping[str, Any], group: str) -> OmeLevel:
    """Axes and frame of one level.

    Parameters
    ----------
    source
        The request.
    image, dataset
        The entry of ``multiscales``, and the level's entry in it.
    group
        Name of the group whose metadata these are.

    Raises
    ------
    VolumeError
        If a transformation turns, shears or maps the image, or a unit is unknown.
    """
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in _axes(image)]
    letters = "".join(_letter(axis) for axis in axes)
    scale, origin = np.ones(len(axes)), np.zeros(len(axes))
    where = f"`multiscales` of `{group}`"
    for holder in (dataset, image):
        for kind, values in _steps(source, holder.get("coordinateTransformations"), len(axes), where):
            if kind == "scale":
                scale, origin = scale * values, origin * values
            else:
                origin = origin + values
    frame = Frame()
    if all(letters.count(letter) == 1 for letter in SPATIAL):
        order = [letters.index(letter) for letter in SPATIAL]
        keys = [f"`unit` of axis {axes[i].get('name')} in {where}" for i in order]
        units = [nanometres(source, axes[i].get("unit"), key) for i, key in zip(order, keys, strict=True)]
        if None not in units:
            factors = [unit or 0.0 for unit in units]
            size = three_positive(scale[order] * factors)
            z, y, x = (float(value) for value in origin[order] * factors)
            frame = Frame(size, (z, y, x), where) if size else Frame()
    return OmeLevel(letters, frame, where)


def _axes(image: Mapping[str, Any]) -> list[Any]:
    """The axes, of 0.6 those of the first coordinate system, into which datasets are transformed."""
    systems = image.get("coordinateSystems")
    stated = image.get("axes")
    if stated is None and isinstance(systems, list) and systems and isinstance(systems[0], dict):
        stated = systems[0].get("axes")
    return stated if isinstance(stated, list) and stated else list(OLD_AXES)


def states_axes(image: Mapping[str, Any]) -> bool:
    """Whether an image names its axes; 0.1 and 0.2 do not."""
    return "axes" in image or "coordinateSystems" in image


def _letter(axis: Mapping[str, Any]) -> str:
    letter = letters_of([axis.get("name")]) or "?"
    return letter if letter in "tczyx" else _KINDS.get(str(axis.get("type")), "?")


def _steps(source: Source, stated: object, count: int, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Scales and translations in their order; sequences, which 0.6 has, are taken apart."""
    for step in stated if isinstance(stated, list) else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "sequence" and depth < DEEPEST_SEQUENCE:
            yield from _steps(source, step.get("transformations"), count, where=where, depth=depth + 1)
        elif kind in ("scale", "translation"):
            values = numbers_in(step.get(kind))
            if values is None or len(values) != count:
                raise VolumeError(
                    f"{source.uri}: a {kind} in {where} is {step.get(kind)!r:.80}, expected {count} numbers, one an "
                    "axis; correct it."
                )
            yield kind, np.asarray(values)
        elif kind != "identity":
            raise VolumeError(
                f"{source.uri}: a transformation of type {kind!r:.80} in {where} cannot be followed; expected scale, "
                "translation, identity or a sequence of them. Write the image again with them."
            )
