"""Boxes behave like sets of voxels; grids cover a volume once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics.core.geometry import AxisOrder, Block, BlockGrid, Box, Vec3, vec3

COORDINATE = st.integers(-6, 12)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    start = draw(st.tuples(COORDINATE, COORDINATE, COORDINATE))
    shape = draw(st.tuples(*[st.integers(0, 7)] * 3))
    return Box(start, vec3([a + n for a, n in zip(start, shape, strict=True)]))


def voxels(box: Box) -> set[tuple[int, ...]]:
    return {tuple(i) for i in np.argwhere(np.ones(box.shape)) + np.array(box.start)}


@given(a=boxes(), b=boxes())
def test_boxes_are_sets_of_voxels(a: Box, b: Box) -> None:
    assert voxels(a.intersect(b)) == voxels(a) & voxels(b)
    assert a.voxels == len(voxels(a))
    if a.voxels and b.voxels:
        assert a.contains(b) == (voxels(b) <= voxels(a))


@given(box=boxes(), offset=st.tuples(COORDINATE, COORDINATE, COORDINATE), margin=st.tuples(*[st.integers(0, 3)] * 3))
def test_moving_and_growing(box: Box, offset: tuple[int, int, int], margin: tuple[int, int, int]) -> None:
    assert box.shift(offset).relative_to(Box.of_shape((0, 0, 0)).shift(offset)) == box
    grown = box.grow(margin)
    assert grown.shape == tuple(n + 2 * m for n, m in zip(box.shape, margin, strict=True))
    assert grown.contains(box)
    clipped = grown.clip((5, 6, 7))
    assert Box.of_shape((5, 6, 7)).contains(clipped) or clipped.voxels == 0


@given(
    volume=st.tuples(*[st.integers(1, 9)] * 3),
    block=st.tuples(*[st.integers(1, 10)] * 3),
    halo=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_a_grid_covers_every_voxel_once_in_raster_order(
    volume: tuple[int, int, int], block: tuple[int, int, int], halo: tuple[int, int, int]
) -> None:
    grid = BlockGrid(volume, block, halo)
    count = np.zeros(volume, int)
    blocks = list(grid)
    for b in blocks:
        count[b.core.slices] += 1
        assert b.read == b.core.grow(halo).clip(volume)
        assert grid.block(b.index) == b
    assert (count == 1).all()
    assert len(blocks) == len(grid) == len({b.key for b in blocks})
    assert [b.index for b in blocks] == sorted(b.index for b in blocks)
    shares = [list(grid.shard(i, 3)) for i in range(3)]
    assert sorted(b.index for share in shares for b in share) == [b.index for b in blocks]


def test_faces_join_neighbours_once() -> None:
    faces = list(BlockGrid((4, 4, 2), (2, 2, 2)).faces())
    assert [(a.index, b.index) for a, b in faces] == [
        ((0, 0, 0), (1, 0, 0)),
        ((0, 0, 0), (0, 1, 0)),
        ((0, 1, 0), (1, 1, 0)),
        ((1, 0, 0), (1, 1, 0)),
    ]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="stops before it starts"):
        Box((0, 0, 2), (1, 1, 1))
    with pytest.raises(ValueError, match="not a grid"):
        BlockGrid((1, 1, 1), (0, 1, 1))
    with pytest.raises(IndexError, match="outside a grid"):
        BlockGrid((2, 2, 2), (2, 2, 2)).block((1, 0, 0))
    with pytest.raises(ValueError, match="expected 3"):
        vec3([1, 2])
    assert Block((0, 12, 3), Box.of_shape((1, 1, 1)), Box.of_shape((1, 1, 1))).key == "0-12-3"


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_an_order_of_axes_turns_boxes_as_numpy_turns_arrays(axes: Vec3) -> None:
    array = np.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    order, box = AxisOrder(axes), Box((1, 2, 0), (3, 5, 4))
    turned = array.transpose(order.of_array)
    assert order.turn((4, 5, 6)) == turned.shape[1:]
    part = turned[(slice(None), *order.turn_box(box).slices)]
    np.testing.assert_array_equal(part.transpose(order.inverse.of_array), array[(slice(None), *box.slices)])
    assert order.inverse.inverse == order
    assert order.identity == (axes == (0, 1, 2))


@pytest.mark.parametrize("axes", [(0, 1, 1), (1, 2, 3)])
def test_an_order_of_axes_is_a_permutation(axes: Vec3) -> None:
    with pytest.raises(ValueError, match="a permutation of 0, 1, 2"):
        AxisOrder(axes)
