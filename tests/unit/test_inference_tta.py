"""The mean over mirror images is nnU-Net's, bit for bit, however many of them go through the network at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from connectomics.inference.tta import forward_mirrored
from connectomics.models.backends.contract import NumericClass

AXES = [(), (1,), (0, 2), (0, 1, 2)]


class Crooked:
    """A network that no flip leaves as it is; notes how many rows it is given."""

    device = torch.device("cpu")

    def __init__(self, batch: int) -> None:
        self.numeric_class = NumericClass("crooked", "exact", batch, 1, "cpu")
        self.rows: list[int] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert 1 <= len(batch) <= self.numeric_class.batch
        self.rows.append(len(batch))
        ramp = torch.arange(batch[0].numel(), dtype=torch.float32).reshape(batch[0].shape) / 7
        return torch.cat([batch * ramp, batch + ramp, ramp - batch], 1)

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 2), (1, 3), (1, 8), (2, 3), (3, 3), (3, 5), (5, 64)])
def test_the_mean_is_that_of_nnunet_in_as_few_passes_as_there_are(
    axes: tuple[int, ...], count: int, batch: int
) -> None:
    windows = torch.randn(count, 1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    before, network = windows.clone(), Crooked(batch)
    found = forward_mirrored(network, windows, axes)
    theirs = SimpleNamespace(network=Crooked(count).forward, use_mirroring=bool(axes), allowed_mirroring_axes=axes)
    expected = nnUNetPredictor._internal_maybe_mirror_and_predict(theirs, windows)
    assert found.numpy().tobytes() == expected.numpy().tobytes()
    assert torch.equal(windows, before)
    rows = count * 2 ** len(axes)
    assert network.rows == [batch] * (rows // batch) + [rows % batch] * (rows % batch > 0)
