"""Pieces: the parts of objects that lie in one block, measured; what a block leaves behind for joining and relabelling.

A piece is a component of the block, or all its voxels of one value; ``merge`` makes objects of all blocks' pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.objects.components import Connectivity, connected_components
from connectomics.volumes.volume import Array

FIXED_POINT = 1 << 24  # probabilities are summed as whole multiples of its inverse, so that no order matters
PIECE = np.dtype(
    [
        ("first", "u8"),  # index of the first voxel in raster order of the volume
        ("value", "u8"),  # of its voxels in the input
        ("voxels", "u8"),
        ("sums", "u8", 3),  # of the voxels' z, y and x, exact up to 2^64
        ("start", "u4", 3),  # bounding box (z, y, x)
        ("stop", "u4", 3),
        ("border", "?"),  # whether it touches the volume's border
        ("probability", "u8"),  # sum, times FIXED_POINT where the input has fractions
        ("least", "f8"),  # smallest probability
        ("low", "u8"),  # smallest and largest value of the voxels beside it, where they were asked for
        ("high", "u8"),
    ]
)
"""One piece, or one object: what is known of it and can be merged with another piece by sums, minima and maxima."""
JOINT_KEYS = "joint_keys"
MERGED_BY: Mapping[str, np.ufunc] = {
    "first": np.minimum,
    "value": np.minimum,
    "voxels": np.add,
    "sums": np.add,
    "start": np.minimum,
    "stop": np.maximum,
    "border": np.logical_or,
    "probability": np.add,
    "least": np.minimum,
    "low": np.minimum,
    "high": np.maximum,
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """What one block leaves behind.

    Parameters
    ----------
    rows
        ``PIECE`` [n], in the order of their keys: the first voxel, or the value where pieces are joined by value.
    lengths, labels
        The block in raster order as runs of equal piece; piece 0 is background, piece k is row k - 1. A run
        ends with its line.
    joints
        Sorted numbers of the pieces that touch a neighbouring block.
    planes
        For each side that has a neighbour, as axis and 0 (low) or 1 (high), the block's outermost plane: 0 or
        1 + the position in ``joints``.
    """

    rows: Array
    lengths: Array
    labels: Array
    joints: Array
    planes: dict[str, Array]

    def arrays(self) -> dict[str, Array]:
        """What is kept of them, by name."""
        touching = self.joints.astype(np.int64) - 1
        found = {"rows": self.rows, "lengths": self.lengths, "labels": self.labels, "joints": self.joints}
        found |= {"joint_values": self.rows["value"][touching], JOINT_KEYS: self.rows["first"][touching]}
        return found | self.planes


def nothing(count: int) -> Array:
    """``PIECE`` [count] of no voxels: merged with a piece they give that piece."""
    rows = np.zeros(count, PIECE)
    for name, merge in MERGED_BY.items():
        if merge is np.minimum:
            kind = PIECE[name].base
            rows[name] = np.inf if kind.kind == "f" else np.iinfo(kind).max
    return rows


def merged(rows: Array, groups: Array) -> tuple[Array, Array]:
    """Rows of equal group merged to one.

    Parameters
    ----------
    rows
        ``PIECE`` [n].
    groups
        Whole numbers [n].

    Returns
    -------
    rows, groups
        One row for each group, groups ascending.
    """
    if not len(rows):
        return rows, groups
    order = np.argsort(groups, kind="stable")
    groups, rows = groups[order], rows[order]
    edges = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    if len(edges) == len(rows):
        return rows, groups
    result = np.empty(len(edges), PIECE)
    for name, merge in MERGED_BY.items():
        result[name] = merge.reduceat(rows[name], edges, axis=0)
    return result, groups[edges]


def together(rows: Array, others: Array) -> Array:
    """Rows merged one by one with others of the same length."""
    result = np.empty(len(rows), PIECE)
    for name, merge in MERGED_BY.items():
        result[name] = merge(rows[name], others[name])
    return result


def plane_name(axis: int, high: bool) -> str:
    """Name of a side of a block among its planes."""
    return f"plane_{axis}_{int(high)}"


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """Where the core of a block lies in a volume of shape (z, y, x)."""

    core: Box
    volume: Vec3

    def neighbours(self, axes: tuple[int, ...]) -> list[tuple[int, bool]]:
        """Sides, as axis and whether it is the far one, behind which another block lies."""
        low = [(axis, False) for axis in axes if self.core.start[axis] > 0]
        return low + [(axis, True) for axis in axes if self.core.stop[axis] < self.volume[axis]]


def component_pieces(
    values: Array, connectivity: Connectivity, cut: BlockPlacement, probabilities: Array | None = None
) -> Pieces:
    """The components of a block.

    Parameters
    ----------
    values
        bool or unsigned integers (z, y, x) of the core; 0 is background.
    connectivity
        Which voxels are neighbours.
    cut
        Where the block lies.
    probabilities
        (z, y, x) of the core: real numbers in 0 to 1, or unsigned integers of any scale.
    """
    numbered = connected_components(values, connectivity)
    lengths, labels, rows = _measured(numbered, values, cut, by_section=connectivity.by_section)
    order = np.argsort(rows["first"], kind="stable")
    rows, labels, renumbered = _reordered(rows, labels, order)
    if probabilities is not None:
        add_probabilities(rows, probabilities, lengths, labels)
    axes = (1, 2) if connectivity.by_section else (0, 1, 2)
    planes = {}
    for axis, high in cut.neighbours(axes):
        plane = numbered.take(-1 if high else 0, axis)
        planes[plane_name(axis, high)] = plane if renumbered is None else renumbered[plane]
    joints = _distinct(list(planes.values()))
    positions = np.zeros(len(rows) + 1, np.uint32)
    positions[joints] = np.arange(1, len(joints) + 1)
    return Pieces(rows, lengths, labels, joints, planes={name: positions[plane] for name, plane in planes.items()})


def hole_pieces(
    values: Array, read: Box, connectivity: Connectivity, cut: BlockPlacement, probabilities: Array | None
) -> Pieces:
    """The components of a block's background, with the smallest and largest value beside each.

    Parameters
    ----------
    values
        Unsigned integers (z, y, x) of ``read``.
    read
        The core and the voxels beside it that the volume has.
    connectivity
        By faces: 6, or 4 within a section.
    cut
        Where the block lies.
    probabilities
        As for ``component_pieces``.
    """
    core = cut.core.relative_to(read)
    empty = values[core.slices] == 0
    pieces = component_pieces(empty, connectivity, cut, probabilities)
    numbers = np.repeat(pieces.labels, pieces.lengths).reshape(empty.shape)
    for step in connectivity.steps:
        here = core.intersect(Box.of_shape(read.shape).shift(vec3([-s for s in step])))
        beside = values[here.shift(step).slices]
        touching = (beside != 0) & empty[here.relative_to(core).slices]
        at = numbers[here.relative_to(core).slices][touching].astype(np.int64) - 1
        np.minimum.at(pieces.rows["low"], at, beside[touching].astype(np.uint64))
        np.maximum.at(pieces.rows["high"], at, beside[touching].astype(np.uint64))
    return pieces


def value_pieces(
    values: Array, cut: BlockPlacement, probabilities: Array | None = None, *, by_section: bool = False
) -> Pieces:
    """All voxels of each value of a block, as one piece; pieces of equal value are one object.

    Parameters
    ----------
    values
        Unsigned integers (z, y, x) of the core; 0 is background.
    cut
        Where the block lies.
    probabilities
        As for ``component_pieces``.
    by_section
        Whether z has no border.
    """
    lengths, starts = _runs(values)
    found, labels = np.unique(values.ravel()[starts], return_inverse=True)
    if len(found) and found[0] != 0:
        labels = labels + 1
    lengths, labels, rows = _rows(lengths, starts, labels, values, cut=cut, by_section=by_section)
    if probabilities is not None:
        add_probabilities(rows, probabilities, lengths, labels)
    return Pieces(rows, lengths, labels, np.zeros(0, np.uint32), planes={})


def painted(lengths: Array, labels: Array, ids: Array, shape: Vec3) -> Array:
    """A block (z, y, x) from its runs, with ``ids[k]`` where piece k is; ``ids[0]`` is the background's."""
    return np.repeat(ids[labels], lengths).reshape(shape)


def add_probabilities(rows: Array, probabilities: Array, lengths: Array, labels: Array) -> None:
    """Put the sum and the minimum of the probabilities of each piece into its row."""
    flat = probabilities.ravel()
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    whole = flat.dtype.kind in "ub"
    pieces = labels.astype(np.int64) - 1
    inside = pieces >= 0
    least = np.minimum.reduceat(flat, starts)
    fixed = flat if whole else np.rint(flat * np.float64(FIXED_POINT)).astype(np.uint64)
    sums = np.add.reduceat(fixed, starts, dtype=np.uint64)
    np.minimum.at(rows["least"], pieces[inside], least[inside].astype(np.float64))
    np.add.at(rows["probability"], pieces[inside], sums[inside])


def _distinct(planes: list[Array]) -> Array:
    if not planes:
        return np.zeros(0, np.uint32)
    found = np.unique(np.concatenate([np.unique(plane) for plane in planes]))
    return found[found > 0].astype(np.uint32)


def _runs(array: Array) -> tuple[Array, Array]:
    """Lengths and starts of the runs of equal voxels; a run ends with its line."""
    flat = array.ravel()
    begins = np.empty(flat.shape, bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[:: array.shape[-1]] = True
    starts = np.flatnonzero(begins)
    return np.diff(starts, append=flat.size), starts


def _measured(numbered: Array, values: Array, cut: BlockPlacement, *, by_section: bool) -> tuple[Array, Array, Array]:
    lengths, starts = _runs(numbered)
    return _rows(lengths, starts, numbered.ravel()[starts], values, cut=cut, by_section=by_section)


def _rows(
    lengths: Array, starts: Array, labels: Array, values: Array, cut: BlockPlacement, *, by_section: bool
) -> tuple[Array, Array, Array]:
    """Runs in their smallest types, and a row for each label from 1 on, all of which occur."""
    shape = cut.core.shape
    labels = labels.astype(np.min_scalar_type(int(labels.max(initial=0))))  # what is small sorts faster
    order = np.argsort(labels, kind="stable")
    order = order[np.count_nonzero(labels == 0) :]
    label, start, length = labels[order], starts[order], lengths[order].astype(np.uint64)
    edges = np.flatnonzero(np.diff(label, prepend=0))
    rows = nothing(len(edges))
    small = (lengths.astype(np.min_scalar_type(shape[2])), labels)
    if not len(edges):
        return (*small, rows)
    line, x = np.divmod(start, shape[2])
    z, y = np.divmod(line, shape[1])
    place = [(p + o).astype(np.uint64) for p, o in zip((z, y, x), cut.core.start, strict=True)]
    first = start[edges]  # runs of a label are in raster order
    rows["value"] = values.ravel()[first]
    rows["voxels"] = np.add.reduceat(length, edges)
    rows["first"] = ((place[0] * np.uint64(cut.volume[1]) + place[1]) * np.uint64(cut.volume[2]) + place[2])[edges]
    rows["start"][:, 2] = np.minimum.reduceat(place[2], edges)
    rows["stop"][:, 2] = np.maximum.reduceat(place[2] + length, edges)
    for axis in (0, 1):
        rows["sums"][:, axis] = np.add.reduceat(place[axis] * length, edges)
        rows["start"][:, axis] = np.minimum.reduceat(place[axis], edges)
        rows["stop"][:, axis] = np.maximum.reduceat(place[axis] + np.uint64(1), edges)
    rows["sums"][:, 2] = np.add.reduceat(place[2] * length + length * (length - np.uint64(1)) // np.uint64(2), edges)
    for axis in (1, 2) if by_section else (0, 1, 2):
        if cut.volume[axis] > 1:  # an axis of one voxel has no border
            rows["border"] |= (rows["start"][:, axis] == 0) | (rows["stop"][:, axis] == cut.volume[axis])
    return (*small, rows)


def _reordered(rows: Array, labels: Array, order: Array) -> tuple[Array, Array, Array | None]:
    """Rows and runs with pieces in the given order, and the new number of each old one, None where nothing changes."""
    if np.array_equal(order, np.arange(len(order))):
        return rows, labels, None
    renumbered = np.zeros(len(order) + 1, np.uint32)
    renumbered[order + 1] = np.arange(1, len(order) + 1)
    return rows[order], renumbered[labels].astype(labels.dtype), renumbered
