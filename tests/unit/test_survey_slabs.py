"""Sections read several at once are those read one by one, in fewer reads and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from connectomics.core.geometry import AxisOrder, Box
from connectomics.stages.survey import section_reader as slabs
from connectomics.stages.survey.section_reader import SlabReader

VOXELS = np.random.default_rng(0).integers(0, 99, (2, 9, 20, 30), np.uint16)


def read_sections(axis: int, widths: tuple[int, ...]) -> tuple[list[Box], list[int]]:
    """Read sections across an axis, each in three pieces of whole rows; what was read, and the bytes held each time."""
    asked: list[Box] = []

    def read(box: Box) -> np.ndarray:
        asked.append(box)
        return VOXELS[(slice(None), *box.slices)].copy()

    back, extent = AxisOrder.across(axis).inverse, VOXELS.shape[1:]
    sections, rows, _ = AxisOrder.across(axis).turn(extent)  # type: ignore[arg-type]
    reader, held = SlabReader(read, axis, sections), []
    for i in range(sections):
        width = widths[i % len(widths)]
        for top, bottom in ((0, rows // 2), (rows // 2, rows - 1), (rows - 1, rows)):
            box = back.turn_box(Box((i, top, 0), (i + 1, bottom, width)))
            np.testing.assert_array_equal(reader(box), VOXELS[(slice(None), *box.slices)])
            held.append(sum(voxels.nbytes for _, voxels in reader._slabs))
    return asked, held


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_piece_is_read_for_many_sections_at_once(axis: int) -> None:
    asked, _ = read_sections(axis, (9,))
    assert len(asked) == 6  # the first section's three pieces, and those of all others
    assert sum(box.voxels for box in asked) == VOXELS[0].size // VOXELS.shape[3 if axis < 2 else 2] * 9


@pytest.mark.parametrize("limit", [0, 300, 1000, 3000])
@pytest.mark.parametrize("widths", [(9,), (5, 9, 3, 8), (9, 2)], ids=str)
def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: int, widths: tuple[int, ...]) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", limit)
    asked, held = read_sections(1, widths)
    assert max(held) <= limit
    assert (len(asked) < 60) == (limit > 300)


def test_what_was_read_makes_room_for_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section takes 324 bytes, so three are held; after the first, 19 more take seven times three reads."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1000)
    assert len(read_sections(1, (9,))[0]) == 3 + 7 * 3


def test_thick_boxes_are_read_as_they_are() -> None:
    box = Box((0, 3, 0), (9, 5, 9))
    assert SlabReader(lambda asked: VOXELS[(slice(None), *asked.slices)], 1, 20)(box).shape == (2, 9, 2, 9)
