from __future__ import annotations

import numpy as np
import pytest
import torch

from connectomics.inference.head import LabelRule, ProbabilityRule, sigmoid, softmax

LOGITS = torch.randn((4, 3, 5, 7), generator=torch.Generator().manual_seed(1)) * 6


def test_softmax_agrees_with_torch() -> None:
    assert (softmax(LOGITS) - torch.softmax(LOGITS, 0)).abs().max() < 3e-7


def test_softmax_gives_the_same_bits_wherever_a_voxel_stands() -> None:
    part = (slice(None), slice(1, 3), slice(2, 5), slice(3, 6))
    assert torch.equal(softmax(LOGITS)[part], softmax(LOGITS[part]))


def test_sigmoid_agrees_with_torch_and_so_does_what_it_paints() -> None:
    assert (sigmoid(LOGITS) - torch.sigmoid(LOGITS)).abs().max() <= 1.2e-7
    near = torch.from_numpy(np.linspace(-1e-6, 1e-6, 16 * 625, dtype=np.float32))  # whole vectors, the usual case
    assert torch.equal(sigmoid(near) > 0.5, torch.sigmoid(near) > 0.5)
    extreme = sigmoid(torch.tensor([-1e4, -0.0, 0.0, 1e4]))
    assert extreme.tolist() == [0.0, 0.5, 0.5, 1.0]


def test_sigmoid_gives_the_same_bits_wherever_a_voxel_stands() -> None:
    values = torch.randn(1003, generator=torch.Generator().manual_seed(2)) * 6
    whole = sigmoid(values)
    for length in range(1, 70):
        assert torch.equal(sigmoid(values[7 : 7 + length].clone()), whole[7 : 7 + length])
    part = (slice(None), slice(1, 3), slice(2, 5), slice(3, 6))
    assert torch.equal(sigmoid(LOGITS)[part], sigmoid(LOGITS[part]))


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 1, 1, 300), (0, 32767, 2, 0)])
def test_regions_are_painted_one_over_the_other_as_nnunets_label_manager_does(order: tuple[int, ...]) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager({"background": 0, "a": [1, 2, 3], "b": [2, 3], "c": 3, "d": 4}, list(order))
    expected = manager.convert_logits_to_segmentation(LOGITS).numpy()
    labels = LabelRule(np.dtype(np.uint16), painted=order).apply(LOGITS)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint16


def test_a_threshold_takes_the_largest_of_regions_because_they_overlap() -> None:
    labels = LabelRule(np.dtype(np.uint8), 0.7, (0, 2), (1, 2, 3, 4)).apply(LOGITS)
    share = torch.sigmoid(LOGITS.double())[[0, 2]].amax(0).numpy()
    np.testing.assert_array_equal(labels, share > 0.7)


def test_labels_are_the_argmax_the_first_of_equals() -> None:
    logits = LOGITS.clone()
    logits[:, 0, 0, 0] = 1.0
    labels = LabelRule(np.dtype(np.uint8)).apply(logits)
    np.testing.assert_array_equal(labels, logits.numpy().argmax(0))
    assert labels.dtype == np.uint8
    assert labels[0, 0, 0] == 0


def test_a_threshold_sums_the_foreground() -> None:
    labels = LabelRule(np.dtype(np.uint8), 0.6, (1, 3)).apply(LOGITS)
    share = torch.softmax(LOGITS.double(), 0)[[1, 3]].sum(0).numpy()
    np.testing.assert_array_equal(labels, share > 0.6)


@pytest.mark.parametrize(
    ("rule", "outside"),
    [
        (ProbabilityRule((0, 1)), [1.0, 0.0]),
        (ProbabilityRule((2, 0), scale=255.0, dtype=np.dtype(np.uint8)), [0, 255]),
        (ProbabilityRule((0, 1), activation="none"), [0.0, 0.0]),
        (ProbabilityRule((0, 1), activation="sigmoid"), [0.0, 0.0]),
    ],
)
def test_what_lies_outside_the_nonzero_box(rule: ProbabilityRule, outside: list[float]) -> None:
    assert rule.background().tolist() == outside
    assert rule.background().dtype == rule.dtype


def test_stored_probabilities_are_scaled_rounded_and_clipped() -> None:
    rule = ProbabilityRule((1,), scale=300.0, dtype=np.dtype(np.uint8))
    expected = np.clip(np.rint(torch.softmax(LOGITS, 0)[1].numpy() * 300), 0, 255)
    stored = rule.apply(LOGITS)
    assert stored.dtype == np.uint8
    assert np.abs(stored[0].astype(int) - expected).max() <= 1
    assert stored.max() == 255
    np.testing.assert_array_equal(ProbabilityRule((2,), activation="none").apply(LOGITS)[0], LOGITS[2].numpy())
