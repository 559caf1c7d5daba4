"""N5 volumes through TensorStore; ``path.n5::dataset`` names an array or a group of levels; for ``opening``.

N5 counts axes from the fastest: without further word they are x, y, z, c.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import Frame, chunked_volume, inner_path, open_stored
from connectomics.volumes.source import (
    READ_ERRORS,
    Source,
    arrays_below,
    files_below,
    folded_identity,
    json_at,
    nanometres,
    some_of,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, layout_of
from connectomics.volumes.volume import Nanometres

LETTERS = {2: "xy", 3: "xyz", 4: "xyzc"}
ATTRIBUTES = "attributes.json"
TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
COMPRESSIONS: dict[str, dict[str, object]] = {
    "raw": {},
    "gzip": {"level": -1, "useZlib": False},
    "bzip2": {"blockSize": 9},
    "xz": {"preset": 6},
    "blosc": {"cname": "blosclz", "clevel": 6, "shuffle": 0},
    "zstd": {"level": 1},
}
"""What TensorStore reads, each with the members that it knows and asks for; other writers state more, or fewer."""


def open_n5(source: Source) -> StoredVolume:
    """Open one array of an N5 container for lazy reading.

    Raises
    ------
    VolumeError
        If there is no such array, its attributes are damaged, or its compression or type is not supported.
    """

    def identity() -> dict[str, object]:
        files = list(files_below(folder))
        parent = folder.parent / ATTRIBUTES
        if folder != source.path and parent.exists():
            files.append((f"../{ATTRIBUTES}", parent))
        return {**folded_identity(source.path.name, files), "array": source.inner or ""}

    try:
        folder = _choose(source)
        attributes = _attributes(folder)
        layout = layout_of(source, _dimensions(source, attributes), LETTERS.get(len(attributes["dimensions"])))
        _require_known(source, attributes)
        array = open_stored("n5", folder, instead={ATTRIBUTES: _as_stored(attributes)})
        frame = _frame(folder, attributes, source.path)
        return chunked_volume(source, layout, array, frame=frame, identity=identity)
    except READ_ERRORS as error:
        raise unreadable(source, "N5", error) from error


def _attributes(folder: Path) -> dict[str, Any]:
    path = folder / ATTRIBUTES
    content = json_at(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{ATTRIBUTES} in {folder.name} is not a JSON object")
    return content


def _is_array(folder: Path) -> bool:
    return "dimensions" in _attributes(folder)


def _choose(source: Source) -> Path:
    """The folder of the array that the request means: itself, its finest level ``s0``, or the only one."""
    inner, root = inner_path(source, "N5"), source.path
    for candidate in (root / inner, root / inner / "s0"):
        if _is_array(candidate):
            return candidate
    names = arrays_below(root, _is_array)
    within = [name for name in names if PurePosixPath(name).is_relative_to(inner)]
    levels = [name for name in within if PurePosixPath(name).name == "s0"]
    only = within if len(within) == 1 else levels
    if len(only) == 1 and all(PurePosixPath(name).parent == PurePosixPath(only[0]).parent for name in within):
        return root / only[0]
    if not names:
        raise VolumeError(f"{source.uri}: no N5 array in this folder; expected {ATTRIBUTES} with dimensions.")
    what = f"no array {source.inner!r}" if source.inner else "several arrays"
    raise VolumeError(f"{source.uri}: {what}; the folder holds {some_of(names)}. Name one as {root.name}::array.")


def _dimensions(source: Source, attributes: dict[str, Any]) -> list[int]:
    found = attributes["dimensions"]
    if not isinstance(found, list) or not all(isinstance(n, int) for n in found):
        raise VolumeError(f"{source.uri}: the N5 attributes state no usable dimensions, but {found!r:.80}.")
    return found


def _require_known(source: Source, attributes: dict[str, Any]) -> None:
    if attributes.get("isLabelMultiset"):
        raise VolumeError(
            f"{source.uri}: a label multiset of Paintera, in which a voxel has several labels, cannot be read; export "
            "labels of one number a voxel, for example from Paintera's menu or with paintera-conversion-helper."
        )
    kind = _compression(attributes).get("type")
    for what, found, known in (("type", attributes.get("dataType"), TYPES), ("compression", kind, COMPRESSIONS)):
        if found not in known:
            raise VolumeError(
                f"{source.uri}: N5 {what} {found!r:.80} cannot be read; expected one of {', '.join(known)}. "
                "Write the array again in one of them."
            )


def _compression(attributes: dict[str, Any]) -> dict[str, Any]:
    """How the chunks are packed; before N5 2.0 the name alone stood under another key."""
    found = attributes.get("compression", {"type": attributes.get("compressionType")})
    return found if isinstance(found, dict) else {"type": found}


def _as_stored(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes with a compression that TensorStore takes: what others state of it besides is left out."""
    stated = _compression(attributes)
    known = {name: stated.get(name, usual) for name, usual in COMPRESSIONS[stated["type"]].items()}
    return attributes | {"compression": {"type": stated["type"], **known}}


def _frame(folder: Path, attributes: dict[str, Any], root: Path) -> Frame:
    """From ``transform``, ``pixelResolution`` or ``resolution`` of the array, else of the group of levels above it.

    The group's size is that of level s0, multiplied by the array's ``downsamplingFactors``. An array with factors and
    a size of its own says nothing, as programs disagree on what that size is.
    """
    if isinstance(attributes.get("transform"), dict):
        return _of_transform(attributes["transform"])
    factors = attributes.get("downsamplingFactors", [1, 1, 1])
    own = _size(attributes)
    whole = factors == [1, 1, 1]
    if own is not None:
        return Frame(own, _offset(attributes)) if whole else Frame()
    if folder == root:
        return Frame()
    above, steps = _size(_attributes(folder.parent)), three_positive(factors)
    if above is None or steps is None:
        return Frame()
    return Frame((above[0] * steps[2], above[1] * steps[1], above[2] * steps[0]))


def _size(attributes: dict[str, Any]) -> Nanometres | None:
    """Voxel size (z, y, x): ``pixelResolution`` in its unit, else ``resolution`` in its units.

    Both count x first; a ``resolution`` without units is in nanometres.
    """
    stated = attributes.get("pixelResolution")
    if isinstance(stated, dict):
        values, units = stated.get("dimensions"), [stated.get("unit")] * 3
    else:
        values, units = attributes.get("resolution"), attributes.get("units", ["nm"] * 3)
    size = three_positive(values)
    if size is None:
        return None
    factors = [nanometres(unit) for unit in units] if isinstance(units, list) and len(units) == 3 else [math.nan] * 3
    return three_positive([size[i] * factors[i] for i in (2, 1, 0)])


def _offset(attributes: dict[str, Any]) -> Nanometres:
    """``offset`` (x, y, z) in nanometres beside ``resolution``; zero where there is none."""
    values = attributes.get("offset")
    if "resolution" not in attributes or "units" in attributes or not isinstance(values, list) or len(values) != 3:
        return (0.0, 0.0, 0.0)
    x, y, z = (float(value) for value in values)
    return (z, y, x)


def _of_transform(transform: dict[str, Any]) -> Frame:
    """``transform`` names its axes, so their order does not matter."""
    axes, units = transform.get("axes"), transform.get("units")
    scale, shift = transform.get("scale"), transform.get("translate")
    if not isinstance(axes, list) or not isinstance(units, list) or not isinstance(scale, list):
        return Frame()
    moved = shift if isinstance(shift, list) else [0.0] * len(axes)
    rows = {
        str(axis): (float(step) * nanometres(unit), float(start) * nanometres(unit))
        for axis, unit, step, start in zip(axes, units, scale, moved, strict=True)
    }
    z, y, x = (rows.get(letter, (math.nan, math.nan)) for letter in "zyx")
    size = three_positive((z[0], y[0], x[0]))
    return Frame(size, (z[1], y[1], x[1])) if size else Frame()
