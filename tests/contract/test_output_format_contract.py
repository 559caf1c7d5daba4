"""Our own output formats run through the suite that is shipped; readers that are not ours say what was written."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import tifffile
from PIL import Image

from connectomics.testing.output_format import OutputFormatContract, OutputSample
from connectomics.volumes.volume import VolumeInfo

from pyramids import READERS

RANDOM = np.random.default_rng(12)
LABELS = (
    OutputSample(RANDOM.integers(0, 3, (1, 5, 34, 17), np.uint8)),
    OutputSample(RANDOM.integers(0, 40_000, (1, 1, 20, 40), np.uint16)),
)
IDS = OutputSample(RANDOM.integers(0, 1 << 40, (1, 9, 33, 17), np.uint64))
PROBABILITIES = OutputSample(RANDOM.random((3, 5, 20, 17), np.float32), labels=False)
HALVES = OutputSample(RANDOM.random((1, 2, 20, 37)).astype(np.float16), labels=False)
ALL = (*LABELS, IDS, PROBABILITIES, HALVES)


class TestHdf5(OutputFormatContract):
    form: ClassVar = "h5"
    samples: ClassVar = ALL

    def read(self, path: Path) -> np.ndarray:
        with h5py.File(path) as file:
            voxels = file["main"][:]
        return voxels.reshape((1,) * (4 - voxels.ndim) + voxels.shape)


class TestTiff(OutputFormatContract):
    form: ClassVar = "tiff"
    samples: ClassVar = ALL

    def read(self, path: Path) -> np.ndarray:
        with tifffile.TiffFile(path) as tif:
            voxels, axes = tif.asarray(squeeze=False), tif.series[0].get_axes(squeeze=False)
        assert axes in ("ZYX", "CZYX")
        return voxels.reshape((1,) * (4 - voxels.ndim) + voxels.shape)


class TestPng(OutputFormatContract):
    form: ClassVar = "png"
    samples: ClassVar = LABELS
    refused: ClassVar = (
        VolumeInfo((1, 2, 20, 20), np.dtype(np.uint32), (1, 20, 20)),
        VolumeInfo((1, 2, 20, 20), np.dtype(np.float32), (1, 20, 20)),
        VolumeInfo((2, 2, 20, 20), np.dtype(np.uint8), (1, 20, 20)),
    )

    def read(self, path: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(image)) for image in sorted(path.glob("*.png"))])[None]


class PyramidContract(OutputFormatContract):
    samples: ClassVar = ALL

    def read(self, path: Path) -> np.ndarray:
        voxels = READERS[self.form](path, 0)
        return voxels.reshape((1,) * (4 - voxels.ndim) + voxels.shape)


class TestZarr(PyramidContract):
    form: ClassVar = "zarr"


class TestZarr2(PyramidContract):
    form: ClassVar = "zarr2"


class TestN5(PyramidContract):
    form: ClassVar = "n5"


class TestPrecomputed(PyramidContract):
    form: ClassVar = "precomputed"
    refused: ClassVar = (VolumeInfo((1, 2, 20, 20), np.dtype(np.uint8), (1, 20, 20)),)
