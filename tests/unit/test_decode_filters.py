"""Filters against scikit-image and scipy on random volumes, and their conventions."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import remove_small_objects as skimage_remove

from connectomics.objects.filters import fill_holes, remove_small_objects


def blobs(seed: int, shape: tuple[int, int, int], classes: int, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random(shape), 0.9)
    edges = np.quantile(smooth, np.linspace(0, 1, classes + 1)[1:-1])
    labels: np.ndarray = np.digitize(smooth, edges).astype(dtype)
    return labels


def skimage_keep(mask: np.ndarray, minimum_voxels: int) -> np.ndarray:
    # its newer releases renamed "drop below min_size" to "drop up to max_size"
    if "max_size" in inspect.signature(skimage_remove).parameters:
        return skimage_remove(mask, max_size=minimum_voxels - 1, connectivity=3)
    return skimage_remove(mask, min_size=minimum_voxels, connectivity=3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 30, 40), (9, 20, 25)])
@pytest.mark.parametrize("minimum_voxels", [0, 1, 2, 12])
def test_small_objects_go_as_in_scikit_image(dtype: type, shape: tuple[int, int, int], minimum_voxels: int) -> None:
    labels = blobs(3, shape, 4, dtype)
    before = labels.copy()
    result = remove_small_objects(labels, minimum_voxels)
    expected = np.zeros_like(labels)
    for label in (1, 2, 3):
        expected[skimage_keep(labels == label, max(1, minimum_voxels))] = label
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == dtype
    assert minimum_voxels < 2 or (expected != labels).any(), "the example must hold small objects"
    np.testing.assert_array_equal(labels, before)


def test_components_of_different_labels_are_counted_apart() -> None:
    labels = np.array([[[1, 1, 2, 0, 2, 2, 2]]], np.uint8)
    np.testing.assert_array_equal(remove_small_objects(labels, 3), [[[0, 0, 0, 0, 2, 2, 2]]])


def test_corners_connect() -> None:
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    np.testing.assert_array_equal(remove_small_objects(labels, 2), labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(1, 30, 40), (8, 20, 25), (3, 1, 40)])
def test_holes_are_filled_as_in_scipy(seed: int, shape: tuple[int, int, int]) -> None:
    labels = (blobs(seed, shape, 3) > 0).astype(np.uint8)
    if seed % 2:
        labels[..., 0] = 0  # foreground that does not reach every face
    labels[np.random.default_rng(seed).random(shape) < 0.05] = 0
    before = labels.copy()
    squeezed = labels.reshape([n for n in shape if n > 1])  # one section counts as an image
    expected = ndimage.binary_fill_holes(squeezed).reshape(shape)
    np.testing.assert_array_equal(fill_holes(labels), expected)
    assert shape[1] == 1 or (expected != labels).any(), "the example must hold holes"
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_each_label_fills_its_own_holes_in_turn(dtype: type) -> None:
    labels = (blobs(5, (6, 40, 40), 3) + 1).astype(dtype)
    labels[np.random.default_rng(5).random(labels.shape) < 0.3] = 0
    expected = labels.copy()
    for label in (1, 2, 3):
        expected[ndimage.binary_fill_holes(labels == label) & (expected == 0)] = label
    result = fill_holes(labels)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == dtype
    assert (result != labels).any(), "the example must hold holes"


def test_a_hole_within_two_labels_goes_to_the_lower_and_enclosed_labels_stay() -> None:
    ring = np.zeros((1, 9, 9), np.uint8)
    ring[0, 1:8, 1:8] = 4
    ring[0, 2:7, 2:7] = 0
    ring[0, 3:6, 3:6] = 2
    ring[0, 4, 4] = 0
    filled = fill_holes(ring)
    assert filled[0, 4, 4] == 2, "enclosed by 2 and 4"
    assert filled[0, 2, 2] == 4 and filled[0, 3, 3] == 2
    assert filled[0, 0, 0] == 0


def test_a_channel_through_an_edge_does_not_open_a_hole() -> None:
    labels = np.ones((3, 3, 3), np.uint8)
    labels[1, 1, 1] = labels[0, 0, 1] = 0  # they touch by an edge only
    filled = fill_holes(labels)
    assert filled[1, 1, 1] == 1 and filled[0, 0, 1] == 0


def test_nothing_stays_nothing() -> None:
    empty = np.zeros((2, 3, 4), np.uint8)
    assert not fill_holes(empty).any() and not remove_small_objects(empty, 5).any()
