from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics.errors import ResourceError
from connectomics.geometry import vec3
from connectomics.inference.windows import window_starts
from connectomics.pipeline.planning import forced_plan, plan_blocks, whole_plan

GIB = 2**30
EXTENT = st.tuples(st.integers(1, 400), st.integers(1, 30000), st.integers(1, 30000))


def windows_computed(extent: int, patch: int, block: int) -> float:
    """Windows along one axis over all blocks, as a multiple of those of the whole axis."""
    starts = window_starts(max(extent, patch), patch, 0.5)
    computed = sum(sum(s < min(a + block, extent) and s + patch > a for s in starts) for a in range(0, extent, block))
    return computed / len(starts)


@given(extent=EXTENT, flat=st.booleans())
def test_blocks_are_whole_chunks_and_never_larger_than_needed(extent: tuple[int, int, int], flat: bool) -> None:
    patch = (1, 256, 256) if flat else (32, 128, 128)
    plan = plan_blocks(extent, patch, 3, 1, 64 * GIB)
    for b, c, n in zip(plan.block_shape, plan.chunk_shape, extent, strict=True):
        assert b % c == 0
        assert b < n + c


def test_sections_are_grouped_and_large_planes_are_cut_into_full_width_stripes() -> None:
    assert plan_blocks((100, 1024, 1024), (1, 256, 256), 3, 1, GIB).block_shape == (4, 1024, 1024)
    large = plan_blocks((100, 20000, 20000), (1, 384, 512), 3, 1, 4 * GIB)
    depth, rows, width = large.block_shape
    assert depth == 1
    assert width >= 20000
    assert rows % large.chunk_shape[1] == 0
    assert windows_computed(20000, 384, rows) < 1.10


def test_volumes_are_cut_along_z_until_the_budget_asks_for_more() -> None:
    extent, patch = (512, 2048, 2048), (128, 128, 128)
    roomy = plan_blocks(extent, patch, 3, 1, 64 * GIB)
    assert roomy.block_shape == (512, 2048, 2048)
    tight = plan_blocks(extent, patch, 21, 1, 8 * GIB)
    assert math.prod(tight.block_shape[1:]) < 2048 * 2048
    assert all(b % c == 0 for b, c in zip(tight.block_shape, tight.chunk_shape, strict=True))


def test_what_is_kept_beside_the_blocks_counts() -> None:
    extent, patch = (512, 2048, 2048), (128, 128, 128)
    assert plan_blocks(extent, patch, 3, 1, 64 * GIB, 56 * GIB) == plan_blocks(extent, patch, 3, 1, 8 * GIB)
    with pytest.raises(ResourceError, match=r"needs 64\.844 GB"):
        plan_blocks(extent, patch, 3, 1, 60 * GIB, 60 * GIB)
    with pytest.raises(ResourceError, match="use engine=nnunet"):
        whole_plan((9, 30, 40), (8, 16, 16), 2, 1, GIB, GIB)


def test_a_budget_that_cannot_work_is_refused_with_one_that_can() -> None:
    with pytest.raises(ResourceError, match=r"raise system\.memory_budget_gb to at least"):
        plan_blocks((64, 512, 512), (64, 128, 128), 3, 1, 10_000_000)


@given(extent=st.tuples(*[st.integers(1, 200)] * 3), block=st.tuples(*[st.integers(1, 300)] * 3))
def test_a_stated_block_shape_is_kept_up_to_whole_chunks(
    extent: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    plan = forced_plan(extent, (16, 16, 16), vec3(block))
    for b, c, n, stated in zip(plan.block_shape, plan.chunk_shape, extent, block, strict=True):
        assert b % c == 0
        assert b >= min(stated, n)
        assert b < min(stated, n) + c


def test_an_engine_that_does_not_cut_gets_whole_sections_or_volumes_that_fit() -> None:
    assert whole_plan((9, 300, 400), (1, 64, 64), 2, 1, GIB).block_shape == (1, 300, 400)
    assert whole_plan((9, 30, 40), (8, 16, 16), 2, 1, GIB).block_shape == (9, 30, 40)
    with pytest.raises(ResourceError, match="use engine=nnunet"):
        whole_plan((900, 1000, 1000), (32, 64, 64), 2, 1, GIB)
