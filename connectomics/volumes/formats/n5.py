"""N5 volumes through TensorStore; ``path.n5::dataset`` names an array or a group of levels; for ``opening``.

N5 counts axes from the fastest: without further word they are x, y, z, c.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import chunked_volume, inner_path, open_stored
from connectomics.volumes.metadata.axes import StatedAxes, agreed, letters_of
from connectomics.volumes.metadata.frame import NOWHERE, AttributeHolder, Frame, agreed_frame
from connectomics.volumes.metadata.transforms import pixel_resolution_frame, scaled, transform_frame
from connectomics.volumes.source import (
    READ_ERRORS,
    Source,
    arrays_below,
    files_below,
    folded_identity,
    json_at,
    some_of,
    three_positive,
    unreadable,
)
from connectomics.volumes.stored import StoredVolume, layout_of

LETTERS = {2: "xy", 3: "xyz", 4: "xyzc", 5: "xyzct"}
ATTRIBUTES = "attributes.json"
OLD_COMPRESSION, MULTISET = "compressionType", "isLabelMultiset"
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
        if parent.exists():
            files.append((f"../{ATTRIBUTES}", parent))
        return {**folded_identity(source.path.name, files), "array": source.inner or ""}

    try:
        folder = _choose(source)
        attributes = _attributes(folder)
        letters, where = _letters(source, attributes, folder)
        layout = layout_of(source, _dimensions(source, attributes), letters, where)
        _require_known(source, attributes)
        array = open_stored("n5", folder, instead={ATTRIBUTES: _as_stored(attributes)})
        return chunked_volume(
            source, layout, array, frame=_frame(source, folder, attributes, layout.letters), identity=identity
        )
    except READ_ERRORS as error:
        raise unreadable(source, "N5", error) from error


def _mended(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as N5 2.0 states them: before, ``compressionType`` named the compression."""
    if "compression" in attributes or not isinstance(attributes.get(OLD_COMPRESSION), str):
        return attributes
    return attributes | {"compression": {"type": attributes[OLD_COMPRESSION]}}


def _as_stored(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes with a compression that TensorStore takes: what others state of it besides is left out."""
    stated = _mended(attributes)["compression"]
    known = {name: stated.get(name, usual) for name, usual in COMPRESSIONS[stated["type"]].items()}
    return attributes | {"compression": {"type": stated["type"], **known}}


def _letters(source: Source, attributes: dict[str, Any], folder: Path) -> tuple[str | None, str]:
    """Letters of the stored axes, x first: by names of axes that programs add, else by their number.

    ``_ARRAY_DIMENSIONS`` and ``axis_names`` were written by Python, which counts N5's axes from the slowest.
    """
    stated: list[StatedAxes] = []
    for key in ("axes", "_ARRAY_DIMENSIONS", "axis_names"):
        names = attributes.get(key)
        letters = letters_of(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
        if letters:
            stated.append((letters if key == "axes" else letters[::-1], f"`{key}` of `{folder.name}`"))
    usual = LETTERS.get(len(attributes["dimensions"]))
    return agreed(source, stated) or (usual, "N5's own order")


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
    if attributes.get(MULTISET) is True:
        raise VolumeError(
            f"{source.uri}: a label multiset of Paintera, which keeps several labels a voxel, cannot be read; convert "
            "it to a volume of labels (paintera-convert to-scalar)."
        )
    compression = _mended(attributes).get("compression")
    kind = compression.get("type") if isinstance(compression, dict) else compression
    for what, found, known in (("type", attributes.get("dataType"), TYPES), ("compression", kind, COMPRESSIONS)):
        if found not in known:
            raise VolumeError(
                f"{source.uri}: N5 {what} {found!r:.80} cannot be read; expected one of {', '.join(known)}. "
                "Write the array again in one of them."
            )


def _frame(source: Source, folder: Path, attributes: dict[str, Any], letters: str) -> Frame:
    """From ``transform``, ``pixelResolution`` or ``resolution`` of the array, else of the group of levels above it.

    The group's size is that of level s0, multiplied by the array's ``downsamplingFactors``. An array with factors and
    a size of its own says nothing, as programs disagree on what that size is.
    """
    transformed = transform_frame(source, attributes, folder.name)
    factors = attributes.get("downsamplingFactors", [1, 1, 1])
    own = agreed_frame(source, _sizes(source, attributes, folder.name, letters))
    if factors != [1, 1, 1] and (transformed.voxel_size_nm is not None or own.voxel_size_nm is not None):
        return transformed
    own = agreed_frame(source, [transformed, own])
    if own.voxel_size_nm is not None:
        return own
    above, steps = folder.parent, three_positive(factors)
    if steps is None or not (above / ATTRIBUTES).exists():
        return own
    group = agreed_frame(source, _sizes(source, _attributes(above), above.name, letters))
    if group.voxel_size_nm is None:
        return own
    if factors == [1, 1, 1]:
        return group
    return replace(scaled(group, steps[::-1], f"`downsamplingFactors` of `{folder.name}`"), origin_nm=NOWHERE)


def _sizes(source: Source, attributes: dict[str, Any], name: str, letters: str) -> list[Frame]:
    """What Java's ``pixelResolution`` says, and Janelia's ``resolution`` in its units; both count x first."""
    return [
        pixel_resolution_frame(source, attributes, name),
        AttributeHolder(source, attributes, name, order="xyz", letters=letters).frame(),
    ]
