"""Pure integer geometry: boxes of voxels and the grid of blocks that covers a volume.

Everything is in voxels, axis order (z, y, x), half open. Used by every layer above.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from connectomics.core.errors import BoxError

T = TypeVar("T")
Vec3 = tuple[int, int, int]


def vec3(values: tuple[int, ...] | list[int]) -> Vec3:
    """Return ``values`` as a tuple of exactly three Python ints; a BoxError if there are not three."""
    try:
        z, y, x = (int(v) for v in values)
    except (TypeError, ValueError) as error:
        raise BoxError(f"found {values!r:.80}, expected 3 whole numbers (z, y, x)") from error
    return (z, y, x)


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box of voxels, ``start <= voxel < stop``, axes (z, y, x); coordinates may be negative.

    Raises
    ------
    BoxError
        If these are not three numbers each, or ``stop`` lies before ``start`` on any axis.

    Examples
    --------
    >>> Box((0, 0, 0), (2, 3, 4)).intersect(Box((1, 1, 1), (9, 9, 9))).shape
    (1, 2, 3)
    """

    start: Vec3
    stop: Vec3

    def __post_init__(self) -> None:
        try:
            (az, ay, ax), (bz, by, bx) = self.start, self.stop
            backwards = bz < az or by < ay or bx < ax
        except (TypeError, ValueError) as error:
            raise BoxError(
                f"a box is {self.start!r:.80} to {self.stop!r:.80}, expected 3 voxel numbers (z, y, x) each"
            ) from error
        if backwards:
            raise BoxError(f"box stops before it starts: {self.start} to {self.stop}; swap them")

    @classmethod
    def of_shape(cls, shape: Vec3) -> Box:
        """The box of ``shape`` that starts at the origin."""
        return cls((0, 0, 0), vec3(shape))

    @property
    def shape(self) -> Vec3:
        """Extent in voxels along (z, y, x)."""
        (az, ay, ax), (bz, by, bx) = self.start, self.stop
        return (bz - az, by - ay, bx - ax)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Numpy index of this box in an array whose first voxel is the origin."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return (z, y, x)

    def grow(self, margin: Vec3) -> Box:
        """Grow by ``margin`` voxels on both sides of each axis."""
        return Box(
            vec3([a - m for a, m in zip(self.start, margin, strict=True)]),
            vec3([b + m for b, m in zip(self.stop, margin, strict=True)]),
        )

    def shift(self, offset: Vec3) -> Box:
        """Move by ``offset`` voxels."""
        return Box(
            vec3([a + o for a, o in zip(self.start, offset, strict=True)]),
            vec3([b + o for b, o in zip(self.stop, offset, strict=True)]),
        )

    def relative_to(self, origin: Box) -> Box:
        """The same box in coordinates whose origin is ``origin.start``."""
        z, y, x = origin.start
        return self.shift((-z, -y, -x))

    def intersect(self, other: Box) -> Box:
        """The common part; where there is none, an empty box at the nearest corner."""
        start = [max(a, b) for a, b in zip(self.start, other.start, strict=True)]
        stop = [max(s, min(a, b)) for s, a, b in zip(start, self.stop, other.stop, strict=True)]
        return Box(vec3(start), vec3(stop))

    def clip(self, shape: Vec3) -> Box:
        """The part that lies inside a volume of ``shape``."""
        return self.intersect(Box.of_shape(shape))

    def without(self, other: Box) -> Iterator[Box]:
        """Disjoint boxes that cover all of this box but for ``other``.

        Examples
        --------
        >>> [box.shape for box in Box.of_shape((1, 4, 5)).without(Box((0, 1, 0), (1, 3, 2)))]
        [(1, 1, 5), (1, 1, 5), (1, 2, 3)]
        """
        inner, rest = self.intersect(other), self
        if not inner.voxels:
            yield from (self,) if self.voxels else ()
            return
        for axis in range(3):
            for low, high in ((rest.start[axis], inner.start[axis]), (inner.stop[axis], rest.stop[axis])):
                if low < high:
                    yield rest.with_span(axis, low, high)
            rest = rest.with_span(axis, inner.start[axis], inner.stop[axis])

    def with_span(self, axis: int, low: int, high: int) -> Box:
        """This box from ``low`` to ``high`` along one axis."""
        start, stop = list(self.start), list(self.stop)
        start[axis], stop[axis] = low, high
        return Box(vec3(start), vec3(stop))

    def sections(self) -> Iterator[Box]:
        """Its parts of one voxel along z, in order."""
        for z in range(self.start[0], self.stop[0]):
            yield self.with_span(0, z, z + 1)

    def contains(self, other: Box) -> bool:
        """Whether every voxel of ``other`` is in this box."""
        return self.intersect(other) == other


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """A permutation of the axes: axis ``i`` of a model is axis ``axes[i]`` of the volume (0 = z, 1 = y, 2 = x).

    Raises
    ------
    ValueError
        If ``axes`` is not a permutation of 0, 1, 2.

    Examples
    --------
    >>> order = AxisOrder((2, 0, 1))
    >>> order.turn((10, 20, 30)), order.inverse.turn(order.turn((10, 20, 30)))
    ((30, 10, 20), (10, 20, 30))
    """

    axes: Vec3 = (0, 1, 2)

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"expected a permutation of 0, 1, 2, got {self.axes}")

    @classmethod
    def across(cls, axis: int) -> AxisOrder:
        """The order in which sections lie across ``axis`` of the volume, whose other axes keep theirs.

        Examples
        --------
        >>> [AxisOrder.across(axis).axes for axis in range(3)]
        [(0, 1, 2), (1, 0, 2), (2, 0, 1)]
        """
        return cls(vec3([axis, *(other for other in range(3) if other != axis)]))

    @property
    def identity(self) -> bool:
        """Whether nothing is permuted."""
        return self.axes == (0, 1, 2)

    @property
    def inverse(self) -> AxisOrder:
        """The order that undoes this one."""
        return AxisOrder(vec3([self.axes.index(axis) for axis in range(3)]))

    def after(self, first: AxisOrder) -> AxisOrder:
        """This order of a volume that ``first`` has turned before, as one order of the volume itself.

        Examples
        --------
        >>> AxisOrder((0, 2, 1)).after(AxisOrder.across(1)).turn(("z", "y", "x"))
        ('y', 'x', 'z')
        """
        return AxisOrder(self.turn(first.axes))

    @property
    def of_array(self) -> tuple[int, int, int, int]:
        """Axes to transpose a (c, z, y, x) array by."""
        a, b, c = self.axes
        return (0, a + 1, b + 1, c + 1)

    def turn(self, values: tuple[T, T, T]) -> tuple[T, T, T]:
        """Values along the volume's (z, y, x), in the model's order."""
        z, y, x = self.axes
        return (values[z], values[y], values[x])

    def turn_box(self, box: Box) -> Box:
        """A box of the volume in the model's order."""
        return Box(self.turn(box.start), self.turn(box.stop))


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of work and of recovery: ``core`` is what it writes, ``read`` is core plus context."""

    index: Vec3
    core: Box
    read: Box

    @property
    def key(self) -> str:
        """Stable name of the block in the ledger, for example ``0-12-3``."""
        return "-".join(str(i) for i in self.index)


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Blocks that cover a volume without overlap, in raster order.

    Parameters
    ----------
    volume
        Shape (z, y, x) in voxels.
    block_shape
        Shape of a core (z, y, x); blocks at the far faces are clipped.
    halo
        Context (z, y, x) added to ``core`` on both sides for ``read``, clipped to the volume.

    Examples
    --------
    >>> [(block.key, block.core.shape, block.read.shape) for block in BlockGrid((1, 8, 10), (1, 8, 6), halo=(0, 2, 2))]
    [('0-0-0', (1, 8, 6), (1, 8, 8)), ('0-0-1', (1, 8, 4), (1, 8, 6))]
    """

    volume: Vec3
    block_shape: Vec3
    halo: Vec3 = (0, 0, 0)

    def __post_init__(self) -> None:
        if min(self.block_shape) < 1 or min(self.volume) < 1 or min(self.halo) < 0:
            raise ValueError(f"not a grid: volume {self.volume}, blocks {self.block_shape}, halo {self.halo}")

    @property
    def counts(self) -> Vec3:
        """Number of blocks along (z, y, x)."""
        return vec3([-(-v // b) for v, b in zip(self.volume, self.block_shape, strict=True)])

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[Block]:
        nz, ny, nx = self.counts
        for z in range(nz):
            for y in range(ny):
                for x in range(nx):
                    yield self.block((z, y, x))

    def block(self, index: Vec3) -> Block:
        """The block at ``index`` (z, y, x); an IndexError if the grid has no such block."""
        if any(not 0 <= i < n for i, n in zip(index, self.counts, strict=True)):
            raise IndexError(f"block {index} is outside a grid of {self.counts} blocks")
        start = vec3([i * b for i, b in zip(index, self.block_shape, strict=True)])
        core = Box(start, vec3([s + b for s, b in zip(start, self.block_shape, strict=True)])).clip(self.volume)
        return Block(index, core, core.grow(self.halo).clip(self.volume))

    def number(self, index: Vec3) -> int:
        """Position of the block at ``index`` (z, y, x) in raster order from 0 on; an IndexError if there is none."""
        counts = self.counts
        if any(not 0 <= i < n for i, n in zip(index, counts, strict=True)):
            raise IndexError(f"block {index} is outside a grid of {counts} blocks")
        return (index[0] * counts[1] + index[1]) * counts[2] + index[2]

    def numbered(self, number: int) -> Block:
        """The block at a position in raster order; the inverse of ``number``.

        Examples
        --------
        >>> grid = BlockGrid((4, 12, 20), (1, 6, 10))
        >>> grid.numbered(7).index, grid.number((1, 1, 1))
        ((1, 1, 1), 7)
        """
        _, ny, nx = self.counts
        rest, x = divmod(number, nx)
        z, y = divmod(rest, ny)
        return self.block((z, y, x))

    def faces(self) -> Iterator[tuple[Block, Block]]:
        """Pairs of blocks that share a face, the one nearer the origin first, in raster order."""
        for block in self:
            for axis in range(3):
                neighbour = list(block.index)
                neighbour[axis] += 1
                if neighbour[axis] < self.counts[axis]:
                    yield block, self.block(vec3(neighbour))

    def shard(self, start_index: int, step: int) -> Iterator[Block]:
        """Every ``step``-th block from ``start_index`` on, in raster order."""
        for i, block in enumerate(self):
            if i >= start_index and (i - start_index) % step == 0:
                yield block


def pieces(box: Box, unit: Vec3, voxels: int) -> Iterator[Box]:
    """Cut a box where whole units end, as many units together as hold at most ``voxels``, in raster order.

    Parameters
    ----------
    box
        What is cut.
    unit
        Shape (z, y, x) of what is not cut; units begin at the origin. Neighbours along x are joined first.
    voxels
        Bound of a piece; one unit is a piece even where it is larger.

    Examples
    --------
    >>> [piece.shape for piece in pieces(Box((0, 1, 0), (1, 7, 8)), (1, 4, 4), 32)]
    [(1, 3, 8), (1, 3, 8)]
    """
    if not box.voxels:
        return
    shape = list(unit)
    for axis in (2, 1, 0):
        first, last = box.start[axis] // unit[axis], -(-box.stop[axis] // unit[axis])
        most = max(1, voxels // math.prod(shape))
        shape[axis] *= last - first if last - first <= most else most
    spans = [
        [(max(a, at), min(b, at + step)) for at in range(a - a % unit, b, step)]
        for a, b, unit, step in zip(box.start, box.stop, unit, shape, strict=True)
    ]
    for z, y, x in itertools.product(*spans):
        yield Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))
