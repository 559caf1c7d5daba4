"""Linking of sections against a reference of whole sections and dictionaries (scikit-image labels), however it is cut."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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

from connectomics.decode import links, overlaps
from connectomics.decode.links import Linking
from connectomics.decode.selection import Selection
from connectomics.errors import VolumeError
from connectomics.geometry import Vec3, vec3
from connectomics.pipeline import linking, workshop
from connectomics.pipeline.linking import SliceLinking
from connectomics.pipeline.steps import ConnectedComponents, Filters

from decoding import canonical, decode_array
from small_jobs import quick_folder

Array = npt.NDArray[Any]
Node = tuple[int, int]  # a section and the number of an object in it


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


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
    """Blobs of two classes that go on over z, bend, branch and touch; some are missing in a section, some sections too."""
    generator = np.random.default_rng(seed)
    shape = generator.integers((3, 8, 8), (10, 25, 25))
    smooth = ndimage.gaussian_filter(generator.random(shape), (generator.choice([0.4, 0.8]), 1.2, 1.2))
    values = (smooth > np.quantile(smooth, generator.choice([0.5, 0.7, 0.85]))).astype(np.uint8)
    values[:, :, shape[2] // 2 :] *= np.uint8(generator.integers(1, 3))
    for section in values:
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
    """Any shape that gives at most about thirty blocks; often thinner than a link is long."""
    generator = np.random.default_rng(seed + 2000)
    return vec3(np.maximum(generator.integers(1, 12, 3), -(-np.array(shape) // (5, 3, 3))).tolist())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tables are read in parts of a few rows, sections counted line by line."""

    def small(at_once: int) -> None:
        monkeypatch.setattr(linking, "link", functools.partial(links.link, at_once=at_once))
        monkeypatch.setattr(overlaps, "VOXELS_AT_ONCE", 30)

    yield small


def test_sixty_four_random_stacks(folder: Path, small_parts: Any) -> None:
    """Labels, of which a quarter with tables that are read in tiny parts."""
    leaps = 0
    for seed in range(64):
        values, rule = stack(seed), rule_of(seed)
        if seed == 48:
            small_parts(5)
        block = block_of(seed, values.shape)
        decoded = decode_array(values, [SliceLinking(rule)], block, folder / str(seed))
        expected = linked(values, rule)
        assert np.array_equal(decoded.ids, expected), (seed, values.shape, block, rule)
        leaps += rule.max_gap > 0 and not np.array_equal(expected, linked(values, dataclasses.replace(rule, max_gap=0)))
    assert leaps > 20, "gaps are closed"
