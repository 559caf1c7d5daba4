"""Steps on a small volume in memory against scipy, scikit-image and cc3d on the whole: filters, holes, the table."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from skimage.measure import regionprops

from connectomics.objects.selection import Selection
from connectomics.objects.table import write_table
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.stages.decode.object_filters import Filters

from decoding import VOXEL_SIZE_NM, decode_array, table_of, whole_components

Array = npt.NDArray[Any]
BLOCK = (7, 10, 9)


def blobs(shape: tuple[int, int, int] = (12, 15, 14), seed: int = 0) -> Array:
    """Two classes of blobs with holes."""
    generator = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(generator.random(shape), 0.9)
    labels = (smooth > np.quantile(smooth, 0.7)).astype(np.uint8)
    labels[:, :, 7:] *= 2
    return labels


def shells() -> Array:
    """A hollow cube, a hollow cube open to the border, one with a small object inside, one made of two classes."""
    volume = np.zeros((14, 24, 24), np.uint8)
    for y, x in ((1, 1), (1, 12), (12, 1), (12, 12)):
        volume[1:9, y : y + 9, x : x + 9] = 1
        volume[3:7, y + 2 : y + 7, x + 2 : x + 7] = 0
    volume[5:14, 5, 16] = 0
    volume[4, 16, 5] = 1
    volume[1:9, 12:21, 17:21] *= 2
    return volume


def test_the_table_is_regionprops(folder: Path) -> None:
    values = blobs()
    likely = np.random.default_rng(1).integers(0, 256, values.shape, np.uint8)
    decoded = decode_array(values, [ConnectedComponents(connectivity=6)], BLOCK, folder, likely)
    ids = whole_components(values, 6)
    assert np.array_equal(decoded.ids, ids) and decoded.ids.dtype == np.uint32
    table = table_of(decoded, folder)
    regions = regionprops(ids.astype(np.int64), likely)
    assert table["id"] == [r.label for r in regions] and len(regions) > 5
    assert table["class"] == [int(values[tuple(r.coords[0])]) for r in regions]
    assert table["voxels"] == [r.area for r in regions]
    for i, axis in enumerate("zyx"):
        assert table[f"bbox_start_{axis}"] == [r.bbox[i] for r in regions]
        assert table[f"bbox_stop_{axis}"] == [r.bbox[i + 3] for r in regions]
        assert table[f"centroid_{axis}"] == pytest.approx([r.centroid[i] for r in regions], rel=1e-12)
        assert table[f"centroid_{axis}_nm"] == pytest.approx([r.centroid[i] * VOXEL_SIZE_NM[i] for r in regions])
    voxel = math.prod(VOXEL_SIZE_NM)
    assert table["volume_nm3"] == pytest.approx([r.area * voxel for r in regions])
    diameters = [r.equivalent_diameter_area * voxel ** (1 / 3) for r in regions]
    assert table["equivalent_diameter_nm"] == pytest.approx(diameters)
    assert table["mean_probability"] == pytest.approx([r.intensity_mean / 255 for r in regions], rel=1e-12)
    assert table["minimum_probability"] == pytest.approx([r.intensity_min / 255 for r in regions])
    assert table["sections"] == [len(np.unique(r.coords[:, 0])) for r in regions]
    low, high = np.zeros(3), np.array(values.shape) - 1
    assert table["touches_border"] == [bool(((r.coords == low) | (r.coords == high)).any()) for r in regions]


def test_the_table_does_not_depend_on_blocks(folder: Path) -> None:
    values, likely = blobs(seed=3), np.random.default_rng(4).integers(0, 256, (12, 15, 14), np.uint8)
    tables = []
    for block in (BLOCK, (12, 15, 14), (1, 15, 14)):
        place = folder / "-".join(map(str, block))
        decoded = decode_array(values, [ConnectedComponents(), Filters(min_voxels=2)], block, place, likely)
        tables.append(table_of(decoded, place))
    assert tables[0] == tables[1] == tables[2]


def test_objects_in_sections(folder: Path) -> None:
    """z has no border, and the diameter is a circle's."""
    values = blobs()
    decoded = decode_array(values, [ConnectedComponents(connectivity=8)], BLOCK, folder)
    ids = whole_components(values, 8)
    assert np.array_equal(decoded.ids, ids)
    table = table_of(decoded, folder)
    regions = regionprops(ids.astype(np.int64))
    edges = [bool({0, 14} & set(r.coords[:, 1]) | {0, 13} & set(r.coords[:, 2])) for r in regions]
    assert table["touches_border"] == edges and not all(edges)
    assert table["sections"] == [1] * len(regions)
    area = VOXEL_SIZE_NM[1] * VOXEL_SIZE_NM[2]
    assert table["equivalent_diameter_nm"] == pytest.approx([2 * math.sqrt(r.area * area / math.pi) for r in regions])


def test_probabilities_above_a_threshold(folder: Path) -> None:
    likely = ndimage.gaussian_filter(np.random.default_rng(0).random((12, 15, 14)), 1.0).astype(np.float32)
    decoded = decode_array(likely, [ConnectedComponents(threshold=0.52)], BLOCK, folder)
    ids = whole_components((likely > 0.52).astype(np.uint8), 26)
    assert np.array_equal(decoded.ids, ids)
    table = table_of(decoded, folder)
    regions = regionprops(ids.astype(np.int64), likely)
    assert table["mean_probability"] == pytest.approx([float(r.intensity_mean) for r in regions], abs=1e-6)
    assert table["minimum_probability"] == [float(r.intensity_min) for r in regions]


@pytest.mark.parametrize("per_class", [True, False])
def test_over_classes(per_class: bool, folder: Path) -> None:
    values = blobs()
    decoded = decode_array(values, [ConnectedComponents(connectivity=6, per_class=per_class)], BLOCK, folder)
    assert np.array_equal(decoded.ids, whole_components(values if per_class else (values > 0).astype(np.uint8), 6))


def sizes(ids: Array) -> Array:
    return np.bincount(ids.ravel().astype(np.int64))


def kept_by(selection: Selection, ids: Array) -> Array:
    """The rules applied to the whole volume by numpy."""
    count = sizes(ids)
    keep = count >= selection.minimum_voxels
    if selection.maximum_voxels is not None:
        keep &= count <= selection.maximum_voxels
    if selection.off_border:
        faces = [np.unique(ids.take(i, axis)) for axis in range(3) for i in (0, -1)]
        keep[np.concatenate(faces).astype(np.int64)] = False
    keep[0] = False
    if selection.largest is not None:
        order = sorted(np.flatnonzero(keep), key=lambda i: (-count[i], i))
        keep[order[selection.largest :]] = False
    return np.where(keep[ids.astype(np.int64)], ids, 0)


SELECTIONS = {
    "small": Filters(min_voxels=20),
    "large": Filters(max_voxels=40),
    "border": Filters(drop_border=True),
    "largest": Filters(keep_largest=3),
    "none of the largest": Filters(keep_largest=0),
    "equal sizes": Filters(max_voxels=2, keep_largest=2),
    "all": Filters(min_voxels=2, max_voxels=300, drop_border=True, keep_largest=2),
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_filters_are_those_of_the_whole_volume(kind: str, folder: Path) -> None:
    """Together with the components, and as a step of their own that reads ids which something else made."""
    values, chosen = blobs(seed=5), SELECTIONS[kind]
    ids = whole_components(values, 6)
    expected = kept_by(chosen.selection(None), ids)
    steps = [ConnectedComponents(connectivity=6), chosen]
    fused = decode_array(values, steps, BLOCK, folder / "fused", fused=True)
    assert np.array_equal(fused.ids, expected)
    after = decode_array(values, steps, BLOCK, folder / "after")
    alone = decode_array(ids + (ids > 0) * 7, [chosen], BLOCK, folder / "alone")
    assert np.array_equal(after.ids, expected) and np.array_equal(alone.ids, expected + (expected > 0) * 7)
    tables = [table_of(each, folder) for each in (fused, after, alone)]
    assert tables[0] == tables[1]
    assert tables[2]["id"] == [i + 7 for i in tables[0]["id"]] and tables[2]["class"] == [None] * len(tables[0]["id"])
    assert [n for n in sizes(expected)[1:] if n] == tables[0]["voxels"]


@pytest.mark.parametrize("kind", ["blobs", "shells"])
def test_holes_are_binary_fill_holes(kind: str, folder: Path) -> None:
    """Of one object in the volume and in sections; scipy judges."""
    values = (blobs(seed=7) > 0).astype(np.uint8) if kind == "blobs" else (shells() > 0).astype(np.uint8)
    volume = decode_array(values, [Filters(fill_holes="3d")], BLOCK, folder / "3d")
    assert np.array_equal(volume.ids, ndimage.binary_fill_holes(values))
    section = decode_array(values, [Filters(fill_holes="2d")], BLOCK, folder / "2d")
    assert np.array_equal(section.ids, np.stack([ndimage.binary_fill_holes(s) for s in values]))


def test_only_holes_within_one_object_are_filled(folder: Path) -> None:
    """What lies between two objects, or around a smaller object, is not a hole of one."""
    ids = whole_components(shells(), 6)
    decoded = decode_array(ids.astype(np.uint32), [Filters(fill_holes="3d")], BLOCK, folder)
    background = cc3d.connected_components((ids == 0).astype(np.uint8), connectivity=6)
    expected, filled = ids.copy(), 0
    for number in range(1, background.max() + 1):
        hole = background == number
        around = np.unique(ids[ndimage.binary_dilation(hole) & ~hole])
        at_border = any(hole.take(i, axis).any() for axis in range(3) for i in (0, -1))
        if len(around) == 1 and not at_border:
            expected[hole], filled = around[0], filled + 1
    assert filled == 1 and np.array_equal(decoded.ids, expected)


def test_filled_holes_are_counted_in_the_table(folder: Path) -> None:
    values = shells()
    likely = np.random.default_rng(1).integers(0, 256, values.shape, np.uint8)
    steps = [ConnectedComponents(connectivity=6), Filters(min_voxels=5, fill_holes="3d")]
    decoded = decode_array(values, steps, BLOCK, folder, likely)
    table = table_of(decoded, folder)
    regions = regionprops(decoded.ids.astype(np.int64), likely)
    assert table["id"] == [r.label for r in regions]
    assert table["voxels"] == [r.area for r in regions]
    assert table["class"] == [1, 1, 1, 1, 2]
    assert table["centroid_y"] == pytest.approx([r.centroid[1] for r in regions], rel=1e-12)
    assert table["mean_probability"] == pytest.approx([r.intensity_mean / 255 for r in regions], rel=1e-12)


def test_csv_has_the_same_lines(folder: Path) -> None:
    decoded = decode_array(blobs(), [ConnectedComponents()], BLOCK, folder)
    table = table_of(decoded, folder)
    assert decoded.state.tables is not None
    write_table(decoded.state.tables, decoded.state.count, folder / "o.csv", decoded.state.frame, "key")
    with (folder / "o.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [int(line["id"]) for line in lines] == table["id"]
    assert [float(line["centroid_z_nm"]) for line in lines] == table["centroid_z_nm"]
    assert {line["mean_probability"] for line in lines} == {""}


@pytest.mark.parametrize("fill", [0, 1])
def test_empty_and_full(fill: int, folder: Path) -> None:
    values = np.full((6, 8, 7), fill, np.uint8)
    decoded = decode_array(values, [ConnectedComponents(), Filters(min_voxels=1, fill_holes="3d")], BLOCK, folder)
    assert np.array_equal(decoded.ids, values)
    assert table_of(decoded, folder)["voxels"] == [values.size] * fill
