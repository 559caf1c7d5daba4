"""Case statistics are exact, do not depend on how the volume is cut, and agree with numpy's float64."""

from __future__ import annotations

import functools
import operator
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.normalization import default_normalization_schemes as theirs

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.inference.normalise import IntensityStats, check_intensities, normalise
from connectomics.inference.section_cases import SectionCases
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey import tiles as tiles_module
from connectomics.stages.survey.survey import load_survey, save_survey, survey
from connectomics.stages.survey.tallies import nonzero_box
from connectomics.stages.survey.tiles import tile_shape
from connectomics.volumes.volume import VolumeInfo

from parity_table import ArrayVolume

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "float32", "float64")


def array_of(dtype: str, seed: int, shape: tuple[int, ...] = (5, 20, 31)) -> np.ndarray:
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = random.normal(3, 20, shape).astype(kind)
    else:
        limits = np.iinfo(kind)
        values = random.integers(max(limits.min, -(2**20)), min(limits.max, 2**20), shape, endpoint=True).astype(kind)
    values[random.random(shape) < 0.2] = 0
    return values


@pytest.mark.parametrize("dtype", DTYPES)
def test_summary_agrees_with_numpy(dtype: str) -> None:
    values = array_of(dtype, 1)
    summary = IntensityStats.of(values).summary(values.size)
    wide = values.astype(np.float64)
    assert summary.mean == pytest.approx(wide.mean(), rel=1e-6)
    assert summary.std == pytest.approx(wide.std(), rel=1e-6)
    assert (summary.minimum, summary.maximum) == (wide.min(), wide.max())


@given(values=hnp.arrays(st.sampled_from([np.uint8, np.int16]), st.integers(1, 60)), cut=st.lists(st.integers(0, 60)))
def test_integers_merge_exactly_in_any_order(values: np.ndarray, cut: list[int]) -> None:
    pieces = np.split(values, sorted(min(c, values.size) for c in cut))
    whole = IntensityStats.of(values)
    for order in (pieces, pieces[::-1]):
        assert functools.reduce(operator.add, map(IntensityStats.of, order)) == whole


FLOATS = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32))


@given(values=FLOATS, cut=st.integers(0, 60))
def test_floats_merge_to_the_same_moments(values: np.ndarray, cut: int) -> None:
    parts = IntensityStats.of(values[:cut]) + IntensityStats.of(values[cut:])
    merged, wide = parts.summary(values.size), values.astype(np.float64)
    assert merged.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-9)
    assert merged.std == pytest.approx(wide.std(), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("by_slice", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_survey_crops_as_nnunet_and_sums_what_is_left(dtype: str, by_slice: bool, channels: int) -> None:
    image = np.stack([array_of(dtype, c, (4, 30, 41)) for c in range(channels)])
    image[:, :, :3] = image[:, :, :, 37:] = image[:, 0] = 0
    schemes = [ChannelNormalisation("ZScoreNormalization")] * channels
    cases = survey(ArrayVolume(image), "image", schemes, by_slice=by_slice, workers=2)
    for case in cases:
        part = image[(slice(None), *case.region.slices)]
        cropped, _, box = crop_to_nonzero(part)
        assert case.box.relative_to(case.region) == Box(*(tuple(int(b[i]) for b in box) for i in (0, 1)))  # type: ignore[arg-type]
        for summary, channel in zip(case.channels, cropped, strict=True):
            assert summary.mean == pytest.approx(channel.astype(np.float64).mean(), rel=1e-6, abs=1e-12)
            assert summary.std == pytest.approx(channel.astype(np.float64).std(), rel=1e-6, abs=1e-12)


@settings(max_examples=30)
@given(workers=st.integers(1, 4), chunk=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 50)))
def test_integer_surveys_do_not_depend_on_the_cut(workers: int, chunk: tuple[int, int, int]) -> None:
    image = array_of("uint8", 3, (1, 6, 40, 50))
    schemes = [ChannelNormalisation("ZScoreNormalization")]
    whole = survey(ArrayVolume(image), "image", schemes, by_slice=True)
    assert survey(ArrayVolume(image, chunk), "image", schemes, by_slice=True, workers=workers) == whole


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_range_of_each_section_is_known_along_any_axis(axis: int, dtype: str) -> None:
    image = np.stack([array_of(dtype, c, (9, 20, 31)) for c in range(2)])
    image[:, :, :3] = image[..., -4:] = image[:, :2] = 0
    volume = ArrayVolume(image, (2, 7, 5))
    schemes = [ChannelNormalisation("ZScoreNormalization")] * 2
    with mock.patch.object(tiles_module, "TILE_VOXELS", 100):
        (case,) = survey(volume, "image", schemes, by_slice=False, plane_axis=axis)
    others = tuple(a + 1 for a in range(3) if a != axis)
    inside = image[(slice(None), *case.box.slices)]
    expected = np.stack([inside.min(others), inside.max(others)], axis=-1).transpose(1, 0, 2)
    np.testing.assert_array_equal(case.plane_ranges, expected)


def test_tiles_are_whole_chunks_of_bounded_size() -> None:
    info = VolumeInfo((1, 5000, 30000, 30000), np.dtype(np.uint8), (1, 30000, 30000))
    shape = tile_shape(info)
    assert shape[2] == 30000
    assert np.prod(shape) <= tiles_module.TILE_VOXELS
    assert tile_shape(VolumeInfo((1, 9, 64, 64), np.dtype(np.uint8), (4, 16, 16))) == (9, 64, 64)


@pytest.mark.parametrize("by_slice", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_statistics_of_planes_read_in_pieces_are_numpys_of_the_whole(dtype: str, by_slice: bool) -> None:
    """Sections hundreds of times larger than a tile, as one of 100,000 × 100,000 voxels is."""
    image = array_of(dtype, 12, (2, 200, 400))[None]
    image[:, :, :41] = image[..., 340:] = 0
    volume = ArrayVolume(image, (1, 64, 64))
    with mock.patch.object(tiles_module, "TILE_VOXELS", 500):
        cases = survey(volume, "image", [ChannelNormalisation("ZScoreNormalization")], by_slice=by_slice, workers=3)
    for case in cases:
        inside = image[(0, *case.box.slices)].astype(np.float64)
        assert (case.channels[0].minimum, case.channels[0].maximum) == (inside.min(), inside.max())
        assert case.channels[0].mean == pytest.approx(inside.mean(), rel=1e-12)
        assert case.channels[0].std == pytest.approx(inside.std(), rel=1e-12)


@given(values=hnp.arrays(np.uint8, st.integers(0, 99)), step=st.integers(1, 2))
def test_pairs_of_bytes_are_counted_as_bytes(values: np.ndarray, step: int) -> None:
    seen = values[::step]
    stats = IntensityStats.of(seen)
    assert (stats.nonzero, stats.first) == (np.count_nonzero(seen), seen.sum(dtype=int))
    assert stats.second == (seen.astype(int) ** 2).sum()


def test_sections_take_less_than_200_bytes_each(tmp_path: Path) -> None:
    image = array_of("uint8", 4, (1, 2, 8, 9))
    two = survey(ArrayVolume(image), "image", [ChannelNormalisation("ZScoreNormalization")], by_slice=True)

    def kept_and_loaded() -> tuple[SectionCases, object]:
        cases = SectionCases.of((two[z % 2] for z in range(2_000)), 2_000, 1)
        save_survey([cases], tmp_path / "survey.json")
        return cases, load_survey(tmp_path / "survey.json")

    kept_and_loaded()  # Python keeps some freed tuples at the first use, which are no section's
    tracemalloc.start()
    try:
        cases, loaded = kept_and_loaded()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded == (cases,)
    assert peak < 2 * 200 * 2_000  # two tables, one saved and one loaded
    assert cases[1_999].region == Box((1_999, 0, 0), (2_000, 8, 9))
    assert cases[-1].channels == two[1].channels


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_where_they_stand(bad: float) -> None:
    image = array_of("float32", 5)[None]
    image[0, 2, 7, 9] = bad
    with pytest.raises(VolumeError, match=r"image.* \(2, 7, 9\) to \(3, 8, 10\)"):
        survey(ArrayVolume(image), "image", [ChannelNormalisation("NoNormalization")], by_slice=True)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_but_zeros_keeps_the_full_box(masked: bool) -> None:
    image = np.zeros((1, 2, 8, 9), np.uint8)
    assert nonzero_box(image) is None
    scheme = ChannelNormalisation("ZScoreNormalization", masked=masked)
    (case,) = survey(ArrayVolume(image), "image", [scheme], by_slice=False)
    assert case.box == case.region
    assert (normalise(image[0], scheme, case.channels[0], case.mask) == 0).all()


def test_a_survey_is_kept_and_read_back_exactly(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image = array_of("float64", 8)[None]
    cases = survey(ArrayVolume(image), "image", [ChannelNormalisation("ZScoreNormalization")], by_slice=True)
    path = tmp_path / "survey.json"
    assert load_survey(path) is None
    save_survey([cases, cases[:1]], path)
    assert load_survey(path) == (cases, cases[:1])
    path.write_text(path.read_text()[:-20])
    assert load_survey(path) is None


SCHEMES = [f"{name}Normalization" for name in ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01")]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_is_nnunets(name: str, dtype: str) -> None:
    values = np.abs(array_of(dtype, 11))
    if name == "RGBTo01Normalization":
        values = values.clip(0, 255)
    constants = {"mean": 40.0, "std": 13.0, "percentile_00_5": 5.0, "percentile_99_5": 120.0}
    scheme = ChannelNormalisation(name, 40.0, 13.0, 5.0, 120.0)
    summary = IntensityStats.of(values).summary(values.size)
    check_intensities(scheme, summary, "image")
    ours = normalise(values, scheme, summary)
    expected = getattr(theirs, name)(False, constants).run(values.astype(np.float32), None)
    assert ours.dtype == np.float32
    if name == "ZScoreNormalization":  # nnU-Net's statistics are float32 sums, ours are exact
        np.testing.assert_allclose(ours, expected, atol=2e-6)
    else:
        np.testing.assert_array_equal(ours, expected)


def test_rgb_outside_a_byte_is_refused() -> None:
    summary = IntensityStats.of(np.array([0, 300], np.uint16)).summary(2)
    with pytest.raises(VolumeError, match="RGB intensities from 0 to 255, found 0 to 300"):
        check_intensities(ChannelNormalisation("RGBTo01Normalization"), summary, "image")
