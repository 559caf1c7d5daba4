"""Zarr v2, v3 and OME-Zarr volumes through TensorStore; ``path.zarr::0`` picks a level; for ``opening``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from natsort import natsorted

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import Frame, chunked_volume, inner_path, open_stored
from connectomics.volumes.formats.codecs.zarr_codecs import as_tensorstore_takes, foreign_codecs
from connectomics.volumes.source import (
    DEEPEST,
    NM_PER_UNIT,
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

METADATA_FILES = ("zarr.json", ".zarray", ".zgroup")


@dataclass(frozen=True, slots=True)
class _Node:
    """An array or group folder: its format (2 or 3), its metadata and its attributes."""

    path: Path
    version: int
    is_array: bool
    metadata: dict[str, Any]
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _OmeFrame:
    """What OME metadata say of one array: axis letters, and where its voxels are."""

    letters: str
    group: Path
    frame: Frame = field(default_factory=Frame)


def open_zarr(source: Source) -> StoredVolume:
    """Open one array of a Zarr hierarchy for lazy reading.

    Raises
    ------
    VolumeError
        If there is no such array, its metadata are damaged, or its codecs or dtype are not supported.
    """

    def identity() -> dict[str, object]:
        files = list(files_below(node.path))
        if ome is not None:
            files += [(f"../{name}", path) for name, path in _metadata_files(ome.group)]
        return {**folded_identity(source.path.name, files), "array": source.inner or ""}

    try:
        node, ome = _found(source)
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
    node, ome = _found(source)
    return _volume(source, node, ome, place=store(node.path), identity=identity)


def _found(source: Source) -> tuple[_Node, _OmeFrame | None]:
    node = _choose(source)
    return node, _frame(source, node)


def _volume(
    source: Source,
    node: _Node,
    ome: _OmeFrame | None,
    *,
    place: Path | Mapping[str, Any],
    identity: Callable[[], dict[str, object]],
) -> StoredVolume:
    layout = layout_of(source, _shape(source, node), ome.letters if ome else _dimension_names(node))
    _require_plain(source, node)
    frame = ome.frame if ome else Frame()
    foreign = foreign_codecs(node.metadata)
    if foreign and isinstance(place, Path):
        from connectomics.volumes.formats.codecs.zarr_python import second_reader

        return second_reader(source, layout, place, frame=frame, identity=identity, codecs=foreign)
    if foreign:
        raise VolumeError(
            f"{source.uri}: its codec {foreign[0]!r:.40} is not read inside a zip file; unpack it and name the folder."
        )
    array = open_array(place, node.version, metadata=node.metadata)
    return chunked_volume(source, layout, array, frame=frame, identity=identity)


def open_array(path: Path | Mapping[str, Any], version: int, *, writable: bool = False, metadata: Any = None) -> Any:
    """TensorStore's handle of the array in a folder; written chunks are kept even where all zero.

    ``metadata`` are those of an array that is read; what TensorStore takes too strictly is put right then.
    """
    options = {"store_data_equal_to_fill_value": True} if writable else {}
    lenient = as_tensorstore_takes(metadata)
    instead = {"zarr.json" if version == 3 else ".zarray": lenient} if lenient != metadata else None
    return open_stored("zarr3" if version == 3 else "zarr", path, writable=writable, instead=instead, **options)


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
        node = _image_of(source, node)
        for dataset in _datasets(node):
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
    ome = node.attributes.get("ome")
    stated = ome if isinstance(ome, dict) else node.attributes
    if "plate" in stated or "well" in stated:
        raise VolumeError(
            f"{source.uri}: a plate of many images, which is no volume; name one image of it, as in "
            f"{source.path.name}::A/1/0 for row A, column 1, first field."
        )
    if "bioformats2raw.layout" not in stated:
        return node
    images = [name for name in _series(node) if (found := _node(node.path / name)) is not None and _multiscale(found)]
    if len(images) > 1:
        raise VolumeError(
            f"{source.uri}: {len(images)} images in one folder ({some_of(images)}); name one as "
            f"{source.path.name}::{PurePosixPath(source.inner or '') / images[0]}."
        )
    return (_node(node.path / images[0]) if images else None) or node


def _series(root: _Node) -> list[str]:
    """Names of the images of a root that bioformats2raw laid out: as its group OME lists them, else by number."""
    listing = _node(root.path / "OME")
    attributes = listing.attributes if listing is not None else {}
    ome = attributes.get("ome")
    names = (ome if isinstance(ome, dict) else attributes).get("series")
    if not isinstance(names, list):
        names = natsorted(path.name for path in root.path.iterdir() if path.name.isdecimal())
    plain = [PurePosixPath(str(name)) for name in names]
    return [str(name) for name in plain if not name.is_absolute() and ".." not in name.parts]


def _multiscale(node: _Node) -> dict[str, Any]:
    """The first multiscales entry of a group, OME-Zarr 0.1 to 0.5; empty where there is none."""
    ome = node.attributes.get("ome")
    entries = (ome if isinstance(ome, dict) else node.attributes).get("multiscales")
    first = entries[0] if isinstance(entries, list) and entries else {}
    return first if isinstance(first, dict) else {}


def _datasets(node: _Node) -> list[dict[str, Any]]:
    return [dataset for dataset in _multiscale(node).get("datasets", []) if isinstance(dataset, dict)]


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


def _dimension_names(node: _Node) -> str | None:
    names = node.metadata.get("dimension_names")
    if isinstance(names, list) and all(name in set("tczyx") for name in names) and {"y", "x"} <= set(names):
        return "".join(names)
    return None


def _frame(source: Source, node: _Node) -> _OmeFrame | None:
    """OME metadata of the array, from the nearest group above it that names it."""
    for parent in list(node.path.parents)[:DEEPEST]:
        group = _node(parent)
        if group is None:
            if not parent.is_relative_to(source.path):
                return None
            continue
        for dataset in _datasets(group):
            if parent / str(dataset.get("path")) == node.path:
                multiscale = _multiscale(group)
                stated = "axes" in multiscale or len(_shape(source, node)) == 5
                return _frame_of(multiscale, dataset, parent) if stated else None
    return None


def _frame_of(multiscale: dict[str, Any], dataset: dict[str, Any], group: Path) -> _OmeFrame | None:
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in multiscale.get("axes") or "tczyx"]
    letters = "".join(
        name if name in set("tczyx") else "?" for name in (str(axis.get("name")).lower() for axis in axes)
    )
    scale, origin = np.ones(len(axes)), np.zeros(len(axes))
    for holder in (dataset, multiscale):
        for step in holder.get("coordinateTransformations") or []:
            values = step.get(step.get("type"))
            if step.get("type") == "scale":
                scale, origin = scale * np.asarray(values, float), origin * np.asarray(values, float)
            elif step.get("type") == "translation":
                origin = origin + np.asarray(values, float)
    if not all(letter in letters for letter in "zyx"):
        return _OmeFrame(letters, group)
    order = [letters.index(letter) for letter in "zyx"]
    factors = [NM_PER_UNIT.get(str(axes[i].get("unit")), np.nan) for i in order]
    voxel_size_nm = three_positive(scale[order] * factors)
    if voxel_size_nm is None:
        return _OmeFrame(letters, group)
    z, y, x = (float(value) for value in origin[order] * factors)
    return _OmeFrame(letters, group, Frame(voxel_size_nm, (z, y, x)))


def _metadata_files(folder: Path) -> list[tuple[str, Path]]:
    return [(name, folder / name) for name in ("zarr.json", ".zattrs") if (folder / name).exists()]
