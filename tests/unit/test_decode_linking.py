"""Linking over z against whole sections, scikit-image's labels and dictionaries, however the volume is cut."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import label, regionprops

from connectomics.core.errors import QuarantineError
from connectomics.core.geometry import Vec3, vec3
from connectomics.objects import links, overlaps
from connectomics.objects.links import Linking
from connectomics.objects.numbering import ranges
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.stages.decode.object_filters import Filters
from connectomics.stages.decode.slice_linking import SliceLinking

from decoding import canonical, decode_array, table_of

Array = npt.NDArray[Any]
Node = tuple[int, int]  # a section and the number of an object in it


def sections_of(values: Array, ids: bool) -> Array:
    """Objects of each section, in the order that decides between equals: by id, or by the first voxel."""
    return np.stack([section if ids else label(section, connectivity=2, background=0) for section in values])


def linked(values: Array, rule: Linking, ids: bool = False, classes: Array | None = None) -> Array:
    """Ids of linked objects of a whole volume, by dictionaries."""
    objects = sections_of(values, ids)
    kinds = classes if classes is not None else (np.zeros_like(values) if ids else values)
    size: dict[Node, int] = {}
    kind: dict[Node, int] = {}
    for z, section in enumerate(objects):
        for region in regionprops(section.astype(np.int64)):
            size[z, region.label] = int(region.area)
            kind[z, region.label] = int(kinds[z][tuple(region.coords[0])])
    chosen: list[tuple[Node, Node]] = []
    ahead: defaultdict[Node, list[int]] = defaultdict(list)
    behind: defaultdict[Node, list[int]] = defaultdict(list)
    for distance in range(1, rule.max_gap + 2):
        found: dict[tuple[Node, Node], tuple[float, int]] = {}
        for z in range(len(values) - distance):
            here, there = objects[z].ravel().tolist(), objects[z + distance].ravel().tolist()
            shared: defaultdict[tuple[Node, Node], int] = defaultdict(int)
            for a, b in zip(here, there, strict=True):
                if a and b:
                    shared[(z, a), (z + distance, b)] += 1
            for (one, other), voxels in shared.items():
                whole = size[one] + size[other] - voxels if rule.measure == "iou" else min(size[one], size[other])
                free = not any(n < other[0] for n in ahead[one]) and not any(n > one[0] for n in behind[other])
                if voxels / whole >= rule.threshold and kind[one] == kind[other] and free:
                    found[one, other] = (voxels / whole, voxels)
        pairs = list(found)
        if rule.one_to_one:
            pairs = [
                (one, other)
                for one, other in pairs
                if (one, other) == max((p for p in found if p[0] == one), key=lambda p: (*found[p], -p[1][1]))
                and (one, other) == max((p for p in found if p[1] == other), key=lambda p: (*found[p], -p[0][1]))
            ]
        for one, other in pairs:
            ahead[one].append(other[0])
            behind[other].append(one[0])
        chosen += pairs
    nodes = {node: i for i, node in enumerate(sorted(size))}
    edges = np.array([[nodes[one], nodes[other]] for one, other in chosen], np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(len(nodes), len(nodes)))
    group = connected_components(graph, directed=False)[1] if nodes else []
    result = np.zeros(values.shape, np.int64)
    for (z, number), i in nodes.items():
        result[z][objects[z] == number] = group[i] + 1
    return canonical(result)


def stack(seed: int) -> Array:
    """Blobs of two classes that go on over z, branch and touch; some are missing in a section, and some sections."""
    generator = np.random.default_rng(seed)
    shape = generator.integers((3, 8, 8), (10, 25, 25))
    smooth = ndimage.gaussian_filter(generator.random(shape), (generator.choice([0.4, 0.8]), 1.2, 1.2))
    values = (smooth > np.quantile(smooth, generator.choice([0.5, 0.7, 0.85]))).astype(np.uint8)
    for section in values:
        section[:, shape[2] // 2 + generator.integers(-3, 4) :] *= np.uint8(1 + seed % 2)
        objects, count = ndimage.label(section)
        section[np.isin(objects, 1 + np.flatnonzero(generator.random(count) < 0.2))] = 0
    values[generator.random(shape[0]) < 0.15] = 0
    return values


def rule_of(seed: int) -> Linking:
    """Every measure, gap and kind of link in turn; of thresholds also the ends."""
    generator = np.random.default_rng(seed + 1000)
    threshold = float(generator.choice([0.0, 0.1, 0.25, 0.25, 0.5, 1.0]))
    return Linking(("iou", "overlap")[seed % 2], threshold, seed // 2 % 4, seed // 8 % 2 == 1)


def block_of(seed: int, shape: tuple[int, ...]) -> Vec3:
    """Any shape that gives at most about twenty blocks; often thinner than a link is long."""
    generator = np.random.default_rng(seed + 2000)
    return vec3(np.maximum(generator.integers(1, 12, 3), -(-np.array(shape) // (5, 2, 2))).tolist())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tables are read in parts of a few rows, sections counted line by line."""

    def small(at_once: int) -> None:
        monkeypatch.setattr(links, "AT_ONCE", at_once)
        monkeypatch.setattr(links, "SPAN_OBJECTS", (at_once, at_once))
        monkeypatch.setattr(ranges, "RANGE_PIECES", (at_once, at_once))
        monkeypatch.setattr(overlaps, "VOXELS_AT_ONCE", 30)

    yield small


def linking(rule: Linking, ids: bool = False) -> SliceLinking:
    return SliceLinking(**dataclasses.asdict(rule), ids=ids)


@pytest.mark.parametrize("stacks", [14, pytest.param(52, marks=pytest.mark.long)])
def test_random_stacks(folder: Path, small_parts: Any, stacks: int) -> None:
    """Labels; the tables of the last four are read in tiny parts."""
    leaps = 0
    for seed in range(stacks):
        values, rule = stack(seed), rule_of(seed)
        if seed == stacks - 4:
            small_parts(5)
        block = block_of(seed, values.shape)
        decoded = decode_array(values, [linking(rule)], block, folder / str(seed))
        expected = linked(values, rule)
        assert np.array_equal(decoded.ids, expected), (seed, values.shape, block, rule)
        leaps += rule.max_gap > 0 and not np.array_equal(expected, linked(values, dataclasses.replace(rule, max_gap=0)))
    assert leaps > stacks * 0.4, "gaps are closed"


def foreign_ids(seed: int) -> Array:
    """Ids as other programs leave them: anew in each section, of objects that touch or are in several parts."""
    generator = np.random.default_rng(seed)
    values = stack(seed).astype(np.uint16)
    for section in values:
        parts, count = ndimage.label(section)
        halves = parts * 2 - (np.indices(section.shape)[0] % 7 < 3) * (parts > 0)  # neighbours that touch
        names = generator.permutation(2 * count) // 2 * 5 + 3  # two parts of one name, anywhere in the section
        section[:] = np.where(parts > 0, names[halves - 1], 0) if count else 0
    return values


@pytest.mark.parametrize("stacks", [9, pytest.param(24, marks=pytest.mark.long)])
def test_ids_of_another_program(folder: Path, small_parts: Any, stacks: int) -> None:
    """What is one id in a section stays whole, what touches it stays apart."""
    for seed in range(stacks):
        values, rule = foreign_ids(seed), rule_of(seed)
        if seed == stacks * 2 // 3:
            small_parts(3)
        decoded = decode_array(values, [linking(rule, ids=True)], block_of(seed, values.shape), folder / str(seed))
        assert np.array_equal(decoded.ids, linked(values, rule, ids=True)), (seed, rule)
        assert not decoded.state.frame.classes and not decoded.state.frame.flat


def test_after_components_of_sections(folder: Path) -> None:
    """What a step has left are ids; their classes are not linked, and are still known."""
    for seed in range(6):
        values, rule = stack(seed), rule_of(seed)
        steps = [ConnectedComponents(connectivity=4), Filters(min_voxels=2), linking(rule)]
        decoded = decode_array(values, steps, block_of(seed, values.shape), folder / str(seed))
        parts = np.stack([label(section, connectivity=1, background=0) for section in values])
        for section in parts:
            section[np.isin(section, np.flatnonzero(np.bincount(section.ravel()) < 2))] = 0
        expected = linked(parts, rule, ids=True, classes=values)
        assert np.array_equal(decoded.ids, expected), (seed, rule)
        assert decoded.state.frame.classes and not decoded.state.frame.flat
        classes = [int(values[expected == i].min()) for i in range(1, expected.max() + 1)]
        assert table_of(decoded, folder)["class"] == classes


def test_the_table_is_regionprops_of_the_whole_volume(folder: Path) -> None:
    """However it is cut; z has a border again."""
    values, rule = np.pad(stack(10), ((0, 0), (1, 1), (1, 1))), Linking(max_gap=1)
    likely = np.random.default_rng(1).integers(0, 256, values.shape, np.uint8)
    tables = []
    for block in (values.shape, (1, 9, 11), (4, 9, 30)):
        place = folder / "-".join(map(str, block))
        decoded = decode_array(values, [linking(rule)], vec3(block), place, likely)
        tables.append(table_of(decoded, place))
    assert tables[0] == tables[1] == tables[2]
    ids, table = linked(values, rule), tables[0]
    regions = regionprops(ids.astype(np.int64), likely)
    assert table["id"] == [r.label for r in regions] and len(regions) > 5
    assert table["class"] == [int(values[tuple(r.coords[0])]) for r in regions]
    assert table["voxels"] == [r.area for r in regions]
    assert table["sections"] == [r.bbox[3] - r.bbox[0] for r in regions] and max(table["sections"]) > 2
    for i, axis in enumerate("zyx"):
        assert table[f"bbox_start_{axis}"] == [r.bbox[i] for r in regions]
        assert table[f"centroid_{axis}"] == pytest.approx([r.centroid[i] for r in regions], rel=1e-12)
    assert table["mean_probability"] == pytest.approx([r.intensity_mean / 255 for r in regions], rel=1e-12)
    last = np.array(values.shape) - 1
    touches = [bool(((r.coords == 0) | (r.coords == last)).any()) for r in regions]
    assert table["touches_border"] == touches and len(set(touches)) == 2


def test_selected_objects_are_those_of_a_filter_behind(folder: Path) -> None:
    values, rule = stack(5), Linking()
    steps = [linking(rule), Filters(min_voxels=12, keep_largest=4)]
    fused = decode_array(values, steps, (3, 9, 9), folder / "fused", fused=True)
    after = decode_array(values, steps, (3, 9, 9), folder / "after")
    assert np.array_equal(fused.ids, after.ids) and 0 < fused.state.count < linked(values, rule).max()
    assert table_of(fused, folder) == table_of(after, folder)


def bar(*sections: str) -> Array:
    """Sections of one line each, a digit a voxel."""
    return np.array([[[int(digit) for digit in section]] for section in sections], np.uint8)


CASES = {
    "a section is missing": (bar("1110", "0000", "1110"), Linking(max_gap=1), bar("1110", "0000", "1110")),
    "two are missing, one may be": (bar("1110", "0000", "0000", "1110"), Linking(max_gap=1), bar("1", "0", "0", "2")),
    "something small is there": (bar("1111", "1000", "1111"), Linking(threshold=0.5, max_gap=1), bar("1", "2", "1")),
    "a link in between forbids a leap": (
        bar("1111", "1100", "1111"),
        Linking(threshold=0.5, max_gap=1),
        bar("1111", "1100", "1111"),
    ),
    "a branch": (bar("1111111", "1110111"), Linking(), bar("1111111", "1110111")),
    "a branch, one to one": (bar("1111111", "1110011"), Linking(one_to_one=True), bar("1111111", "1110022")),
    "equals, one to one": (bar("1111111", "1110111"), Linking(one_to_one=True), bar("1111111", "1110222")),
    "small in large, by the union": (bar("11111", "10000"), Linking(threshold=0.5), bar("11111", "20000")),
    "small in large, by the smaller": (bar("11111", "10000"), Linking("overlap", 0.5), bar("11111", "10000")),
    "exactly the threshold": (bar("1100", "0110"), Linking(threshold=1 / 3), bar("1100", "0110")),
    "another class": (bar("1111", "2222"), Linking(), bar("1111", "2222")),
    "not above each other": (bar("1100", "0011"), Linking(threshold=0.0), bar("1100", "0022")),
}


@pytest.mark.parametrize("case", CASES)
def test_cases_by_hand(case: str, folder: Path) -> None:
    values, rule, expected = CASES[case]
    decoded = decode_array(values, [linking(rule)], (1, 1, 3), folder)
    assert np.array_equal(decoded.ids, np.where(values > 0, np.broadcast_to(expected, values.shape), 0))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("depth", [1, 4])
def test_empty_and_full_and_a_single_section(fill: int, depth: int, ids: bool, folder: Path) -> None:
    values = np.full((depth, 6, 7), fill, np.uint8)
    decoded = decode_array(values, [linking(Linking(max_gap=2), ids)], (3, 4, 4), folder)
    assert np.array_equal(decoded.ids, values)
    assert table_of(decoded, folder)["voxels"] == [values.size] * fill


def test_ids_too_large_for_their_sections(folder: Path) -> None:
    """Of 5 sections 61 digits are left."""
    values = np.zeros((5, 3, 3), np.uint64)
    values[:, 0, 0] = (1 << 61) - 1
    decoded = decode_array(values, [SliceLinking(ids=True)], (2, 3, 3), folder / "fits")
    assert np.array_equal(decoded.ids, values > 0)
    values[3, 2, 2] = 1 << 61
    with pytest.raises(
        QuarantineError, match=r"id 2305843009213693952 in voxels \(2, 0, 0\).* below 2305843009213693952"
    ):
        decode_array(values, [SliceLinking(ids=True)], (2, 3, 3), folder / "too large")
