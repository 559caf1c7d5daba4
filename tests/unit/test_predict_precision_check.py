"""The sample that fast is measured on: a million distinct voxels of nonzero boxes, spread out, always the same ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.core.errors import AgreementError
from connectomics.core.geometry import Box, Vec3
from connectomics.inference.case import Case
from connectomics.inference.normalise import ChannelSummary
from connectomics.stages.predict.precision_check import (
    SAMPLED_VOXELS,
    Agreement,
    FastContract,
    load,
    piece_shape,
    sample,
    save,
)

GREY = (ChannelSummary(100.0, 10.0, 1.0, 200.0),)
EMPTY = (ChannelSummary(0.0, 0.0, 0.0, 0.0),)


def case(start: Vec3, stop: Vec3, channels: tuple[ChannelSummary, ...] = GREY) -> Case:
    return Case(Box(start, stop), Box(start, stop), channels)


def sections(count: int, size: int) -> list[Case]:
    return [case((z, 0, 0), (z + 1, size, size)) for z in range(count)]


EVERYWHERE = Box((0, 0, 0), (10_000, 100_000, 100_000))


def test_a_small_volume_is_taken_whole() -> None:
    boxes = list(sample([case((2, 3, 4), (30, 103, 91))], EVERYWHERE, (16, 30, 30), seed=12))
    seen = np.zeros((40, 120, 100), np.uint8)
    for box in boxes:
        assert all(n <= p for n, p in zip(box.shape, (16, 30, 30), strict=True))
        seen[box.slices] += 1
    assert seen.max() == 1
    assert seen.sum() == seen[2:30, 3:103, 4:91].sum() == 28 * 100 * 87


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(100, 3000), st.integers(100, 3000)),
    piece=st.tuples(st.integers(1, 64), st.integers(64, 1024), st.integers(64, 1024)),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_million_distinct_voxels_or_all(shape: Vec3, piece: Vec3, seed: int) -> None:
    whole = Box.of_shape(shape)
    boxes = list(sample([case(whole.start, whole.stop)], EVERYWHERE, piece, seed))
    assert boxes == list(sample([case(whole.start, whole.stop)], EVERYWHERE, piece, seed))
    voxels = sum(box.voxels for box in boxes)
    assert voxels >= min(SAMPLED_VOXELS, whole.voxels)
    assert voxels - boxes[-1].voxels < SAMPLED_VOXELS
    assert all(box.intersect(whole) == box and box.voxels for box in boxes)
    assert len({box.start for box in boxes}) == len(boxes)


def test_pieces_lie_apart_through_the_volume() -> None:
    zs = sorted(box.start[0] for box in sample(sections(1000, 512), EVERYWHERE, (1, 512, 512), seed=5))
    assert len(zs) == 4
    assert min(b - a for a, b in itertools.pairwise(zs)) > 100


def test_what_is_empty_or_not_wanted_is_left_out() -> None:
    cases = [case((z, 0, 0), (z + 1, 64, 64), EMPTY if z % 2 else GREY) for z in range(20)]
    boxes = list(sample(cases, Box((3, 10, 0), (9, 30, 64)), (1, 64, 64), seed=0))
    assert sorted((box.start, box.stop) for box in boxes) == [((z, 10, 0), (z + 1, 30, 64)) for z in (4, 6, 8)]
    assert list(sample(cases, Box((30, 0, 0), (31, 1, 1)), (1, 64, 64), seed=0)) == []


@pytest.mark.parametrize(
    ("patch", "block"),
    [
        ((1, 384, 512), (1, 2048, 4096)),
        ((32, 128, 128), (64, 512, 512)),
        ((16, 64, 64.5), (5, 9, 7)),
        ((1, 1, 1), (9, 9, 9)),
    ],
)
def test_a_piece_is_like_the_patch_and_no_larger_than_a_block(patch: Any, block: Vec3) -> None:
    piece = piece_shape(patch, block)
    assert all(1 <= p <= b for p, b in zip(piece, block, strict=True))
    assert (piece[0] == 1) == (patch[0] == 1)
    if piece != block and max(patch) > 1:
        assert 0.45e6 < math.prod(piece) < 0.6e6


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    kept = Agreement(1_000_000, 12, (("cell", (0, 0, 0), (1, 1000, 1000)),))
    save(kept, tmp_path / "agreement.json")
    assert load(tmp_path / "agreement.json") == kept
    assert kept.share == 1.2e-5
    for broken in ("", "[]", '{"voxels": 1, "differ": 0, "boxes": [["cell", 1, 2]]}', '{"voxels": "many"}'):
        (tmp_path / "agreement.json").write_text(broken)
        assert load(tmp_path / "agreement.json") is None
    assert load(tmp_path / "absent.json") is None


@dataclasses.dataclass
class Labels:
    """Stands for a segmenter: these labels."""

    array: np.ndarray

    def segment(self, read: Any, surveyed: Any, core: Box) -> dict[str, np.ndarray]:
        return {"labels": self.array[core.slices][None]}


def test_differences_are_counted_and_too_many_refused(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(4)
    exact = generator.integers(0, 3, (8, 50, 60)).astype(np.uint8)
    fast = exact.copy()
    fast[generator.random(exact.shape) < 0.01] ^= 1
    expected = int((exact != fast).sum())
    cases = [[case((0, 0, 0), exact.shape)]]
    contract = FastContract(Labels(exact), 0.5, (4, 30, 30))  # type: ignore[arg-type]
    found = contract.measure(Labels(fast), None, cases, EVERYWHERE, 9, "cell")  # type: ignore[arg-type]
    assert (found.voxels, found.differ) == (exact.size, expected)
    assert {name for name, _, _ in found.boxes} == {"cell"}
    assert found + found == Agreement(2 * exact.size, 2 * expected, found.boxes + found.boxes)
    part = contract.measure(Labels(fast), None, cases, EVERYWHERE, 9, "cell", 5000)  # type: ignore[arg-type]
    assert 5000 <= part.voxels < 5000 + 4 * 30 * 30
    assert part.boxes == found.boxes[: len(part.boxes)]
    contract.require(found, "cell")
    assert f"cell: inference.precision=fast: {expected} of {exact.size} sampled labels differ" in caplog.text
    strict = dataclasses.replace(contract, most=(expected - 1) / exact.size)
    with pytest.raises(AgreementError, match=r"cell: .*at most .* may; set inference.precision=exact"):
        strict.require(found, "cell")
    dataclasses.replace(contract, most=expected / exact.size).require(found, "cell")
    assert FastContract(Labels(exact), 0, (1, 1, 1)).measure(  # type: ignore[arg-type]
        Labels(fast),
        None,
        [[case((0, 0, 0), (8, 50, 60), EMPTY)]],
        EVERYWHERE,
        0,  # type: ignore[arg-type]
        "cell",
    ) == Agreement(0, 0, ())
