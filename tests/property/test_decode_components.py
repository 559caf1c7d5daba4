"""Components of blocks joined are cc3d's components of the whole volume, byte for byte, however it is cut."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from connectomics.core.geometry import Vec3, vec3

from decoding import components_by_blocks, whole_components

Array = npt.NDArray[Any]
NEIGHBOURS = (4, 8, 6, 18, 26)


def require_equal(values: Array, neighbours: int, block: Vec3, folder: Path, **settings: int) -> None:
    expected = whole_components(values, neighbours)
    found = components_by_blocks(values, neighbours, block, folder, **settings)
    assert found.tobytes() == expected.tobytes(), (values.shape, block, neighbours)


def random_case(seed: int) -> tuple[Array, Vec3]:
    """A volume of one or several labels, sparse or dense, and blocks of any shape, at most about thirty."""
    generator = np.random.default_rng(seed)
    shape = generator.integers(1, 24, 3)
    block = np.maximum(generator.integers(1, 24, 3), -(-shape // 3))
    inside = generator.random(shape) < generator.choice([0.05, 0.2, 0.35, 0.6])
    labels = generator.integers(1, generator.choice([2, 3, 5]), shape)
    kind = generator.choice([np.uint8, np.uint16, np.uint32, np.uint64])
    return (inside * labels).astype(kind), vec3(block.tolist())


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_sixty_random_volumes(neighbours: int, folder: Path) -> None:
    """Twelve for each connectivity, some with tables that are read in tiny parts."""
    for seed in range(12):
        values, block = random_case(seed * 10 + neighbours)
        at_once = (3, 17, 1 << 22)[seed % 3]
        require_equal(values, neighbours, block, folder / str(seed), at_once=at_once)


@pytest.mark.long
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_many_random_volumes(neighbours: int, folder: Path) -> None:
    for seed in range(200):
        values, block = random_case(10_000 + seed * 10 + neighbours)
        require_equal(values, neighbours, block, folder / str(seed), at_once=(3, 17, 1 << 22)[seed % 3])


def snake(shape: Vec3) -> Array:
    """One path through every second line of every second section, turning at its ends."""
    volume = np.zeros(shape, bool)
    volume[::2, ::2] = True
    for y in range(1, shape[1], 2):
        volume[::2, y, -1 if y % 4 == 1 else 0] = True
    last = shape[1] - 1 - (shape[1] - 1) % 2
    for z in range(1, shape[0], 2):
        volume[z, last if z % 4 == 1 else 0, -1 if z % 4 == 1 and last % 4 == 0 else 0] = True
    return volume


def rings(shape: Vec3) -> Array:
    """Rings in each other, of two labels, and voxels that touch by corners."""
    volume = np.zeros(shape, np.uint8)
    for inset in range(0, min(shape) // 2, 2):
        inner = tuple(slice(inset, n - inset) for n in shape)
        core = tuple(slice(inset + 1, n - inset - 1) for n in shape)
        volume[inner] = 1 + inset // 2 % 2
        volume[core] = 0
    return volume


def spiral_of_corners(shape: Vec3) -> Array:
    """Voxels of which no two share a face or an edge, in chains by corners."""
    z, y, x = np.indices(shape)
    return (z % 2 == y % 2) & (y % 2 == x % 2) & ((z + y + x) % 5 < 3)


def single_voxels(shape: Vec3) -> Array:
    volume = np.zeros(shape, bool)
    volume[::2, ::2, ::2] = True
    return volume


SHAPES = {
    "snake": snake,
    "rings": rings,
    "corners": spiral_of_corners,
    "single voxels": single_voxels,
    "empty": lambda shape: np.zeros(shape, np.uint16),
    "full": lambda shape: np.ones(shape, np.uint16),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_shapes_that_cross_many_blocks(kind: str, neighbours: int, folder: Path) -> None:
    values = SHAPES[kind]((9, 13, 11))
    require_equal(values, neighbours, (9, 2, 11) if neighbours == 18 else (4, 5, 6), folder, at_once=50)


def test_the_snake_is_one_object_through_many_blocks(folder: Path) -> None:
    ids = components_by_blocks(snake((9, 13, 11)), 6, (3, 4, 3), folder)
    assert ids.max() == 1


@pytest.mark.parametrize("first_id", [2**32 - 3, 2**53 + 1])
def test_ids_do_not_wrap_at_two_to_the_32(first_id: int, folder: Path) -> None:
    values, block = random_case(4)
    expected = whole_components(values, 26)
    found = components_by_blocks(values, 26, block, folder, first_id=first_id)
    assert int(expected.max()) > 5
    assert np.array_equal(found, np.where(expected > 0, expected + np.uint64(first_id - 1), 0))


def real_labels(shared_data: Path) -> Array:
    """A dense segmentation of neurons (z, y, x)."""
    import crackle

    packed = shared_data / "em" / "labels" / "cc3d_connectomics" / "connectomics.npy.ckl.gz"
    labels: Array = crackle.decompress(gzip.decompress(packed.read_bytes()))
    return labels.T


def test_real_labels(shared_data: Path, folder: Path) -> None:
    values = np.ascontiguousarray(real_labels(shared_data)[100:180, 60:200, 200:360])
    for neighbours in (6, 26):
        require_equal(values, neighbours, (50, 70, 64), folder / str(neighbours))


@pytest.mark.long
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_all_real_labels(neighbours: int, shared_data: Path, folder: Path) -> None:
    require_equal(np.ascontiguousarray(real_labels(shared_data)), neighbours, (128, 160, 512), folder)
