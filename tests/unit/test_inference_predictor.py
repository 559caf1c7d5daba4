"""Full batches, whatever they are filled from, and what goes on beside the network."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, Vec3
from connectomics.inference.head import LabelRule
from connectomics.inference.predictor import RollingPredictor, SlidingWindow
from connectomics.lightning.inference import InferenceManager
from connectomics.models.backends.contract import NumericClass
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.volumes.volume import Array

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


def predictor(before: Callable[[], None] = lambda: None, batch: int = 1) -> RollingPredictor:
    return RollingPredictor((Twice(before),), SlidingWindow((1, 8, 8), batch=batch), 2)


class Crooked:
    """A network that no flip leaves as it is, and whose rows do not see each other; notes its calls.

    Parameters
    ----------
    fold
        Makes networks differ.
    batch
        Rows that it takes at most.
    made
        Logits of all networks, as far as something still holds them.
    """

    device = torch.device("cpu")

    def __init__(self, fold: int, batch: int, made: list[weakref.ref[Array]]) -> None:
        self.fold, self.numeric_class = fold, NumericClass("crooked", "exact", batch, 1, "cpu")
        self.made = made
        self.rows: list[int] = []
        self.alive: list[int] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert 1 <= len(batch) <= self.numeric_class.batch
        self.rows.append(len(batch))
        self.alive.append(sum(array() is not None for array in self.made))
        ramp = np.arange(batch[0].numel(), dtype=np.float32).reshape(batch.shape[1:]) * np.float32(0.01)
        mean = batch.numpy().mean(1, keepdims=True)
        logits: Array = np.concatenate([np.sin(mean * (ramp[:1] + k + self.fold)) for k in range(2)], 1)
        self.made.append(weakref.ref(logits))
        return torch.from_numpy(logits)

    def close(self) -> None:
        """Nothing to close."""


class Noise:
    """A case of random voxels of any box, zeros outside it."""

    def __init__(self, box: Box, seed: int) -> None:
        self.box, self.channels = box, 2
        self.voxels = np.random.default_rng(seed).standard_normal((2, *box.shape), np.float32)

    def get(self, box: Box) -> Array:
        result: Array = np.zeros((2, *box.shape), np.float32)
        inner = box.intersect(self.box)
        result[(slice(None), *inner.relative_to(box).slices)] = self.voxels[
            (slice(None), *inner.relative_to(self.box).slices)
        ]
        return result


CASES = [
    (Noise(Box((0, 0, 0), (5, 21, 17)), 1), Box((0, 3, 0), (5, 19, 17))),  # rows before and after are not wanted
    (Noise(Box((5, 2, 1), (8, 13, 6)), 2), Box((5, 2, 1), (8, 13, 6))),  # narrower than a window
    (Noise(Box((8, 0, 0), (13, 9, 31)), 3), Box((9, 0, 7), (12, 9, 30))),
]


def rolled(
    patch: Vec3, axes: tuple[int, ...], batch: int, folds: int = 2, step: float = 0.5
) -> tuple[list[tuple[Box, bytes]], list[Crooked], int]:
    """Finished boxes with their logits, the networks, and the number of windows."""
    kept: list[weakref.ref[Array]] = []
    networks = [Crooked(fold, batch, kept) for fold in range(folds)]
    made = RollingPredictor(tuple(networks), SlidingWindow(patch, step, mirror_axes=axes, batch=batch), 2)
    finished = [(box, logits.numpy().tobytes()) for box, logits in made.predict(CASES)]
    return finished, networks, sum(made.windows(*part) for part in CASES)


@functools.cache
def one_by_one(patch: Vec3, axes: tuple[int, ...]) -> tuple[list[tuple[Box, bytes]], list[Crooked], int]:
    """As ``rolled`` with a window at a time, which takes longest and is what every batch is compared with."""
    return rolled(patch, axes, 1)


PATCHES = [((1, 8, 6), axes) for axes in ((), (2,), (1, 2))] + [((4, 6, 8), axes) for axes in ((), (0, 1, 2))]


@pytest.mark.parametrize(("patch", "axes"), PATCHES)
@pytest.mark.parametrize("batch", [2, 3, 4, 6, 8, 500])
def test_batches_are_full_and_change_no_bit(patch: Vec3, axes: tuple[int, ...], batch: int) -> None:
    """Over rows, sections, parts and mirror images; one window at a time is what the parity tests hold to nnU-Net."""
    finished, networks, windows = rolled(patch, axes, batch)
    expected, single, _ = one_by_one(patch, axes)
    assert finished == expected
    assert len({box for box, _ in finished}) == len(finished)
    assert sum(box.voxels for box, _ in finished) == sum(core.voxels for _, core in CASES)
    for network in networks:
        assert sum(network.rows) == windows * 2 ** len(axes) == len(single[0].rows)
        assert set(network.rows[:-1]) <= {batch}, "only the last pass has empty rows"


@pytest.mark.parametrize("step", [0.3, 0.7, 1.0])
def test_windows_wait_for_their_batch_while_rows_move_on(step: float) -> None:
    for patch in ((1, 8, 6), (4, 6, 8)):
        assert rolled(patch, (), 64, step=step)[0] == rolled(patch, (), 1, step=step)[0]


@pytest.mark.parametrize(("batch", "most"), [(1, 2), (3, 3), (4, 1), (8, 2)])
def test_no_more_logits_are_kept_than_memory_is_counted_for(batch: int, most: int) -> None:
    """Beside a pass: the sum over mirror images, and the folds before; of a window alone only the last of these."""
    _, networks, _ = rolled((1, 8, 6), (1, 2), batch, folds=3)
    assert max(max(network.alive) for network in networks) == most


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("apart", [True, False], ids=["cases of their own", "one case"])
def test_the_next_section_is_read_while_the_network_is_at_one(apart: bool, batch: int) -> None:
    reached = [threading.Event() for _ in range(4)]
    source, passes = Source(lambda box: reached[box.start[0]].set()), iter(range(4))

    def before() -> None:
        following = batch * (next(passes) + 1)
        assert following >= 4 or reached[following].wait(20), f"section {following} was not begun"
        assert not any(event.is_set() for event in reached[following + 1 :]), "more than one section ahead"

    parts = [(source, box) for box in source.box.sections()] if apart else [(source, source.box)]
    found = {box: logits for box, logits in predictor(before, batch).predict(parts)}
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


@pytest.mark.parametrize("batch", [1, 2])
def test_who_stops_early_leaves_no_reading_behind(batch: int) -> None:
    read: list[Box] = []
    before = threading.active_count()
    source, made = Source(read.append), predictor(batch=batch)
    finished = made.predict([(source, source.box)])
    next(finished)
    finished.close()
    assert threading.active_count() == before
    assert len(read) <= 2 + batch
    assert [box for box, _ in made.predict([(source, source.box)])] == list(source.box.sections())


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
