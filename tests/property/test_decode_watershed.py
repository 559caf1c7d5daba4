"""The watershed of blocks is scikit-image's of the whole volume, byte for byte, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from skimage.metrics import adapted_rand_error
from skimage.segmentation import watershed

from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.objects.distance import beyond, squared_distance
from connectomics.objects.merge import number_by_first
from connectomics.objects.numbering.cuts import BlockFiles
from connectomics.objects.numbering.tables import merge
from connectomics.objects.watershed import flooding_order
from connectomics.stages.decode.tasks import BlockPieces, BlockTask, block_file, painted_block
from connectomics.stages.decode.watershed.flooding import Distance
from connectomics.stages.decode.watershed.seeded_watershed import Watershed

from decoding import VOXEL_SIZE_NM, canonical, decode_array

Array = npt.NDArray[Any]
NEIGHBOURS = (4, 8, 6, 18, 26)


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


@pytest.mark.parametrize("neighbours", [8, 26, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 6, 18))])
def test_seeds_of_probabilities(neighbours: int, folder: Path) -> None:
    several = 0
    for seed in range(4):
        likely, threshold, inside, block = random_case(seed * 10 + neighbours)
        high, keep = float(np.quantile(likely, 0.85)), seed % 2 == 0
        step = Watershed(connectivity=neighbours, threshold=threshold, seed_threshold=high, keep_unseeded=keep)
        found = decode_array(likely, [step], block, folder / str(seed))
        expected = whole(inside, likely, high, neighbours, keep, canonically=False)
        assert np.array_equal(found.ids, expected), (seed, likely.shape, block)
        several += found.state.facts["0"]["flooded"]  # type: ignore[index]
    assert several > 0


@pytest.mark.parametrize("neighbours", [8, 26, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 6, 18))])
def test_seeds_of_distances(neighbours: int, folder: Path) -> None:
    """In nm, of anisotropic voxels; among equal ones the first in raster order floods first."""
    several = 0
    for seed in range(4):
        _, _, inside, block = random_case(1000 + seed * 10 + neighbours)
        deep, keep = (6.5, 8.0, 13.0)[seed % 3], seed % 2 == 0
        step = Watershed(connectivity=neighbours, seed_distance_nm=deep, keep_unseeded=keep)
        found = decode_array(inside.astype(np.uint8) * 3, [step], block, folder / str(seed))
        expected = whole(inside, distance_nm(inside, neighbours), deep, neighbours, keep, canonically=True)
        assert np.array_equal(found.ids, expected), (seed, inside.shape, block)
        several += found.state.facts["0"]["flooded"]  # type: ignore[index]
    assert several > 0


def test_a_component_has_the_same_distances_in_its_box_as_in_the_volume() -> None:
    """The background beyond the faces of its box counts, and so does what is not background there."""
    inside = np.random.default_rng(4).random((9, 14, 12)) < 0.4
    components, count = ndimage.label(inside)
    distance = Distance(lambda b: inside[b.slices], BlockGrid(inside.shape, inside.shape), VOXEL_SIZE_NM, False)
    expected = np.rint(ndimage.distance_transform_edt(inside, sampling=VOXEL_SIZE_NM) ** 2) * 1e6
    for number, (z, y, x) in enumerate(ndimage.find_objects(components), 1):
        box = Box((z.start, y.start, x.start), (z.stop, y.stop, x.stop))
        own = components[box.slices] == number
        assert np.array_equal(distance(box)[own], expected[box.slices][own])
    assert count > 20


def real_predictions(shared_data: Path, kind: str) -> Array:
    """Probabilities of mitochondria (z, y, x) from nnU-Net's own logits: a small stack, or a section."""
    place = {
        "stack": "vnc_mito_3d/crop_z00-15_y512-1023_x768-1023/logits_preresample_nomirror.npz",
        "section": "vnc_mito_2d/fold0_nomirror/vnc_12_logits.npz",
    }[kind]
    logits = np.load(shared_data / "reference" / place)["logits"].astype(np.float32)
    likely: Array = 1 / (1 + np.exp(logits[0] - logits[1]))
    return likely.reshape(-1, *likely.shape[-2:])[:, :512, 512:] if kind == "section" else likely


CUT = {
    "probability": ("stack", {"threshold": 0.5, "seed_threshold": 0.99}),
    "distance": ("stack", {"threshold": 0.2, "seed_distance_nm": 20.0}),
    "section": ("section", {"threshold": 0.5, "seed_threshold": 0.99, "connectivity": 8}),
}


@pytest.mark.parametrize(
    "case", ["section", *(pytest.param(case, marks=pytest.mark.long) for case in ("probability", "distance"))]
)
def test_large_components_of_real_predictions(case: str, shared_data: Path, folder: Path) -> None:
    """Flooded in windows of 16,384 voxels they have an adapted Rand error below 0.001, whatever the blocks."""
    kind, settings = CUT[case]
    likely, most = real_predictions(shared_data, kind), 1 << (14 if kind == "stack" else 12)
    once = decode_array(likely, [Watershed(**settings)], vec3(likely.shape), folder / "once")
    cut = [
        decode_array(likely, [Watershed(**settings, max_component_voxels=most)], block, folder / str(block))
        for block in (vec3(likely.shape), vec3([-(-n // 2) for n in likely.shape]))
    ]
    assert cut[0].state.facts == cut[1].state.facts
    assert cut[0].state.facts["0"]["cut"] >= 1 and once.state.facts["0"]["cut"] == 0  # type: ignore[index]
    assert cut[0].ids.tobytes() == cut[1].ids.tobytes()
    assert cut[0].ids.max() == once.ids.max() and np.array_equal(cut[0].ids > 0, once.ids > 0)
    assert adapted_rand_error(once.ids, cut[0].ids)[0] < 0.001


@pytest.mark.parametrize("neighbours", [6, 26])
def test_random_components_in_tiny_windows(neighbours: int, folder: Path) -> None:
    """Every seed is one object, nothing is left out, and nearly all voxels are where one flood has them."""
    shape = (16, 30, 36)
    for seed in range(2):
        likely = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1.0).astype(np.float32)
        threshold, high = (float(np.quantile(likely, share)) for share in (0.3, 0.9))
        step = Watershed(
            connectivity=neighbours,
            threshold=threshold,
            seed_threshold=high,
            keep_unseeded=False,
            max_component_voxels=4096,
        )
        found = decode_array(likely, [step], shape, folder / str(seed))
        other = decode_array(likely, [step], (9, 30, 20), folder / f"{seed} in blocks")
        expected = whole(likely > threshold, likely, high, neighbours, keep=False, canonically=False)
        assert found.ids.tobytes() == other.ids.tobytes()
        assert found.state.facts["0"]["cut"] >= 1  # type: ignore[index]
        assert found.ids.max() == expected.max() and np.array_equal(found.ids > 0, expected > 0)
        assert adapted_rand_error(expected.astype(np.int64), found.ids)[0] < 0.001


@pytest.mark.parametrize("at_once", [3, 1 << 22])
def test_numbers_by_the_first_voxel(at_once: int, folder: Path) -> None:
    """With tables that are read in tiny parts, too."""
    values = np.random.default_rng(1).integers(0, 40, (5, 6, 7)).astype(np.uint32) * 3
    grid, pieces = BlockGrid(values.shape, (3, 4, 7)), folder / "pieces"
    task = BlockTask(grid, pieces, BlockPieces(lambda box: values[box.slices], None))
    blocks = list(grid)
    for made in (pieces, folder / "tables"):
        made.mkdir()
    for block in blocks:
        task.process(block)
    cuts = BlockFiles([block_file(pieces, block) for block in blocks]).cuts()
    count = merge(cuts, folder / "tables", at_once=at_once, range_pieces=(at_once, at_once))
    number_by_first(folder / "tables", count, at_once=at_once)
    expected = canonical(values)
    for block in blocks:
        found = painted_block(grid, block, pieces, folder / "tables", np.dtype(np.uint64))
        assert np.array_equal(found, expected[block.core.slices])
    rows = np.load(folder / "tables" / "objects.npy")
    assert np.array_equal(rows["voxels"], np.bincount(expected.ravel().astype(np.int64))[1:])
    assert (np.diff(rows["first"].astype(np.int64)) > 0).all() and set(rows["value"]) == {1}


def test_distances_are_exact() -> None:
    """The nearest of all voxels outside, looked at one by one; of voxels whose size is no whole number of nm."""
    inside = np.random.default_rng(2).random((6, 9, 8)) < 0.85
    size = (45.0, 4.6, 4.625)
    places = np.argwhere(np.ones_like(inside)) * [45000, 4600, 4625]
    outside = places[~inside.ravel()]
    nearest = [((outside - place) ** 2).sum(axis=1).min() for place in places]
    assert np.array_equal(squared_distance(inside, size).ravel(), nearest)
    box = Box((1, 2, 1), (5, 8, 8))
    near = Distance(lambda b: inside[b.slices], BlockGrid(inside.shape, inside.shape), size, by_section=False)
    exact = squared_distance(inside, size)[box.slices]
    assert np.array_equal(beyond(near.near(box, 9.3), 9.3), exact > 9300**2) and (exact > 9300**2).any()


def test_the_highest_are_flooded_first_and_of_equal_ones_the_marked_in_raster_order() -> None:
    """As sorting the voxels one by one by these rules has it; unmarked ones of equal height have one turn."""
    rng = np.random.default_rng(3)
    heights, marked = rng.integers(0, 5, (4, 5, 6)), rng.random((4, 5, 6)) < 0.4
    inside = rng.random((4, 5, 6)) < 0.9
    rules = [
        (-h, not m, i if m else 0)
        for i, (h, m) in enumerate(zip(heights.ravel().tolist(), (marked & inside).ravel().tolist(), strict=True))
        if inside.ravel()[i]
    ]
    turns = {rule: turn for turn, rule in enumerate(sorted(set(rules)))}
    _, found = np.unique(flooding_order(heights, marked & inside, inside)[inside], return_inverse=True)
    assert found.tolist() == [turns[rule] for rule in rules]
