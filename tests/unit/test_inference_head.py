from __future__ import annotations

import numpy as np
import pytest
import torch

from connectomics.inference.head import LabelRule, ProbabilityRule, softmax

LOGITS = torch.randn((4, 3, 5, 7), generator=torch.Generator().manual_seed(1)) * 6


def test_softmax_agrees_with_torch() -> None:
    assert (softmax(LOGITS) - torch.softmax(LOGITS, 0)).abs().max() < 3e-7


def test_softmax_gives_the_same_bits_wherever_a_voxel_stands() -> None:
    part = (slice(None), slice(1, 3), slice(2, 5), slice(3, 6))
    assert torch.equal(softmax(LOGITS)[part], softmax(LOGITS[part]))


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
        (ProbabilityRule((0, 1), softmax=False), [0.0, 0.0]),
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
    assert rule.fits_png
    assert not ProbabilityRule((1,)).fits_png
    np.testing.assert_array_equal(ProbabilityRule((2,), softmax=False).apply(LOGITS)[0], LOGITS[2].numpy())
