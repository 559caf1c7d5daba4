"""A device's memory is tried before the first block: fewer windows, smaller blocks, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.assembly.engine import backends as build_backends
from connectomics.assembly.engine import make_engine as build_engine_module
from connectomics.assembly.engine.backends import as_begun, fitting_backends
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.memory import plan_within_device
from connectomics.assembly.settings import network_settings, resolve
from connectomics.config.load import load_config
from connectomics.core.errors import DeviceMemoryError
from connectomics.core.geometry import Box, Vec3
from connectomics.inference.predictor import RollingPredictor, SlidingWindow
from connectomics.inference.resample import ResampledPredictor, Resampling
from connectomics.models.backends.contract import Backend, NumericClass
from connectomics.models.backends.probe import exhausted, largest_fitting, naming_what_ran_out, try_batch
from connectomics.models.spec import ResamplingRule
from connectomics.volumes.volume import VolumeInfo

from nnunet_models import make_model

MOST_WINDOWS = 3


class Small:
    """A backend on a device whose memory holds so many windows; it has two classes."""

    def __init__(self, batch: int, most: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.numeric_class = NumericClass("torch", "exact", batch, 1, device)
        self.most, self.passes = most, 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return batch[:, :1].repeat(1, 2, 1, 1, 1)

    def close(self) -> None:
        """Nothing."""


def test_a_batch_is_halved_until_it_fits_and_whatever_else_fails_is_not_hidden() -> None:
    tried: list[int] = []

    def make(batch: int) -> str:
        tried.append(batch)
        Small(batch, MOST_WINDOWS).forward(torch.zeros(batch, 1, 1, 2, 2))
        return f"made for {batch}"

    assert largest_fitting(make, 12) == ("made for 3", 3)
    assert tried == [12, 6, 3]

    def broken(batch: int) -> str:
        raise RuntimeError("CUDA error: device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        largest_fitting(broken, 4)


def test_not_even_one_window_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        DeviceMemoryError, match=r"for one window already .*20\.00 MiB.*window_size, or use system\.dev"
    ):
        largest_fitting(lambda batch: Small(batch, 0).forward(torch.zeros(batch, 1, 1, 2, 2)), 4)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shape '[2]' is invalid"), False),
    ],
)
def test_what_counts_as_exhausted(error: RuntimeError, expected: bool) -> None:
    assert exhausted(error) is expected
    with pytest.raises(DeviceMemoryError if expected else RuntimeError), naming_what_ran_out("memory is short", "wait"):
        raise error


def test_the_cpu_is_not_tried_and_another_device_with_a_whole_batch_twice() -> None:
    here, there = Small(2, 2), Small(2, 2, "meta")
    try_batch(here, 1, (1, 2, 2))
    assert here.passes == 0
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # has no value to wait for
        try_batch(there, 1, (1, 2, 2))
    assert there.passes == 2


@pytest.mark.parametrize("patch", [(1, 8, 8), (4, 8, 8)])
def test_a_rehearsal_takes_whole_sums_and_a_full_batch(patch: Vec3, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    zeros = torch.zeros

    def counting(*shape: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = zeros(*shape, **options)
        taken.append(made.numel())
        return made

    monkeypatch.setattr(torch, "zeros", counting)
    shape, depth = (6, 20, 30), {1: 8, 4: 4}[patch[0]]
    held = depth * 30 * (20 if patch[0] == 4 else 1)
    backend = Small(3, 3)
    predictor = RollingPredictor((backend, backend), SlidingWindow(patch, mirror_axes=(2,), batch=3), 2)
    predictor.try_memory(shape, 1)
    assert backend.passes == 4  # two folds, each mirrored
    assert taken == [2 * 2 * held, held]
    tight = RollingPredictor((Small(3, 2),), SlidingWindow(patch, batch=3), 2)
    with pytest.raises(DeviceMemoryError, match=r"blocks of \(6, 20, 30\) voxels and 3 windows.*block_shape"):
        tight.try_memory(shape, 1)
    predictor.try_memory((1, 3, 5), 1)  # smaller than a window


def test_a_rehearsal_is_as_large_as_the_networks_grid() -> None:
    asked: list[tuple[Vec3, int]] = []

    class Inner:
        def try_memory(self, shape: Vec3, channels: int) -> None:
            asked.append((shape, channels))

    rule = ResamplingRule("resample_data_or_seg_to_shape", 1, 0, None)
    resampling = Resampling((4.0, 2.0, 1.0), (2.0, 2.0, 3.0), rule, rule)
    ResampledPredictor(Inner(), resampling).try_memory((5, 7, 10), 2)  # type: ignore[arg-type]  # the rest is not asked
    assert asked == [((10, 7, 4), 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dimensions=2, patch=(16, 16), features=(4, 8))


def words(model: Path, *more: str) -> list[str]:
    return [f"model.nnunet_checkpoint='{model}'", "system.device=cpu", "system.num_cpus=1", *more]


def holding(most: int) -> Callable[[Backend, int, Vec3], None]:
    """In place of ``try_batch``: a device that holds so many windows."""

    def tried(backend: Backend, channels: int, patch: Vec3) -> None:
        Small(0, most).forward(torch.zeros(backend.numeric_class.batch, channels, *patch))

    return tried


def test_the_batch_that_fits_is_in_the_numeric_class_and_goes_on_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, words(model, "inference.sliding_window.sw_batch_size=8"))
    monkeypatch.setattr(build_backends, "try_batch", holding(2))
    engine = build_engine(config)
    assert engine.settings.numeric_class["batch"] == 2
    assert engine.models[0].window.batch == 2
    begun = dict(engine.settings.numeric_class)
    networks = network_settings(config)
    assert as_begun(networks, begun).batch == 8
    on_gpu = begun | {"device": "cuda 9.0 NVIDIA H200"}
    assert as_begun(networks, on_gpu).batch == 2
    assert as_begun(networks, on_gpu | {"batch": 16}).batch == 8
    monkeypatch.setattr(build_backends, "try_batch", holding(0))
    with pytest.raises(DeviceMemoryError, match="for one window already"):
        build_engine(config)


def test_what_fast_is_held_against_has_to_fit_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, words(model, "inference.sliding_window.sw_batch_size=4", "inference.precision=fast"))
    tried: list[tuple[str, int]] = []

    def noting(backend: Backend, channels: int, patch: Vec3) -> None:
        tried.append((backend.numeric_class.precision, backend.numeric_class.batch))
        if tried[-1] == ("exact", 4):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build_backends, "try_batch", noting)
    stated = resolve(config)
    loaded = [each for _, each in load_models(stated.models)]
    fitting = fitting_backends(stated.networks, loaded, [(1, 16, 16)])
    assert tried == [("fast", 4), ("exact", 4), ("fast", 2), ("exact", 2)]
    assert fitting.batch == 2
    assert fitting.reference is not None


@pytest.fixture
def engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """As if its device had a gigabyte of its own."""
    monkeypatch.setattr(build_engine_module, "free_device_bytes", lambda device: 10**9)
    return build_engine(load_config(None, words(model)))


@pytest.mark.parametrize("most", [4096, 1100, 10])
def test_blocks_are_cut_until_the_device_really_has_their_memory(
    engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    tried: list[Vec3] = []

    def try_memory(self: RollingPredictor, shape: Vec3, channels: int) -> None:
        tried.append(shape)
        if shape[2] > most:
            raise DeviceMemoryError(f"{shape} does not fit")

    monkeypatch.setattr(RollingPredictor, "try_memory", try_memory)
    info = VolumeInfo((1, 1, 2000, 2000), np.dtype(np.uint8), (1, 512, 512))
    if most == 10:
        with pytest.raises(DeviceMemoryError, match="does not fit"):
            plan_within_device(engine, [engine.segmenter], info)
        return
    plan, _ = plan_within_device(engine, [engine.segmenter, engine.segmenter], info)
    assert tried[-2:] == [plan.block_shape] * 2
    assert plan.block_shape[2] == {4096: 2048, 1100: 1024}[most]
    assert (len(tried) == 2) == (most == 4096)


def test_on_the_host_nothing_is_rehearsed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RollingPredictor, "try_memory", None)
    config = load_config(None, words(model))
    info = VolumeInfo((1, 1, 64, 64), np.dtype(np.uint8), (1, 64, 64))
    engine = build_engine(config)
    assert engine.memory.device_bytes is None
    plan, _ = plan_within_device(engine, [engine.segmenter], info)
    assert Box.of_shape(plan.block_shape).voxels >= 64 * 64
