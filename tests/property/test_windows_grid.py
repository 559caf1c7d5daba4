"""The window grid and the Gaussian are nnunetv2's, for any extent, patch and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from connectomics.core.geometry import Box
from connectomics.inference.windows import WindowGrid, as_patch, constant_weight, gaussian_weight, window_starts

import oracle

EXTENT = st.integers(1, 700)
PATCH = st.integers(2, 128)
STEP = st.sampled_from([0.5, 0.25, 0.75, 1.0, 0.3, 1 / 3])


@given(extra=EXTENT, patch=PATCH, step=STEP)
def test_starts_are_nnunets(extra: int, patch: int, step: float) -> None:
    extent = patch + extra - 1
    assert list(window_starts(extent, patch, step)) == compute_steps_for_sliding_window((extent,), (patch,), step)[0]


def test_flat_windows_visit_each_voxel_once() -> None:
    assert window_starts(5, 1, 0.5) == (0, 1, 2, 3, 4)


def test_an_extent_below_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="pad first"):
        window_starts(3, 4, 0.5)


@pytest.mark.parametrize("patch", [(32, 48), (16, 24, 16), (7, 9, 5), (1, 64, 64)])
def test_the_gaussian_is_nnunets(patch: tuple[int, ...]) -> None:
    flat = patch[1:] if patch[0] == 1 else patch
    theirs = oracle.compute_gaussian(
        flat, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=torch.device("cpu")
    )
    ours = gaussian_weight(as_patch(list(patch), (1, 1, 1)))
    np.testing.assert_array_equal(ours.reshape(flat), theirs.numpy())
    assert constant_weight((2, 3, 4)).sum() == 24


@given(
    start=st.tuples(*[st.integers(0, 9)] * 3),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    patch=st.tuples(st.integers(1, 9), st.integers(2, 16), st.integers(2, 16)),
    step=STEP,
)
def test_windows_cover_the_box_and_touching_finds_exactly_those_that_do(
    start: tuple[int, int, int], shape: tuple[int, int, int], patch: tuple[int, int, int], step: float
) -> None:
    box = Box.of_shape(shape).shift(start)
    grid = WindowGrid(box, patch, step)
    part = Box(box.start, tuple(a + max(1, n // 2) for a, n in zip(box.start, box.shape, strict=True)))  # type: ignore[arg-type]
    for axis in range(3):
        starts = grid.starts(axis)
        covered = {v for s in starts for v in range(s, s + patch[axis])}
        assert set(range(box.start[axis], box.stop[axis])) <= covered
        inside = set(range(part.start[axis], part.stop[axis]))
        touching = [s for s in starts if inside & set(range(s, s + patch[axis]))]
        assert list(grid.touching(part)[axis]) == touching
    assert grid.count(box) == len(grid)
