"""Blocks are whole chunks that fit the budget; a budget that cannot work is refused with the smallest that can."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics.core.errors import ResourceError
from connectomics.core.geometry import AxisOrder, Vec3, vec3
from connectomics.inference.windows import window_starts
from connectomics.planning.blocks import plan_blocks
from connectomics.planning.memory import LIBRARY_BYTES, Budget, NetworkWork, Work
from connectomics.stages.survey.section_reader import SLAB_BYTES

GIB = 2**30
EXTENT = st.tuples(st.integers(1, 400), st.integers(1, 30000), st.integers(1, 30000))
FLAT = Work(NetworkWork((1, 256, 256), classes=2, folds=1, channels=1), voxel_bytes=1, stored_bytes=1)


def altered(work: Work, **changes: Any) -> Work:
    """The work with other values, those of its network among them."""
    own = {f.name: changes.pop(f.name) for f in fields(NetworkWork) if f.name in changes}
    return replace(work, network=replace(work.network, **own), **changes)


DEEP = altered(FLAT, patch=(32, 128, 128))
ROOMY = Budget(512 * GIB)


def windows_computed(extent: int, patch: int, block: int) -> float:
    """Windows along one axis over all blocks, as a multiple of those of the whole axis."""
    starts = window_starts(max(extent, patch), patch, 0.5)
    computed = sum(sum(s < min(a + block, extent) and s + patch > a for s in starts) for a in range(0, extent, block))
    return computed / len(starts)


@given(extent=EXTENT, work=st.sampled_from([FLAT, DEEP]), gigabytes=st.sampled_from([2, 8, 512]))
def test_blocks_are_whole_chunks_that_fit_and_never_larger_than_needed(
    extent: Vec3, work: Work, gigabytes: int
) -> None:
    budget = Budget(gigabytes * GIB)
    plan = plan_blocks(extent, [work], budget)
    for b, c, n in zip(plan.block_shape, plan.chunk_shape, extent, strict=True):
        assert b % c == 0
        assert b < n + c
    assert budget.host_need(work.footprint(plan.block_shape, extent)) <= gigabytes * GIB


def test_sections_are_grouped_and_large_planes_are_cut_into_full_width_stripes() -> None:
    assert plan_blocks((100, 1024, 1024), [FLAT], ROOMY).block_shape == (4, 1024, 1024)
    large = plan_blocks((100, 20000, 20000), [altered(FLAT, patch=(1, 384, 512))], Budget(4 * GIB))
    depth, rows, width = large.block_shape
    assert depth == 1
    assert width >= 20000
    assert rows % large.chunk_shape[1] == 0
    assert windows_computed(20000, 384, rows) < 1.10


def test_planes_whose_rows_exceed_the_budget_are_cut_along_x_too() -> None:
    """Of a section of 100,000² not even the rows of one window fit."""
    extent, work = (1, 100_000, 100_000), altered(FLAT, patch=(1, 512, 512), classes=8)
    plan = plan_blocks(extent, [work], Budget(2 * GIB))
    assert plan.block_shape[2] < 100_000
    assert plan.block_shape[1] >= 512
    assert work.footprint((1, 512, 100_352), extent).host_bytes > 2 * GIB


def test_volumes_are_cut_along_z_until_the_budget_asks_for_more() -> None:
    extent, work = (512, 2048, 2048), altered(DEEP, patch=(128, 128, 128))
    assert plan_blocks(extent, [work], ROOMY).block_shape == (512, 2048, 2048)
    tight = plan_blocks(extent, [altered(work, classes=20)], Budget(8 * GIB))
    assert math.prod(tight.block_shape[1:]) < 2048 * 2048
    assert all(b % c == 0 for b, c in zip(tight.block_shape, tight.chunk_shape, strict=True))


PLANES = [altered(FLAT, patch=(1, 384, 512), mean_classes=2, order=AxisOrder.across(axis)) for axis in range(3)]


@pytest.mark.parametrize(
    ("extent", "gigabytes", "most"), [(1024, 4, 2.2), (1024, 16, 1.0), (2048, 16, 1.6), (2048, 64, 1.3)]
)
def test_blocks_of_several_planes_are_as_thick_as_memory_allows(extent: int, gigabytes: int, most: float) -> None:
    """A section across each axis: a block that is thin along one makes two planes compute their windows many times."""
    budget = Budget(gigabytes * 10**9, 900_000_000)
    plan = plan_blocks((extent,) * 3, PLANES, budget)
    assert plan.chunk_shape == (64, 64, 64)
    assert all(budget.holds(work.footprint(plan.block_shape, (extent,) * 3)) for work in PLANES)
    computed = [
        math.prod(map(windows_computed, (extent,) * 3, work.order.inverse.turn(work.network.patch), plan.block_shape))
        for work in PLANES
    ]
    assert sum(computed) / 3 <= most


def test_sections_that_all_lie_across_one_axis_are_cut_as_those_of_one_model() -> None:
    extent = (300, 200, 1000)
    alone = plan_blocks(extent, [PLANES[1]], ROOMY)
    assert plan_blocks(extent, [PLANES[1], altered(PLANES[1], folds=2)], ROOMY) == alone
    assert alone.block_shape[0] >= 300 and alone.chunk_shape == (300, 1, 512)


BASIC = altered(DEEP, patch=(64, 64, 64))


@pytest.mark.parametrize(
    "more",
    [
        altered(BASIC, classes=8),
        altered(BASIC, folds=5),
        altered(BASIC, channels=3),
        altered(BASIC, voxel_bytes=8),
        altered(BASIC, stored_bytes=60),
        altered(BASIC, window_bytes=GIB),
        altered(BASIC, batch=64),
        altered(BASIC, mean_classes=4),
        altered(BASIC, ratio=(1.0, 1.5, 1.5)),
        altered(BASIC, patch=(128, 64, 64)),
        altered(BASIC, whole=True),
        altered(BASIC, order=AxisOrder((0, 2, 1))),
    ],
)
def test_whatever_takes_memory_counts(more: Work) -> None:
    block, extent = (256, 512, 512), (1024, 2048, 2048)
    assert more.footprint(block, extent).host_bytes > BASIC.footprint(block, extent).host_bytes


def test_sections_across_the_files_own_hold_raw_voxels_of_several() -> None:
    across, along = (PLANES[axis].footprint((512, 512, 512), (1024, 1024, 1024)).host_bytes for axis in (1, 0))
    assert across - along > SLAB_BYTES


def test_the_sums_are_those_the_predictor_allocates() -> None:
    """Classes times folds and the weights, in float32, for the depth of one window."""
    one, five = (altered(BASIC, folds=n).footprint((256, 512, 512), (1024, 2048, 2048)) for n in (1, 5))
    assert five.host_bytes - one.host_bytes == pytest.approx(4 * 2 * 64 * 512 * 512 * 4 * 1.1, rel=1e-6)


def test_a_batch_of_windows_keeps_the_logits_of_all_folds() -> None:
    """One window alone does not; ``test_inference_predictor.py`` counts what is alive."""

    def bytes_of(batch: int, folds: int) -> int:
        return altered(BASIC, batch=batch, folds=folds).footprint((64, 64, 64), (64, 64, 64)).host_bytes

    window = math.prod(BASIC.network.patch) * BASIC.network.classes * 4 * 1.1
    kept = {n: bytes_of(n, 5) - bytes_of(n, 1) - (bytes_of(1, 5) - bytes_of(1, 1)) for n in (1, 2, 6)}
    assert kept == pytest.approx({1: 0, 2: 2 * 4 * window, 6: 6 * 4 * window}, rel=1e-6)


def test_what_is_kept_beside_the_blocks_counts_and_so_do_other_stages() -> None:
    extent, work = (512, 2048, 2048), altered(DEEP, patch=(128, 128, 128))
    assert plan_blocks(extent, [work], Budget(64 * GIB, 56 * GIB)) == plan_blocks(extent, [work], Budget(8 * GIB))
    with pytest.raises(ResourceError, match=r"1\.000 GB of it for the program"):
        plan_blocks(extent, [work], Budget(GIB, 10**9))
    with pytest.raises(ResourceError, match=r"at least 7\.2"):
        plan_blocks(extent, [work], Budget(GIB, 0, 7 * 10**9))


@pytest.mark.parametrize("work", [FLAT, DEEP, altered(DEEP, classes=40, stored_bytes=161)])
def test_the_smallest_budget_that_is_named_works_and_a_smaller_one_does_not(work: Work) -> None:
    extent, base = (64, 2000, 2000), 400_000_000
    with pytest.raises(ResourceError) as refused:
        plan_blocks(extent, [work], Budget(10_000_000, base))
    named = float(re.findall(r"raise system\.memory_budget_gb to at least ([\d.]+)", str(refused.value))[0])
    plan_blocks(extent, [work], Budget(int(named * 1e9), base))
    with pytest.raises(ResourceError):
        plan_blocks(extent, [work], Budget(int(named * 1e9) - 25_000_000, base))


def test_input_that_can_only_be_read_whole_is_named() -> None:
    budget = Budget(8 * GIB, 40 * GIB, input_chunk=(1, 100_000, 100_000))
    with pytest.raises(
        ResourceError, match=r"stored in pieces of \(1, 100000, 100000\) voxels that can only be read whole"
    ):
        plan_blocks((1, 100_000, 100_000), [FLAT], budget)


def test_blocks_shrink_until_the_logits_that_resampling_keeps_fit() -> None:
    extent, resampled = (512, 512, 512), altered(BASIC, ratio=(1.0, 1.0, 1.0))
    assert plan_blocks(extent, [resampled], ROOMY).block_shape == (256, 512, 512)
    tight = Budget(GIB)
    assert plan_blocks(extent, [BASIC], tight).block_shape == (256, 512, 512)
    cut = plan_blocks(extent, [resampled], tight)
    assert math.prod(cut.block_shape) < 256 * 512 * 512
    assert tight.holds(resampled.footprint(cut.block_shape, extent))


def test_a_devices_memory_decides_too() -> None:
    extent, work = (512, 2048, 2048), altered(DEEP, classes=20, on_device=True)
    wide = plan_blocks(extent, [work], replace(ROOMY, device_bytes=80 * GIB))
    cut = plan_blocks(extent, [work], replace(ROOMY, device_bytes=4 * GIB))
    assert math.prod(cut.block_shape[1:]) < math.prod(wide.block_shape[1:])
    assert work.footprint(cut.block_shape, extent).device_bytes <= 4 * GIB
    with pytest.raises(
        ResourceError, match=r"of the device's memory, of which 0\.001 GB are free; .*system\.device=cpu"
    ):
        plan_blocks(extent, [work], replace(ROOMY, device_bytes=10**6))


def test_models_of_an_ensemble_share_blocks_that_fit_the_largest() -> None:
    extent, large = (512, 2048, 2048), altered(DEEP, classes=20, mean_classes=20)
    budget = Budget(8 * GIB)
    plan = plan_blocks(extent, [altered(FLAT, mean_classes=20), large], budget)
    assert plan.chunk_shape == (64, 64, 64)
    assert budget.holds(large.footprint(plan.block_shape, extent))


def test_models_that_turn_the_axes_are_cut_along_their_own() -> None:
    order = AxisOrder((2, 0, 1))
    turned = plan_blocks((2048, 2048, 512), [altered(DEEP, patch=(128, 128, 128), order=order)], ROOMY)
    assert turned.block_shape == (2048, 2048, 512)
    turned = plan_blocks((2048, 2048, 5120), [altered(DEEP, patch=(128, 128, 128), order=order)], ROOMY)
    assert turned.block_shape == (2048, 2048, 512)


@given(extent=st.tuples(*[st.integers(1, 200)] * 3), block=st.tuples(*[st.integers(1, 300)] * 3))
def test_a_stated_block_shape_is_kept_up_to_whole_chunks(extent: Vec3, block: Vec3) -> None:
    plan = plan_blocks(extent, [altered(DEEP, patch=(16, 16, 16))], ROOMY, vec3(block))
    for b, c, n, stated in zip(plan.block_shape, plan.chunk_shape, extent, block, strict=True):
        assert b % c == 0
        assert b >= min(stated, n)
        assert b < min(stated, n) + c


def test_a_stated_block_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"set inference\.block_shape=null or raise"):
        plan_blocks((512, 2048, 2048), [DEEP], Budget(GIB), (512, 2048, 2048))


def test_an_engine_that_does_not_cut_gets_whole_sections_or_volumes_that_fit() -> None:
    assert plan_blocks((9, 300, 400), [altered(FLAT, whole=True)], ROOMY).block_shape == (1, 300, 400)
    assert plan_blocks((9, 30, 40), [altered(DEEP, whole=True)], ROOMY).block_shape == (9, 30, 40)
    with pytest.raises(ResourceError, match="engine=nnunet"):
        plan_blocks((900, 1000, 1000), [altered(DEEP, whole=True)], Budget(LIBRARY_BYTES + GIB))
