"""Zarr v2, v3 and OME-Zarr volumes through TensorStore; ``path.zarr::0`` picks a level; for ``opening``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from natsort import natsorted

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import chunked_volume, inner_path, open_stored
from connectomics.volumes.formats.codecs.zarr_codecs import as_tensorstore_takes, foreign_codecs
from connectomics.volumes.metadata.axes import SPATIAL, StatedAxes, agreed, letters_of
from connectomics.volumes.metadata.frame import AttributeHolder, Frame, agreed_frame
from connectomics.volumes.metadata.ome import (
    OmeLevel,
    image_of,
    level_of,
    levels_of,
    ome_of,
    refuse_plates,
    states_axes,
)
from connectomics.volumes.metadata.transforms import pixel_resolution_frame, transform_frame
from connectomics.volumes.source import (
    DEEPEST,
    READ_ERRORS,
    Source,
    arrays_below,
    files_below,
    folded_identity,
    json_at,
    some_of,
    unreadable,
)
from connectomics.volumes.stored import Layout, StoredVolume, layout_of

ARRAY_V2 = ".zarray"
LAYOUT = "bioformats2raw.layout"
METADATA_FILES = ("zarr.json", ARRAY_V2, ".zgroup")
_DRIVERS = {2: "zarr", 3: "zarr3"}
_AXIS_NAMES = (
    ("dimension_names", "dimension_names"),
    ("attributes", "_ARRAY_DIMENSIONS"),
    ("attributes", "axis_names"),
    ("attributes", "dimension_names"),
)
"""Zarr v3's own names of axes, those of xarray and funlib among the attributes, and v3's name there."""


@dataclass(frozen=True, slots=True)
class _Node:
    """An array or group folder: its format (2 or 3), its metadata and its attributes."""

    path: Path
    version: int
    is_array: bool
    metadata: dict[str, Any]
    attributes: dict[str, Any]


def open_zarr(source: Source) -> StoredVolume:
    """Open one array of a Zarr hierarchy for lazy reading.

    Raises
    ------
    VolumeError
        If there is no such array, its metadata are damaged, or its codecs or dtype are not supported.
    """

    def identity() -> dict[str, object]:
        files = list(files_below(node.path))
        if group is not None:
            files += [(f"../{name}", path) for name, path in _metadata_files(group)]
        return {**folded_identity(source.path.name, files), "array": source.inner or ""}

    try:
        node = _choose(source)
        group, ome = _described(source, node)
        return _volume(source, node, ome, place=node.path, identity=identity)
    except READ_ERRORS as error:
        raise unreadable(source, "Zarr", error) from error


def open_zarr_in(
    source: Source, *, store: Callable[[Path], Mapping[str, Any]], identity: Callable[[], dict[str, object]]
) -> StoredVolume:
    """Open an array whose metadata alone are in a folder.

    Parameters
    ----------
    source
        The request, with the folder of the metadata for its path.
    store
        TensorStore's description of where the chunks of the array in a folder are.
    identity
        Of the volume.

    Raises
    ------
    VolumeError
        As ``open_zarr``, or where only zarr-python knows its codecs.
    """
    node = _choose(source)
    _, ome = _described(source, node)
    return _volume(source, node, ome, place=store(node.path), identity=identity)


def _volume(
    source: Source,
    node: _Node,
    ome: OmeLevel | None,
    *,
    place: Path | Mapping[str, Any],
    identity: Callable[[], dict[str, object]],
) -> StoredVolume:
    stated = _stated_axes(source, node, ome)
    layout = layout_of(source, _shape(source, node), *(stated or (None,)))
    _require_plain(source, node)
    frames = _frame(source, node, layout, named=stated is not None)
    frame = agreed_frame(source, [*([ome.frame] if ome else []), *frames])
    foreign = foreign_codecs(node.metadata)
    if foreign and isinstance(place, Path):
        from connectomics.volumes.formats.codecs.zarr_python import second_reader

        return second_reader(source, layout, place, frame=frame, identity=identity, codecs=foreign)
    if foreign:
        raise VolumeError(
            f"{source.uri}: its codec {foreign[0]!r:.40} is not read inside a zip file; unpack it and name the folder."
        )
    return chunked_volume(source, layout, _opened(node, place), frame=frame, identity=identity)


def open_array(path: Path, version: int, *, writable: bool = False) -> Any:
    """TensorStore's handle of the array in a folder; written chunks are kept even where all zero."""
    options = {"store_data_equal_to_fill_value": True} if writable else {}
    return open_stored(_DRIVERS[version], path, writable=writable, **options)


def _opened(node: _Node, place: Path | Mapping[str, Any]) -> Any:
    """TensorStore's handle for reading, where an absent chunk is an error if its voxels are undefined: no fill value.

    What other programs write and TensorStore takes too strictly is replaced.
    """
    whole = {} if node.metadata.get("fill_value") is not None else {"fill_missing_data_reads": False}
    lenient = as_tensorstore_takes(node.metadata)
    instead = None if lenient == node.metadata else {ARRAY_V2 if node.version == 2 else METADATA_FILES[0]: lenient}
    return open_stored(_DRIVERS[node.version], place, instead=instead, **whole)


def _node(path: Path) -> _Node | None:
    """The array or group in a folder, or None where there is neither."""
    found = {name: json_at(path / name) for name in METADATA_FILES if (path / name).exists()}
    if any(not isinstance(metadata, dict) for metadata in found.values()):
        raise ValueError(f"the metadata in {path} are not a JSON object")
    if "zarr.json" in found:
        metadata = found["zarr.json"]
        return _Node(
            path, 3, metadata.get("node_type") == "array", metadata, attributes=metadata.get("attributes") or {}
        )
    if found:
        attributes = json_at(path / ".zattrs") if (path / ".zattrs").exists() else {}
        return _Node(path, 2, ".zarray" in found, found.get(".zarray", {}), attributes=attributes)
    return None


def _is_array(folder: Path) -> bool:
    node = _node(folder)
    return node is not None and node.is_array


def _choose(source: Source) -> _Node:
    """The array that the request means."""
    inner, root = inner_path(source, "Zarr"), source.path
    node = _node(root / inner)
    if node is not None and node.is_array:
        return node
    if node is not None:
        refuse_plates(source, node.attributes)
        node = _image_of(source, node)
        for dataset in levels_of(image_of(node.attributes)):
            level = PurePosixPath(str(dataset.get("path")))
            chosen = None if ".." in level.parts or level.is_absolute() else _node(node.path / level)
            if chosen is not None and chosen.is_array:
                return chosen
            raise VolumeError(
                f"{source.uri}: the multiscales metadata name the array {str(level)!r:.80}, which is absent."
            )
    names = arrays_below(root, _is_array)
    within = [name for name in names if PurePosixPath(name).is_relative_to(inner)]
    only = _node(root / within[0]) if len(within) == 1 and node is not None else None
    if only is not None:
        return only
    if not names:
        raise VolumeError(f"{source.uri}: no Zarr array in this folder; expected zarr.json or .zarray files.")
    what = f"no array or level {source.inner!r}" if source.inner else "several arrays and no multiscales metadata"
    raise VolumeError(f"{source.uri}: {what}; the folder holds {some_of(names)}. Name one as {root.name}::array.")


def _image_of(source: Source, node: _Node) -> _Node:
    """The group itself, or where it is a root that bioformats2raw laid out, that of its only image."""
    if LAYOUT not in ome_of(node.attributes):
        return node
    named = {name: _node(node.path / name) for name in _series(node)}
    images = [name for name, group in named.items() if group is not None and image_of(group.attributes)]
    if len(images) > 1:
        raise VolumeError(
            f"{source.uri}: {len(images)} images in one folder ({some_of(images)}); name one as "
            f"{source.path.name}::{PurePosixPath(source.inner or '') / images[0]}."
        )
    return (named[images[0]] if images else None) or node


def _series(root: _Node) -> list[str]:
    """Names of the images of a root that bioformats2raw laid out: as its group OME lists them, else by number."""
    listing = _node(root.path / "OME")
    attributes = listing.attributes if listing is not None else {}
    names = ome_of(attributes).get("series")
    if not isinstance(names, list):
        names = natsorted(path.name for path in root.path.iterdir() if path.name.isdecimal())
    plain = [PurePosixPath(str(name)) for name in names]
    return [str(name) for name in plain if not name.is_absolute() and ".." not in name.parts]


def _shape(source: Source, node: _Node) -> list[int]:
    shape = node.metadata.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise VolumeError(f"{source.uri}: the Zarr metadata state no usable shape, but {shape!r:.80}.")
    return shape


def _require_plain(source: Source, node: _Node) -> None:
    """Refuse structured, text and object arrays by their metadata, before any codec sees them."""
    if node.version == 3:
        name = node.metadata.get("data_type")
        plain = isinstance(name, str) and name.rstrip("0123456789") in ("bool", "int", "uint", "float")
    else:
        name = node.metadata.get("dtype")
        plain = isinstance(name, str) and name[1:2] in set("biuf")
    if not plain:
        raise VolumeError(
            f"{source.uri}: voxels of type {name!r:.80} cannot be read as intensities or labels; expected "
            "bool, integers or floats."
        )


def _stated_axes(source: Source, node: _Node, ome: OmeLevel | None) -> StatedAxes | None:
    """Letters of the axes by OME metadata and by the array's own names, or None where there are none."""
    stated: list[StatedAxes] = [(ome.letters, ome.where)] if ome else []
    for key, names in _AXIS_NAMES:
        found = (node.metadata if key == names else node.attributes).get(names)
        letters = letters_of(found) if isinstance(found, list) else None
        stated += [(letters, f"`{names}` of `{node.path.name}`")] if letters else []
    return agreed(source, stated)


def _frame(source: Source, node: _Node, layout: Layout, *, named: bool) -> list[Frame]:
    """What the array's own attributes say: gunpowder's, daisy's and funlib's, and those of Java's programs."""
    spatial = "".join(letter for letter in layout.letters if letter in SPATIAL)
    order = spatial if named and source.axes is None and len(spatial) == 3 else SPATIAL
    name = node.path.name
    return [
        AttributeHolder(source, node.attributes, name, order=order, letters=layout.letters).frame(),
        transform_frame(source, node.attributes, name),
        pixel_resolution_frame(source, node.attributes, name),
    ]


def _described(source: Source, node: _Node) -> tuple[Path | None, OmeLevel | None]:
    """The nearest group above the array whose OME metadata name it, and what they say."""
    for parent in list(node.path.parents)[:DEEPEST]:
        group = _node(parent)
        if group is None:
            if not parent.is_relative_to(source.path):
                return None, None
            continue
        image = image_of(group.attributes)
        for dataset in levels_of(image):
            if parent / str(dataset.get("path")) == node.path:
                known = states_axes(image) or len(_shape(source, node)) == 5
                return (parent, level_of(source, image, dataset, parent.name)) if known else (None, None)
    return None, None


def level_names(folder: Path) -> list[str]:
    """Names of the levels of the group in a folder, the finest first; empty where its metadata name none."""
    node = _node(folder)
    if node is None or node.is_array:
        return []
    return [str(level.get("path")) for level in levels_of(image_of(node.attributes))]


def _metadata_files(folder: Path) -> list[tuple[str, Path]]:
    return [(name, folder / name) for name in ("zarr.json", ".zattrs") if (folder / name).exists()]
