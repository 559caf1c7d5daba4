"""The watershed of blocks is scikit-image's of the whole volume, byte for byte, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from skimage.segmentation import watershed

from connectomics.decode.watershed import flooding_order
from connectomics.geometry import Vec3, vec3
from connectomics.pipeline.watershed import Watershed

from decoding import VOXEL_SIZE_NM, canonical, decode_array
from small_jobs import quick_folder

Array = npt.NDArray[Any]
NEIGHBOURS = (4, 8, 6, 18, 26)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


def footprint(neighbours: int) -> Array:
    """Which voxels are neighbours, as scipy has it."""
    if neighbours in (4, 8):
        flat = ndimage.generate_binary_structure(2, {4: 1, 8: 2}[neighbours])
        return np.stack([np.zeros_like(flat), flat, np.zeros_like(flat)])
    return ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[neighbours])


def distance_nm(inside: Array, neighbours: int) -> Array:
    """scipy's distances in the volume or in sections; where there is no background they are infinite."""
    if inside.all():
        return np.full(inside.shape, np.inf)
    if neighbours not in (4, 8):
        return ndimage.distance_transform_edt(inside, sampling=VOXEL_SIZE_NM)
    return np.concatenate(
        [
            np.full(s[None].shape, np.inf)
            if s.all()
            else ndimage.distance_transform_edt(s[None], sampling=VOXEL_SIZE_NM)
            for s in inside
        ]
    )


def whole(inside: Array, heights: Array, floor: float, neighbours: int, keep: bool, *, canonically: bool) -> Array:
    """scipy and scikit-image on the whole volume, numbered by the first voxels."""
    structure = footprint(neighbours)
    seeds, count = ndimage.label(inside & (heights > floor), structure)
    order = flooding_order(heights, seeds > 0, inside) if canonically else -heights
    found = watershed(order, seeds, structure, mask=inside)
    components, _ = ndimage.label(inside, structure)
    found = np.where((found == 0) & (components > 0) & keep, count + components, found)
    return canonical(found)


def random_case(seed: int) -> tuple[Array, float, Array, Vec3]:
    """Smooth probabilities, a threshold, labels, and blocks of any shape, at most about thirty."""
    generator = np.random.default_rng(seed)
    shape = generator.integers(1, 24, 3)
    block = np.maximum(generator.integers(1, 24, 3), -(-shape // 3))
    likely = ndimage.gaussian_filter(generator.random(shape), generator.choice([0.5, 1.0, 1.5])).astype(np.float32)
    threshold = float(np.quantile(likely, generator.choice([0.0, 0.3, 0.6])))
    return likely, threshold, likely > threshold, vec3(block.tolist())


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_seeds_of_probabilities(neighbours: int, folder: Path) -> None:
    several = 0
    for seed in range(6):
        likely, threshold, inside, block = random_case(seed * 10 + neighbours)
        high, keep = float(np.quantile(likely, 0.85)), seed % 2 == 0
        step = Watershed(neighbours, threshold, seed_threshold=high, keep_unseeded=keep)
        found = decode_array(likely, [step], block, folder / str(seed))
        expected = whole(inside, likely, high, neighbours, keep, canonically=False)
        assert np.array_equal(found.ids, expected), (seed, likely.shape, block)
        several += found.scene.facts["0"]["flooded"]  # type: ignore[index]
    assert several > 1


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_seeds_of_distances(neighbours: int, folder: Path) -> None:
    """In nm, of anisotropic voxels; among equal ones the first in raster order floods first."""
    several = 0
    for seed in range(6):
        _, _, inside, block = random_case(1000 + seed * 10 + neighbours)
        deep, keep = (6.5, 8.0, 13.0)[seed % 3], seed % 2 == 0
        step = Watershed(neighbours, seed_distance_nm=deep, keep_unseeded=keep)
        found = decode_array(inside.astype(np.uint8) * 3, [step], block, folder / str(seed))
        expected = whole(inside, distance_nm(inside, neighbours), deep, neighbours, keep, canonically=True)
        assert np.array_equal(found.ids, expected), (seed, inside.shape, block)
        several += found.scene.facts["0"]["flooded"]  # type: ignore[index]
    assert several > 1
