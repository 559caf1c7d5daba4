"""Masks lie where their voxel size and origin say: the program's own pyramids, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Vec3, vec3
from connectomics.stages.survey.placement import placed
from connectomics.volumes.levels import plan_levels
from connectomics.volumes.volume import VolumeInfo

from pyramids import coarser

SIZE = (40.0, 8.0, 8.0)


def info(extent: Vec3, size: tuple[float, float, float] | None = SIZE, origin: Vec3 = (0, 0, 0)) -> VolumeInfo:
    at = (float(origin[0]), float(origin[1]), float(origin[2]))
    return VolumeInfo((1, *extent), np.dtype(np.uint8), vec3([min(4, n) for n in extent]), size, origin_nm=at)


def owners(extent: Vec3, offset: Vec3) -> list[np.ndarray]:
    """Which voxel of each level each voxel lies in, as numbers of the level's raster order, window by window."""
    levels = plan_levels(info(extent), offset)
    numbered = [np.arange(np.prod(extent)).reshape(1, *extent)]
    for level in levels[1:]:  # the smallest voxel of each window stands for it
        numbered.append(coarser(numbered[-1], level.step, level.phase, labels=True))
    found = []
    for level in levels:
        z, y, x = (
            (np.arange(n) + o) // f - first
            for n, o, f, first in zip(extent, offset, level.factor, level.offset, strict=True)
        )
        found.append(np.ravel_multi_index(np.meshgrid(z, y, x, indexing="ij"), level.extent))
    for cells, voxels in zip(found, numbered, strict=True):
        assert np.array_equal(cells.ravel()[voxels.ravel()], np.arange(voxels.size)), "each window is where it says"
    return found


def cells_of(volume: VolumeInfo, mask: VolumeInfo) -> np.ndarray:
    index = [axis.seen(np.arange(axis.length)) for axis in placed(volume, mask, "mask")]
    return np.ravel_multi_index(np.meshgrid(*index, indexing="ij"), mask.extent)


@pytest.mark.parametrize("extent", [(3, 45, 61), (9, 33, 100), (1, 1000, 13), (5, 31, 31)])
@pytest.mark.parametrize("origin", [pytest.param((0, 0, 0), marks=pytest.mark.long), (800, 16, 8000)])
def test_levels_of_the_programs_own_pyramids_are_placed_by_scale_and_translation(extent: Vec3, origin: Vec3) -> None:
    volume, wanted = info(extent, origin=origin), owners(extent, (0, 0, 0))
    levels = plan_levels(volume)
    assert len(levels) > 2
    for level, cells in zip(levels, wanted, strict=True):
        mask = replace(
            info(level.extent, level.scale(SIZE)), origin_nm=level.translation(SIZE, volume.origin_nm)
        )  # OME-Zarr, N5
        assert np.array_equal(cells_of(volume, mask), cells)
        assert np.array_equal(cells_of(volume, replace(mask, origin_nm=(0.0, 0.0, 0.0))), cells), "none is stated"
        assert np.array_equal(cells_of(replace(volume, voxel_size_nm=None), mask), cells), "powers of two"


@pytest.mark.parametrize("offset", [(5, 3, 6), (1, 1, 1)])
def test_scales_of_precomputed_count_from_the_origin_by_corners(offset: Vec3) -> None:
    extent = (7, 45, 61)
    volume = info(extent, origin=vec3([int(o * s) for o, s in zip(offset, SIZE, strict=True)]))
    levels = plan_levels(volume, offset)
    for level, cells in zip(levels, owners(extent, offset), strict=True):
        scale = level.scale(SIZE)
        corner = vec3([int(o * s) for o, s in zip(level.offset, scale, strict=True)])
        assert np.array_equal(cells_of(volume, info(level.extent, scale, corner)), cells)


@settings(max_examples=30)
@given(st.integers(2, 400), st.integers(2, 70))
def test_any_whole_factor_rounded_up_or_down_is_taken_from_the_voxel_size(length: int, factor: int) -> None:
    assume(factor <= length)
    for cells in {-(-length // factor), length // factor}:
        seen = placed(info((1, 1, length)), info((1, 1, cells), (40.0, 8.0, 8.0 * factor)), "mask")[2]
        expected = np.minimum(np.repeat(np.arange(length // factor + 1), factor)[:length], cells - 1)
        assert np.array_equal(seen.seen(np.arange(length)), expected)


@pytest.mark.parametrize(
    ("mask", "finding"),
    [
        (info((3, 23, 31), (40.0, 32.0, 32.0)), "23 voxels of 32 nm along y, the volume 45 of 8 nm; expected 11 or 12"),
        (
            info((3, 45, 61), (40.0, 4.0, 4.0)),
            "4 nm along y, the volume's 8 nm; expected the same, or a whole multiple",
        ),
        (info((3, 45, 61), (40.0, 16.0, 16.0)), "45 voxels of 16 nm along y"),
        (info((3, 23, 31)), "23 voxels of 8 nm along y, the volume 45 of 8 nm; expected 45"),
        (info((3, 30, 41), (40.0, 12.0, 12.0)), "12 nm along y, the volume's 8 nm; expected the same"),
        (
            info((3, 23, 31), (40.0, 16.0, 16.0), (0, 4, 400)),
            "along [yx] the mask begins at .* nm, the volume at 0 nm, so voxels of 16 nm do not cover it",
        ),
        (info((3, 45, 61), SIZE, (0, 0, 8)), "do not cover it"),
    ],
)
def test_contradictions_are_refused(mask: VolumeInfo, finding: str) -> None:
    volume = info((3, 45, 61))
    with pytest.raises(VolumeError, match=finding):
        placed(volume, mask, "mask")


def test_remedies_of_contradictions_work() -> None:
    volume = info((3, 45, 61))
    for mask in (info((3, 23, 31), None), info((3, 23, 31), (40.0, 16.0, 16.0)), info((3, 45, 61), SIZE)):
        placed(volume, mask, "mask")
    stated = placed(volume, info((3, 45, 61), (40.0, 4.0, 4.0)), "mask", stated_size=True)
    assert all(axis.spread for axis in stated), "inference.voxel_size_nm replaces what the volume's file says"
