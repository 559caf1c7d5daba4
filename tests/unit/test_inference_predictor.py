"""What goes on beside the network: reading ahead, and PyTorch's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.errors import VolumeError
from connectomics.geometry import Box
from connectomics.inference.head import LabelRule
from connectomics.inference.predictor import RollingPredictor, SlidingWindow
from connectomics.io.volume import Array
from connectomics.lightning.inference import InferenceManager
from connectomics.models.backends.contract import NumericClass
from connectomics.models.backends.torch_eager import TorchBackend

from nnunet_models import make_model
from small_jobs import em_like


class Source:
    """Sections of random voxels; says what is read, and may refuse."""

    box = Box((0, 0, 0), (4, 8, 8))
    channels = 1

    def __init__(self, reading: Callable[[Box], None]) -> None:
        self.voxels = np.random.default_rng(0).standard_normal((1, *self.box.shape), np.float32)
        self.reading = reading

    def get(self, box: Box) -> Array:
        self.reading(box)
        part: Array = self.voxels[(slice(None), *box.slices)].copy()
        return part


class Twice:
    """The input and its double are the logits; something may happen before."""

    device = torch.device("cpu")
    numeric_class = NumericClass("twice", "exact", 1, 1, "cpu")

    def __init__(self, before: Callable[[], None]) -> None:
        self.before = before

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.before()
        return torch.cat([batch, batch * 2], 1)

    def close(self) -> None:
        """Nothing to close."""


def predictor(before: Callable[[], None] = lambda: None) -> RollingPredictor:
    return RollingPredictor((Twice(before),), SlidingWindow((1, 8, 8)), 2)


@pytest.mark.parametrize("apart", [True, False], ids=["cases of their own", "one case"])
def test_the_next_section_is_read_while_the_network_is_at_one(apart: bool) -> None:
    reached = [threading.Event() for _ in range(4)]
    source, passes = Source(lambda box: reached[box.start[0]].set()), iter(range(4))

    def before() -> None:
        following = next(passes) + 1
        assert following == 4 or reached[following].wait(20), f"section {following} was not begun"
        assert not any(event.is_set() for event in reached[following + 1 :]), "more than one section ahead"

    parts = [(source, box) for box in source.box.sections()] if apart else [(source, source.box)]
    found = {box: logits for box, logits in predictor(before).predict(parts)}
    assert list(found) == list(source.box.sections())
    for box, logits in found.items():
        voxels = source.voxels[(0, *box.slices)]
        np.testing.assert_allclose(logits.numpy(), np.stack([voxels, 2 * voxels]), rtol=1e-6)


def test_what_cannot_be_read_is_told_where_it_is_needed() -> None:
    def refuse(box: Box) -> None:
        if box.start[0] == 2:
            raise VolumeError("section 2 is damaged")

    finished = []
    with pytest.raises(VolumeError, match="section 2"):
        finished.extend(box for box, _ in predictor().predict([(Source(refuse), Source.box)]))
    assert finished == list(Source.box.sections())[:2]


def test_who_stops_early_leaves_no_reading_behind() -> None:
    read: list[Box] = []
    before = threading.active_count()
    finished = predictor().predict([(Source(read.append), Source.box)])
    next(finished)
    finished.close()
    assert threading.active_count() == before
    assert len(read) <= 3


def test_beside_the_network_pytorch_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And afterwards as many as it took before."""
    model = make_model(tmp_path, dimensions=2, patch=(16, 16), features=(4, 8))
    manager = InferenceManager.from_checkpoint(model, ["system.device=cpu", "system.num_cpus=2"])
    seen: dict[str, set[int]] = {"network": set(), "beside": set()}
    forward, apply = TorchBackend.forward, LabelRule.apply

    def network(self: TorchBackend, batch: torch.Tensor) -> torch.Tensor:
        assert self._network is not None
        self._network.register_forward_pre_hook(lambda *_: seen["network"].add(torch.get_num_threads()))
        return forward(self, batch)

    def beside(self: LabelRule, logits: torch.Tensor) -> Array:
        seen["beside"].add(torch.get_num_threads())
        return apply(self, logits)

    monkeypatch.setattr(TorchBackend, "forward", network)
    monkeypatch.setattr(LabelRule, "apply", beside)
    stated = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        manager.predict(em_like((1, 24, 32)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(stated)
    assert seen == {"network": {2}, "beside": {1}}
