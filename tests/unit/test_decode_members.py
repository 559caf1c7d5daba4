"""Files of named arrays: what is saved is loaded, and a damaged file is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.core.errors import LedgerError
from connectomics.objects.arrays import load, save
from connectomics.objects.pieces import PIECE, nothing


def test_members_come_back(tmp_path: Path) -> None:
    rows = nothing(3)
    rows["sums"] = np.arange(9).reshape(3, 3)
    plane = np.arange(12, dtype=np.uint32).reshape(3, 4)[:, ::2]
    save(tmp_path / "f", rows=rows, plane=plane, empty=np.zeros((0, 2), np.uint8))
    loaded, first, empty = load(tmp_path / "f", "plane", "rows", "empty")
    assert np.array_equal(loaded, plane) and loaded.dtype == np.uint32
    assert first.dtype == PIECE and first.tobytes() == rows.tobytes()
    assert empty.shape == (0, 2)


@pytest.mark.parametrize("damage", ["absent", "cut", "no header", "no member"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if damage != "absent":
        save(path, other=np.arange(100)) if damage == "no member" else save(path, plane=np.arange(100))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    if damage == "no header":
        path.write_bytes(b"\0" * 100)
    with pytest.raises(LedgerError, match="to decode anew"):
        load(path, "plane")
