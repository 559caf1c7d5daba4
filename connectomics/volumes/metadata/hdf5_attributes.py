"""What HDF5 datasets say of themselves: the order of their axes, their voxel size and origin; for ``formats.hdf5``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.metadata.axes import SPATIAL, StatedAxes, agreed, letters_of
from connectomics.volumes.metadata.frame import ATTRIBUTES, AttributeHolder, Frame, agreed_frame
from connectomics.volumes.metadata.units import nanometres
from connectomics.volumes.source import Source, three_positive
from connectomics.volumes.stored import Layout

AXISTAGS, AXIS_UNITS = "axistags", "axis_units"


def stated_axes(source: Source, dataset: Any) -> StatedAxes | None:
    """Letters of the stored axes by ilastik's ``axistags`` and by dimension labels, or None where there are none.

    Raises VolumeError if the two differ, or ``axistags`` cannot be read.
    """
    stated: list[StatedAxes] = []
    if AXISTAGS in dataset.attrs:
        letters = letters_of([tag.get("key") for tag in _axistags(source, dataset)])
        stated += [(letters, f"attribute `{AXISTAGS}` of `{dataset.name}`")] if letters else []
    names = [_label(dimension) for dimension in dataset.dims]
    letters = letters_of(names)
    stated += [(letters, f"dimension labels of `{dataset.name}`")] if letters else []
    return agreed(source, stated)


def _label(dimension: Any) -> str:
    """The label of a dimension, else the name of the only scale that is attached to it."""
    if dimension.label or len(dimension) != 1:
        return str(dimension.label)
    return str(dimension.keys()[0]).rpartition("/")[2]


def _axistags(source: Source, dataset: Any) -> list[Mapping[str, object]]:
    """The axes that ilastik (vigra) describes, in their stored order."""
    try:
        tags = json.loads(dataset.attrs[AXISTAGS])["axes"]
        if len(tags) == dataset.ndim and all(isinstance(tag.get("key"), str) for tag in tags):
            return list(tags)
        found = f"{len(tags)} axes for an array of {dataset.ndim}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        found = f"{dataset.attrs[AXISTAGS]!r:.80}"
    if source.axes is not None:
        return []
    raise VolumeError(
        f"{source.uri}: attribute `{AXISTAGS}` of `{dataset.name}` states {found}; expected ilastik's JSON with one "
        "key for each axis. State the axes with axes=, for example 'zyx' (inference.axes)."
    )


def stated_frame(source: Source, file: Any, dataset: Any, layout: Layout, *, named: bool) -> Frame:
    """Voxel size and origin by the dataset's attributes, else by those of its file; ``named``: the file names axes.

    Where it does, attributes count in the order of its axes; else z, y, x.
    """
    spatial = "".join(letter for letter in layout.letters if letter in SPATIAL)
    order = spatial if named and source.axes is None and len(spatial) == 3 else SPATIAL
    frames: list[Frame] = []
    own = dataset.file
    for holder in (dataset, own) if own.filename == file.filename else (dataset, own, file):
        attributes = holder.attrs
        values = {name: attributes[name] for name in ATTRIBUTES if name in attributes}
        frames.append(AttributeHolder(source, values, holder.name or "/", order=order, letters=layout.letters).frame())
        if frames[-1].voxel_size_nm is not None:
            break
    return agreed_frame(source, [*frames, _ilastik_frame(source, dataset)])


def _ilastik_frame(source: Source, dataset: Any) -> Frame:
    """Sizes in ``axistags`` in the units of ``axis_units``, without which they are not calibrated."""
    if AXISTAGS not in dataset.attrs or AXIS_UNITS not in dataset.attrs:
        return Frame()
    try:
        units = json.loads(dataset.attrs[AXIS_UNITS])
        sizes = {str(tag["key"]): float(str(tag["resolution"])) for tag in _axistags(source, dataset)}
    except (ValueError, TypeError, LookupError):
        return Frame()
    key, scaled = f"attribute `{AXIS_UNITS}` of `{dataset.name}`", []
    for letter in SPATIAL:
        factor = nanometres(source, units.get(letter), key) if isinstance(units, dict) else None
        scaled.append(np.nan if factor is None else sizes.get(letter, np.nan) * factor)
    size = three_positive(scaled)
    return Frame(size, where=f"attribute `{AXISTAGS}` of `{dataset.name}` in its `{AXIS_UNITS}`") if size else Frame()
