"""The table of pairs: exact, whatever the cut, the order, the types and the size of the ids; memory by its pairs."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics.cluster import contingency_matrix

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import BlockGrid
from connectomics.evaluate import contingency
from connectomics.evaluate.contingency import Contingency, Tally, combined
from connectomics.evaluate.instances import instance_scores
from connectomics.evaluate.pairs import ObjectPairs, match_table

IDS = st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1])


def pairs_of(table: Contingency) -> dict[tuple[int, int], int]:
    columns = (table.prediction.tolist(), table.truth.tolist(), table.counts.tolist())
    return {(p, t): n for p, t, n in zip(*columns, strict=True)}


@given(arrays(np.uint64, (2, 3, 4, 5), elements=IDS), st.data())
@settings(max_examples=80, deadline=None)
def test_any_cut_in_any_order_gives_the_counts(both: np.ndarray, data: st.DataObject) -> None:
    prediction, truth = both
    counted = collections.Counter(zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    cores = [block.core.slices for block in BlockGrid((3, 4, 5), shape)]
    tally = Tally()
    for core in data.draw(st.permutations(cores)):
        tally.add(Contingency.from_arrays(prediction[core], truth[core]))
    table = tally.total()
    assert pairs_of(table) == counted
    assert sorted(pairs_of(table), key=lambda pair: (pair[1], pair[0])) == list(pairs_of(table))
    assert table.voxels == prediction.size


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_the_same_bytes_for_any_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(0, 9, (6, 8, 4)), 3, axis=2)
    prediction = np.where(rng.random(truth.shape) < 0.8, truth, rng.integers(0, 12, truth.shape)) << (seed * 8)
    monkeypatch.setattr(contingency, "_FEWEST_WAITING", 5)
    texts = set()
    for shape in ((6, 8, 12), (1, 8, 12), (4, 3, 5), (2, 2, 2)):
        blocks = list(BlockGrid((6, 8, 12), shape))
        rng.shuffle(blocks)
        tally = Tally()
        for block in blocks:
            tally.add(Contingency.from_arrays(prediction[block.core.slices], truth[block.core.slices]))
        rows = {name: column.tolist() for name, column in match_table(ObjectPairs.of(tally.total())).items()}
        texts.add(json.dumps([instance_scores(tally.total()), rows]))
    assert len(texts) == 1


def test_counts_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    prediction, truth = rng.integers(0, 40, (2, 5000))
    monkeypatch.setattr(contingency, "_PIECE", 999)
    dense = np.zeros((40, 40), np.int64)
    table = Contingency.from_arrays(prediction, truth)
    dense[table.truth.astype(int), table.prediction.astype(int)] = table.counts
    np.testing.assert_array_equal(dense, contingency_matrix(truth, prediction))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint16, np.uint64, np.float16, np.float32, np.float64])
def test_prediction_and_truth_may_be_of_any_two_types(dtype: type) -> None:
    truth = np.array([0, 1, 1, 0]).astype(dtype)
    prediction = np.array([2**40, 0, 2**40, 0])
    assert pairs_of(Contingency.from_arrays(prediction, truth)) == {
        (2**40, 0): 1,
        (0, 1): 1,
        (2**40, 1): 1,
        (0, 0): 1,
    }


def test_what_is_not_counted_is_left_out() -> None:
    prediction, truth = np.array([[1, 1], [2, 2]]), np.array([[5, 0], [5, 9]])
    table = Contingency.from_arrays(prediction, truth, np.array([[True, True], [False, True]]))
    assert pairs_of(table) == {(1, 5): 1, (1, 0): 1, (2, 9): 1}
    assert pairs_of(table.without_truth(9)) == {(1, 5): 1, (1, 0): 1}
    assert pairs_of(table.as_foreground()) == {(1, 1): 2, (1, 0): 1}
    nothing = Contingency.from_arrays(prediction, truth, np.zeros((2, 2), bool))
    assert nothing.voxels == 0 and combined([]).voxels == 0 and nothing.as_foreground().voxels == 0


@pytest.mark.parametrize("value", [-1, -(2**63)])
def test_negative_ids_are_refused(value: int) -> None:
    with pytest.raises(VolumeError, match=rf"prediction holds values that are no label: {value}; expected whole"):
        Contingency.from_arrays(np.array([0, value]), np.array([0, 1]))


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, -1.0, 2.0**64])
def test_floats_must_be_whole(value: float) -> None:
    with pytest.raises(VolumeError, match="truth holds values that are no label"):
        Contingency.from_arrays(np.array([0, 1]), np.array([0, value]))


def test_shapes_and_tables_are_checked() -> None:
    with pytest.raises(VolumeError, match=r"\(2,\) and truth \(3,\)"):
        Contingency.from_arrays(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="uint64, uint64, int64"):
        Contingency(np.zeros(1, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.int64))


STREAMED = """
import resource, numpy as np
from connectomics.evaluate.contingency import Contingency, Tally
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
block = np.repeat(rng.integers(0, 50, (64, 64, 8)), 32, axis=2)
tally = Tally()
for i in range({count}):
    tally.add(Contingency.from_arrays(block, (block + i % 3).astype("u1")))
print(tally.total().voxels, tally.total().counts.size, peak())
"""


def test_memory_follows_the_pairs_and_not_the_voxels() -> None:
    found = []
    for count in (3, 120):
        ended = subprocess.run(
            [sys.executable, "-c", STREAMED.format(count=count)], capture_output=True, text=True, check=True
        )
        found.append([int(word) for word in ended.stdout.split()])
    assert found[1][0] == 40 * found[0][0] == 120 * 64 * 64 * 256
    assert found[1][1] == found[0][1]
    kibibytes = 1 if sys.platform == "linux" else 1024
    assert found[1][2] - found[0][2] < 8 * 1024 * kibibytes
