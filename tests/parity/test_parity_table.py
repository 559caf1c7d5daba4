"""Our labels are nnU-Net's, voxel for voxel, over a pairwise choice of models and images."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from parity_table import ParityCase, ParityResult, all_cases, asks_stock, compare, pairs_of, pairwise_cases, short_cases

STOCK_SHARE = 1e-4  # voxels that may differ from stock nnU-Net, whose accumulators are half precision


@functools.cache
def result_of(case: ParityCase) -> ParityResult:
    with tempfile.TemporaryDirectory() as folder:
        return compare(case, Path(folder) / "model", quick=True)


@functools.cache
def whole_result_of(case: ParityCase) -> ParityResult:
    with tempfile.TemporaryDirectory() as folder:
        return compare(case, Path(folder) / "model")


def named(cases: list[ParityCase]) -> list[object]:
    return [pytest.param(case, id=case.title) for case in cases]


def check(result: ParityResult) -> None:
    assert result.labels > 1, "an image with one label proves nothing"
    assert result.differ == 0
    assert result.differ_cut == 0
    assert result.probability_error <= 1e-5


def test_at_most_60_cases_cover_every_pair() -> None:
    assert len(pairwise_cases()) <= 60


def test_the_short_form_covers_seven_pairs_of_eight() -> None:
    every, short = (set().union(*map(pairs_of, cases)) for cases in (pairwise_cases(), short_cases()))
    assert len(short) >= 0.875 * len(every)


@pytest.mark.parametrize("case", named(short_cases()))
def test_labels_equal_the_oracle(case: ParityCase) -> None:
    check(result_of(case))


def differ_from_stock(results: list[ParityResult]) -> None:
    """Pooled over the table: single images are too small to count shares of 1e-4."""
    differ = [r.differ_stock for r in results]
    assert None not in differ
    assert sum(n for n in differ if n is not None) <= STOCK_SHARE * sum(r.voxels for r in results)


def test_stock_nnunet_differs_in_at_most_one_voxel_of_ten_thousand() -> None:
    differ_from_stock([result_of(case) for case in short_cases() if asks_stock(case)])


@pytest.mark.long
@pytest.mark.parametrize("case", named(pairwise_cases()))
def test_labels_equal_the_oracle_in_every_block(case: ParityCase) -> None:
    check(whole_result_of(case))


@pytest.mark.long
@pytest.mark.parametrize("dimensions", [2, 3])
def test_stock_nnunet_differs_in_at_most_one_voxel_of_ten_thousand_in_all_pairs(dimensions: int) -> None:
    differ_from_stock([whole_result_of(case) for case in pairwise_cases() if case.dimensions == dimensions])


@pytest.mark.long
@pytest.mark.parametrize("case", named(all_cases()))
def test_every_combination(case: ParityCase) -> None:
    check(whole_result_of(case))
