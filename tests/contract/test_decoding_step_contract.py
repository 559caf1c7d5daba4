"""Our own steps run through the suite that is shipped for others."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.testing.decoding_step import DecodingStepContract, StepSample

RANDOM = np.random.default_rng(7)
LIKELY = ndimage.gaussian_filter(RANDOM.random((7, 18, 15)), 0.9).astype(np.float32)


def labels(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    smooth = ndimage.gaussian_filter(RANDOM.random(shape), 0.8)
    found = (smooth > np.quantile(smooth, 0.7)).astype(np.uint8)
    found[..., shape[2] // 2 :] *= 2
    return found


def hollow() -> npt.NDArray[np.uint8]:
    volume = np.zeros((8, 12, 11), np.uint8)
    volume[1:7, 1:11, 1:10] = 1
    volume[3:5, 3:9, 3:5] = 0
    volume[0, 0, 0] = 3
    return volume


SMALL, LARGE = labels((6, 13, 11)), labels((9, 12, 20))
LABELS = (
    StepSample(SMALL, RANDOM.integers(0, 256, SMALL.shape, np.uint8)),
    StepSample(LARGE),
    StepSample(labels((1, 9, 14))),
)


class TestConnectedComponents(DecodingStepContract):
    stated: ClassVar = {"name": "connected_components", "connectivity": 6}
    refused: ClassVar = ({"connectivity": 7}, {"channel": -1}, {"threshold": 0.5, "probabilities": "p.h5"})
    samples: ClassVar = LABELS


class TestConnectedComponentsOfProbabilities(DecodingStepContract):
    stated: ClassVar = {"name": "connected_components", "connectivity": 8, "threshold": 0.52}
    refused: ClassVar = ({"connectivity": 0},)
    samples: ClassVar = (StepSample(LIKELY),)


class TestFilters(DecodingStepContract):
    stated: ClassVar = {"name": "filters", "min_voxels": 2, "keep_largest": 6, "fill_holes": "3d"}
    refused: ClassVar = (
        {"min_voxels": -1},
        {"max_voxels": 1},
        {"min_volume_nm3": 5.0, "max_volume_nm3": 4.0},
        {"keep_largest": 0},
        {"fill_holes": "4d"},
    )
    samples: ClassVar = (
        StepSample(SMALL, LABELS[0].probabilities, (ConnectedComponents(),)),
        StepSample(hollow()),
    )


class TestSliceLinking(DecodingStepContract):
    stated: ClassVar = {"name": "slice_linking", "max_gap": 1}
    refused: ClassVar = ({"measure": "dice"}, {"threshold": 1.5}, {"max_gap": -1})
    samples: ClassVar = (*LABELS, StepSample(SMALL, None, (ConnectedComponents(connectivity=4),)))


class TestWatershedOfProbabilities(DecodingStepContract):
    stated: ClassVar = {
        "name": "watershed",
        "threshold": 0.45,
        "seed_threshold": 0.56,
        "max_component_voxels": 4096,
    }
    refused: ClassVar = ({"seed_threshold": 0.4}, {"seed_distance_nm": 9.0}, {"max_component_voxels": 100})
    samples: ClassVar = (
        StepSample(LIKELY),
        StepSample(ndimage.gaussian_filter(RANDOM.random((16, 30, 36)), 0.9).astype(np.float32)),
    )


class TestWatershedOfDistances(DecodingStepContract):
    stated: ClassVar = {"name": "watershed", "seed_distance_nm": 7.0, "connectivity": 8}
    refused: ClassVar = ({"seed_distance_nm": 0.0}, {"connectivity": 5}, {"seed_threshold": 0.5})
    samples: ClassVar = LABELS
