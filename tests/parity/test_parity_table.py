"""Our labels are nnU-Net's, voxel for voxel, over a pairwise choice of models and images."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from parity_table import ParityCase, ParityResult, all_cases, compare, pairwise_cases

STOCK_SHARE = 1e-4  # voxels that may differ from stock nnU-Net, whose accumulators are half precision


@functools.cache
def result_of(case: ParityCase) -> ParityResult:
    with tempfile.TemporaryDirectory() as folder:
        return compare(case, Path(folder) / "model")


def rows(cases: list[ParityCase]) -> list[object]:
    """Cases as parameters; those of one dimension stay on one worker, so that the pooled test finds their results."""
    return [pytest.param(c, id=c.title, marks=pytest.mark.xdist_group(f"parity{c.dimensions}")) for c in cases]


def check(result: ParityResult) -> None:
    assert result.labels > 1, "an image with one label proves nothing"
    assert result.differ == 0
    assert result.differ_cut == 0
    assert result.probability_error <= 1e-5


def test_at_most_60_cases_cover_every_pair() -> None:
    assert len(pairwise_cases()) <= 60


@pytest.mark.parametrize("case", rows(pairwise_cases()))
def test_labels_equal_the_oracle(case: ParityCase) -> None:
    check(result_of(case))


IN_2D, IN_3D = (pytest.mark.xdist_group(f"parity{d}") for d in (2, 3))


@pytest.mark.parametrize(
    "dimensions", [pytest.param(2, marks=IN_2D), pytest.param(3, marks=[IN_3D, pytest.mark.long])], ids=str
)
def test_stock_nnunet_differs_in_at_most_one_voxel_of_ten_thousand(dimensions: int) -> None:
    """Pooled over the table: single images are too small to count shares of 1e-4."""
    results = [result_of(case) for case in pairwise_cases() if case.dimensions == dimensions]
    assert sum(r.differ_stock for r in results) <= STOCK_SHARE * sum(r.voxels for r in results)


@pytest.mark.long
@pytest.mark.parametrize("case", rows(all_cases()))
def test_every_combination(case: ParityCase) -> None:
    check(result_of(case))
