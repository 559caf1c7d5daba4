"""Zarr v2, v3 and OME-Zarr volumes through TensorStore; ``path.zarr::0`` picks a level; for ``opening``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.volumes.formats.chunked import Frame, chunked_volume, inner_path, open_stored
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
        node = _choose(source)
        ome = _frame(source, node)
        letters = ome.letters if ome else _dimension_names(node)
        where = f"axes of multiscales in {ome.group.name}" if ome else "dimension_names of the array"
        layout = layout_of(source, _shape(source, node), letters, where)
        _require_plain(source, node)
        array = open_array(node.path, node.version)
        return chunked_volume(source, layout, array, frame=ome.frame if ome else Frame(), identity=identity)
    except READ_ERRORS as error:
        raise unreadable(source, "Zarr", error) from error


def open_array(path: Path, version: int, *, writable: bool = False) -> Any:
    """TensorStore's handle of the array in a folder; written chunks are kept even where all zero."""
    options = {"store_data_equal_to_fill_value": True} if writable else {}
    return open_stored("zarr3" if version == 3 else "zarr", path, writable=writable, **options)


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
    where = f"coordinateTransformations of multiscales in {group.name}"
    return _OmeFrame(letters, group, Frame(voxel_size_nm, (z, y, x), where))


def level_names(folder: Path) -> list[str]:
    """Names of the levels of the group in a folder, the finest first; empty where its metadata name none."""
    node = _node(folder)
    return [] if node is None or node.is_array else [str(dataset.get("path")) for dataset in _datasets(node)]


def _metadata_files(folder: Path) -> list[tuple[str, Path]]:
    return [(name, folder / name) for name in ("zarr.json", ".zattrs") if (folder / name).exists()]
