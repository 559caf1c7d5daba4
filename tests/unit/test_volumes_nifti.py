"""Packed NIfTI: unpacked once, at the first read, into a file that is gone when the volume is closed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_volume

WHOLE = Box((0, 0, 0), (5, 6, 7))


def test_it_is_unpacked_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((7, 6, 5), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    made = []

    def temporary_file() -> object:
        made.append(real(dir=tmp_path))
        return made[-1]

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    reader = open_volume(str(tmp_path / "a.nii.gz"))
    assert reader.identity["name"] == "a.nii.gz" and not made
    for _ in range(3):
        assert (reader.read(WHOLE) == 1).all()
    assert len(made) == 1 and not made[0].closed
    reader.close()
    assert made[0].closed
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_a_plain_file_that_shrinks_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((7, 6, 5), np.uint8), np.eye(4)), path)
    reader = open_volume(str(path))
    with path.open("r+b") as stream:
        stream.truncate(400)
    with pytest.raises(Exception, match=r"a\.nii, voxels .* it was cut short"):
        reader.read(WHOLE)
    reader.close()
