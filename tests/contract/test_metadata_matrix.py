"""Every cell of the matrix formats × metadata of docs/formats.md: what a file says is used or refused."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from metadata_matrix import MATRIX, Fact, Writer

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_volume

REPOSITORY = Path(__file__).resolve().parents[2]
CELLS = {
    f"{fact}-{form}": cell for fact, row in MATRIX.items() for form, cell in row.items() if not isinstance(cell, str)
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_cell(tmp_path: Path, cell: Writer) -> None:
    for fact in cell(tmp_path):
        if fact.refused:
            with pytest.raises(VolumeError, match=fact.refused) as caught:
                open_volume(str(fact.uri))
            assert "\n" not in str(caught.value)
            if fact.remedy:
                open_volume(str(fact.uri), **fact.remedy).close()
        elif fact.files:
            check_identity(fact)
        else:
            check_reading(fact)


def check_reading(fact: Fact) -> None:
    with contextlib.closing(open_volume(str(fact.uri))) as volume:
        info = volume.info
        if fact.voxels is not None:
            right = fact.voxels if fact.voxels.ndim == 4 else fact.voxels[None]
            found = volume.read(Box.of_shape(info.extent))
            assert info.shape == right.shape and info.dtype == right.dtype == found.dtype
            np.testing.assert_array_equal(found, right)
        if fact.size is not None:
            assert info.voxel_size_nm == (pytest.approx(fact.size, rel=1e-4) if fact.size else None), fact.uri
            assert bool(info.found.get("voxel size")) == bool(fact.size), info.found
        if fact.origin is not None:
            assert info.origin_nm == pytest.approx(fact.origin, rel=1e-4), fact.uri
            assert info.found["origin"]
        if fact.unread:
            fact.spoil()
            with pytest.raises(VolumeError, match=fact.unread) as caught:
                volume.read(Box.of_shape(info.extent))
            assert "\n" not in str(caught.value)


def check_identity(fact: Fact) -> None:
    seen = [identity_of(fact)]
    for file in fact.files:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000_000))
        seen.append(identity_of(fact))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i]), fact.uri
    assert identity_of(fact) == seen[-1]


def identity_of(fact: Fact) -> dict[str, object]:
    with contextlib.closing(open_volume(str(fact.uri))) as volume:
        return volume.identity


def test_the_page_shows_the_matrix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.setattr(sys, "argv", ["write_format_matrix.py", "--check"])
    import write_format_matrix

    assert write_format_matrix.main() == 0, capsys.readouterr().out
