"""NIfTI voxels and spacing beside the readers that nnU-Net trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_volume

RNG = np.random.default_rng(8)
TURNED = np.array([[0, 0, 3.3, 5], [2.2, 0, 0, 1], [0, 1.1, 0, 0], [0, 0, 0, 1.0]])
FLIPPED = np.diag([-1.1, -2.2, 3.3, 1.0])
PLAIN = np.diag([1.1, 2.2, 3.3, 1.0])


def written(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    affine: np.ndarray = PLAIN,
    unit: str | None = None,
    scale: tuple[float, float] | None = None,
) -> str:
    image = nibabel.Nifti1Image(RNG.integers(0, 120, shape).astype(dtype), affine)
    if unit:
        image.header.set_xyzt_units(unit)
    if scale:
        image.header.set_slope_inter(*scale)
    nibabel.save(image, path)
    return str(path)


def assert_read_as(io: Any, name: str) -> None:
    expected, properties = io.read_images([name])
    reader = open_volume(name)
    found = reader.read(Box.of_shape(reader.info.extent)).astype(np.float32)
    reader.close()
    np.testing.assert_array_equal(found, expected)
    assert reader.info.spacing == pytest.approx(tuple(properties["spacing"]), rel=1e-12)


CASES: dict[str, dict[str, Any]] = {
    "uint8": {"dtype": "uint8"},
    "int16 scaled": {"dtype": "int16", "scale": (0.37, -11.3)},
    "float32 scaled": {"dtype": "float32", "scale": (1.7, 0.1)},
    "float64 scaled": {"dtype": "float64", "scale": (1.7, 0.1)},
    "intercept alone": {"dtype": "uint16", "scale": (1.0, 3.0)},
    "turned": {"dtype": "uint8", "affine": TURNED},
    "flipped": {"dtype": "uint8", "affine": FLIPPED},
    "micrometres": {"dtype": "uint8", "unit": "micron"},
    "millimetres": {"dtype": "uint8", "unit": "mm"},
    "metres": {"dtype": "uint8", "unit": "meter"},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("io", "suffix"), [(SimpleITKIO, ".nii.gz"), (NibabelIO, ".nii")])
def test_voxels_and_spacing_are_those_of_the_suffix_reader(tmp_path: Path, case: str, io: Any, suffix: str) -> None:
    assert_read_as(io(), written(tmp_path / f"a{suffix}", (7, 6, 5), **CASES[case]))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_both_readers_agree_in_millimetres(tmp_path: Path, suffix: str) -> None:
    name = written(tmp_path / f"a{suffix}", (7, 6, 5), "int16", unit="mm")
    assert_read_as(SimpleITKIO(), name)
    assert_read_as(NibabelIO(), name)


@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 1), (7, 6, 5, 3), (7, 6, 5, 1), (7, 6, 1, 2)])
def test_sections_and_channels_are_those_of_simpleitk(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert_read_as(SimpleITKIO(), written(tmp_path / "a.nii.gz", shape, "uint8"))
