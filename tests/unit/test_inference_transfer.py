"""Windows and logits arrive whole however a device orders its work: a device that does it as late as it may."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.core.errors import DeviceMemoryError, ModelError
from connectomics.core.geometry import Box
from connectomics.inference import transfer
from connectomics.inference.transfer import MAIN, SIDE, Buffered, CudaStreams, Direct, downloads, on_host, uploads_to
from connectomics.lightning.inference import InferenceManager

from nnunet_models import make_model
from small_jobs import em_like

CPU = torch.device("cpu")
HERE = Box((0, 0, 0), (1, 2, 3))


class Point:
    """A mark of ``Device``."""

    def __init__(self, device: Device) -> None:
        self.device, self.reached = device, False

    def wait(self) -> None:
        while not self.reached:
            self.device.step()

    def hold(self, queue: str) -> None:
        self.device.put(queue, None, self)


class Device:
    """Two queues whose work is done in an order drawn by chance, which their marks alone restrict."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.queues: dict[str, deque[tuple[Callable[[], object] | None, Point | None]]] = {MAIN: deque(), SIDE: deque()}

    def put(self, queue: str, work: Callable[[], object] | None, awaited: Point | None = None) -> None:
        self.queues[queue].append((work, awaited))

    def step(self) -> bool:
        """Do the next work of a queue that need not wait."""
        able = [q for q in self.queues.values() if q and (q[0][1] is None or q[0][1].reached)]
        if not able:
            assert not any(self.queues.values()), "the queues wait for each other"
            return False
        work, _ = self.chance.choice(able).popleft()
        if work is not None:
            work()
        return True

    def wander(self) -> None:
        for _ in range(self.chance.choice([0, 0, 1, 2, 20])):
            self.step()

    def pinned(self, values: int) -> torch.Tensor:
        return torch.full((values,), torch.nan)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.put(SIDE, lambda: target.copy_(source))

    def mark(self, queue: str) -> Point:
        point = Point(self)
        self.put(queue, lambda: setattr(point, "reached", True))
        return point


@pytest.mark.parametrize("seed", range(60))
def test_each_window_is_computed_with_in_whatever_order_a_device_works(seed: int) -> None:
    device = Device(seed)
    uploads, seen, given = Buffered(device, CPU), [], []
    for number in range(9):
        rows = 2 if number < 6 else device.chance.choice([1, 2, 3])  # at last fewer, and more than before
        given.append(np.full((rows, 1, 1, 2, 3), number + 1, np.float32))
        with uploads.batch(given[-1], given[-1].shape) as batch:
            device.wander()
            device.put(MAIN, lambda batch=batch: seen.append(batch.clone()))
            device.wander()
            device.put(MAIN, lambda batch=batch: seen.append(batch.clone()))  # its mirror image
        device.wander()
    while device.step():
        pass
    assert len(seen) == 2 * len(given)
    for first, second, expected in zip(seen[::2], seen[1::2], given, strict=True):
        assert np.array_equal(first.numpy(), expected) and np.array_equal(second.numpy(), expected)


def test_each_window_is_copied_before_the_next_is_taken() -> None:
    def passing() -> Iterator[np.ndarray]:
        window = np.empty((1, 1, 2, 3), np.float32)
        for number in range(3):
            window[...] = number
            yield window

    for uploads in (Direct(CPU), Buffered(Late(0), CPU)):
        with uploads.batch(passing(), (3, 1, 1, 2, 3)) as batch:
            assert batch[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match="shorter"), uploads.batch(passing(), (4, 1, 1, 2, 3)):
            raise AssertionError("a row would be empty")


@pytest.mark.parametrize("seed", range(60))
def test_logits_arrive_one_behind_and_stay_until_the_next_is_taken(seed: int) -> None:
    device = Device(seed)
    computed = []

    def finished() -> Iterator[tuple[Box, torch.Tensor]]:
        for number in range(7):
            values = torch.full((2, 1, 2, 3 + number % 3), torch.nan)
            device.put(MAIN, lambda values=values, number=number: values.fill_(number))
            computed.append(number)
            device.wander()
            yield HERE.shift((number, 0, 0)), values

    taken = 0
    for number, (box, values) in enumerate(downloads(finished(), device)):
        assert box == HERE.shift((number, 0, 0))
        assert computed[-1] == min(number + 1, 6)
        for _ in range(2):
            assert torch.equal(values, torch.full((2, 1, 2, 3 + number % 3), float(number)))
            device.wander()
        taken += 1
    assert taken == 7
    assert list(downloads(iter(()), device)) == []


class Late(Device):
    """The network computes at once, as the CPU does, and copies are made only when somebody waits for them."""

    def put(self, queue: str, work: Callable[[], object] | None, awaited: Point | None = None) -> None:
        if queue == SIDE:
            super().put(queue, work, awaited)
            return
        if awaited is not None:
            awaited.wait()
        if work is not None:
            work()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_predictor_gives_the_same_bytes_through_late_copies(
    dimensions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = (16, 24) if dimensions == 2 else (8, 16, 16)
    model = make_model(tmp_path, dimensions=dimensions, patch=patch, features=(4, 8), folds=("0", "1"))
    words = ["system.device=cpu", "system.num_cpus=1", "inference.sliding_window.sw_batch_size=3"]
    words.append("inference.output.save_probabilities=true")
    image = em_like((2, 40, 50) if dimensions == 2 else (10, 24, 32))
    expected = InferenceManager.from_checkpoint(model, words).predict(image)
    device = Late(0)
    monkeypatch.setattr(transfer, "streams_of", lambda where: device)
    found = InferenceManager.from_checkpoint(model, words).predict(image)
    assert np.array_equal(found.labels, expected.labels) and len(np.unique(found.labels)) > 1
    assert found.probabilities is not None and expected.probabilities is not None
    assert found.probabilities.tobytes() == expected.probabilities.tobytes()
    assert len(device.queues[SIDE]) <= 2  # marks of the last buffers


def test_the_cpu_copies_nothing() -> None:
    assert isinstance(uploads_to(CPU), Direct)
    values = torch.ones(2, 1, 2, 3)
    ((box, same),) = on_host([(HERE, values)])
    assert (box, same.data_ptr()) == (HERE, values.data_ptr())


def test_undefined_logits_and_exhausted_memory_are_named() -> None:
    with pytest.raises(ModelError, match=r"infinite or undefined logits in .*inference\.precision=exact"):
        list(on_host([(HERE, torch.tensor([[[[1.0, torch.inf, -torch.inf]]]]))]))

    def failing(error: Exception) -> Iterator[tuple[Box, torch.Tensor]]:
        yield HERE, torch.zeros(1, 1, 2, 3)
        raise error

    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(DeviceMemoryError, match=r"ran out amid a run.*Tried to allocate.*finished blocks are kept"):
        list(on_host(failing(out)))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(on_host(failing(RuntimeError("CUDA error: an illegal memory access"))))


def test_cuda_is_asked_for_what_the_seam_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own streams and events, replaced by what notes its calls; a GPU was not there to run them."""
    calls: list[tuple[object, ...]] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            calls.append(("hold", self.name, event.where))

    class Event:
        where: object = None

        def record(self, stream: Stream) -> None:
            self.where = stream.name
            calls.append(("record", stream.name))

        def synchronize(self) -> None:
            calls.append(("wait", self.where))

    class Entered:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            calls.append(("enter", self.stream.name))

        def __exit__(self, *error: object) -> None:
            calls.append(("leave", self.stream.name))

    empty = torch.empty
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(("current", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(("beside", device)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch, "empty", lambda n, *, dtype, pin_memory: asked.update(pin=pin_memory) or empty(n))
    gpu = torch.device("cuda", 1)
    streams, current, beside = CudaStreams(gpu), ("current", gpu), ("beside", gpu)
    target = streams.pinned(3)
    streams.mark(MAIN).hold(SIDE)
    streams.copy(target, torch.ones(3))
    copied = streams.mark(SIDE)
    copied.hold(MAIN)
    copied.wait()
    assert asked == {"pin": True} and torch.equal(target, torch.ones(3))
    assert calls == [
        ("record", current),
        ("hold", beside, current),
        ("enter", beside),
        ("leave", beside),
        ("record", beside),
        ("hold", current, beside),
        ("wait", beside),
    ]
