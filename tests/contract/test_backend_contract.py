"""One contract for every backend, and what is particular to each."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from connectomics.core.errors import ConfigError, DeviceError
from connectomics.models.backends import openvino as openvino_backend
from connectomics.models.backends.cached import CachedBackend
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.cuda import CudaBackend, CudaGraphs, Recorded, in_half
from connectomics.models.backends.device import capability, select_device
from connectomics.models.backends.openvino import OpenVinoBackend
from connectomics.models.backends.precisions import EXACT, FAST
from connectomics.models.backends.torch_compile import CompiledBackend
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.testing.backend import CHANNELS, PATCH, BackendContract, small_backend, small_network, windows

from processor import require_bfloat16

CPU = torch.device("cpu")


class TestTorchOnCpu(BackendContract):
    name = "torch"
    kind = TorchBackend

    def test_the_numeric_class_names_the_processor(self, backend: Backend) -> None:
        numeric = backend.numeric_class
        assert (numeric.backend, numeric.precision, numeric.threads) == ("torch", "exact", 1)
        assert numeric.device == f"cpu {torch.backends.cpu.get_cpu_capability()}"


class TestTorchFastOnCpu(BackendContract):
    name = "torch"
    kind = TorchBackend
    precision = FAST
    tolerance = 3e-2

    def test_it_computes_in_bfloat16(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = small_network().eval()(batch)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(backend.forward(batch), expected.float())


class TestOpenVino(BackendContract):
    name = "openvino"
    kind = OpenVinoBackend
    tolerance = 5e-6

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("openvino")

    def test_the_numeric_class_names_version_and_threads(self, backend: Backend) -> None:
        numeric = backend.numeric_class
        version = pytest.importorskip("openvino").__version__.partition("-")[0]
        assert (numeric.backend, numeric.threads) == (f"openvino {version}", 1)

    def test_what_was_compiled_gives_the_same_bytes_when_it_is_taken_from_the_cache(
        self, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = windows(4, backend.device)
        expected = small_backend(OpenVinoBackend, tmp_path).forward(batch)
        (kept,) = tmp_path.glob("*.compiled")
        with monkeypatch.context() as patch:
            patch.setattr(openvino_backend, "_converted", None)
            again = small_backend(OpenVinoBackend, tmp_path)
        assert torch.equal(again.forward(batch), expected)
        kept.write_bytes(kept.read_bytes()[:-7])
        mended = small_backend(OpenVinoBackend, tmp_path)
        assert torch.equal(mended.forward(batch), expected)

    def test_another_patch_is_refused(self, backend: Backend) -> None:
        with pytest.raises(ValueError, match="made for batches of"):
            backend.forward(torch.zeros(4, CHANNELS, 4, 8, 16))


class TestOpenVinoFast(BackendContract):
    name = "openvino"
    kind = OpenVinoBackend
    precision = FAST
    tolerance = 3e-2

    @pytest.fixture(autouse=True)
    def suited(self) -> None:
        require_bfloat16()


class TestRemembering(BackendContract):
    name = "torch"

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        made = CachedBackend(TorchBackend(small_network(), device="cpu", batch=4, threads=1))
        yield made
        made.close()


@pytest.mark.long  # generating and compiling C++ takes a quarter of a minute
class TestCompiledOnCpu(BackendContract):
    name = "compile"
    kind = CompiledBackend
    tolerance = 5e-6

    @pytest.fixture(autouse=True)
    def possible(self) -> None:
        if shutil.which("g++") is None:
            pytest.skip("there is no C++ compiler")


def replayed(run: Callable[[], torch.Tensor]) -> Recorded:
    """What a CUDA graph does: the same pass again, into the same memory, whatever anybody has left there."""
    output = run().clone()
    return Recorded(lambda: output.copy_(run()), output)


def unrecordable(run: Callable[[], torch.Tensor]) -> Recorded:
    raise RuntimeError("operation not permitted when stream is capturing")


def cuda_path(recorder: Callable[[Callable[[], torch.Tensor]], Recorded] | None, device: str = "cpu") -> CudaBackend:
    shape = (4, CHANNELS, *PATCH)
    return CudaBackend(small_network(), device=device, shape=shape, threads=1, recorder=recorder)


class TestCudaPathOnCpu(BackendContract):
    """All of the path but the GPU: weights in half precision, the fixed input, replays into the same memory."""

    name = "torch"
    precision = FAST
    tolerance = 3e-2

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        made = cuda_path(replayed)
        yield made
        made.close()

    def test_logits_outlive_the_next_pass(self, backend: Backend) -> None:
        batch = windows(4, backend.device)
        first = backend.forward(batch)
        kept = first.clone()
        backend.forward(batch * 2)
        assert torch.equal(first, kept)

    def test_another_patch_is_refused(self, backend: Backend) -> None:
        with pytest.raises(ValueError, match="made for batches of"):
            backend.forward(torch.zeros(4, CHANNELS, 4, 8, 16))

    def test_its_bytes_are_those_of_plain_autocast(self, backend: Backend) -> None:
        plain = TorchBackend(small_network(), device="cpu", batch=4, threads=1, precision=FAST)
        batch = windows(4, backend.device)
        assert torch.equal(backend.forward(batch), plain.forward(batch))
        assert backend.numeric_class.backend == "torch channels_last"


class TestCudaPathUnrecorded(BackendContract):
    """Where passes cannot be recorded they are run, and the reason is kept."""

    name = "torch"
    precision = FAST
    tolerance = 3e-2

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        made = cuda_path(unrecordable)
        yield made
        made.close()

    def test_the_class_is_the_same_and_the_reason_is_kept(self, backend: Backend) -> None:
        recorded = cuda_path(replayed)
        assert isinstance(backend, CudaBackend)
        assert "not permitted when stream is capturing" in backend.note and recorded.note == ""
        assert backend.numeric_class == recorded.numeric_class
        assert torch.equal(backend.forward(windows(3, CPU)), recorded.forward(windows(3, CPU)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
class TestTorchOnCuda(BackendContract):
    name = "torch"
    kind = TorchBackend
    precision = FAST
    device = "cuda"
    tolerance = 2e-2  # autocast, as nnU-Net runs it

    def test_passes_are_recorded(self, backend: Backend) -> None:
        assert isinstance(backend, CudaBackend) and backend.note == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
class TestTorchExactOnCuda(BackendContract):
    name = "torch"
    kind = TorchBackend
    device = "cuda"
    tolerance = 1e-5


def test_a_device_whose_memory_is_full_is_no_reason_to_go_on_unrecorded() -> None:
    def full(run: Callable[[], torch.Tensor]) -> Recorded:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda_path(full)


@pytest.mark.parametrize("recorder", [replayed, unrecordable])
def test_logits_that_are_float32_already_are_copied_too(
    recorder: Callable[[Callable[[], torch.Tensor]], Recorded],
) -> None:
    backend = CudaBackend(nn.Identity(), device="cpu", shape=(1, 1, 1, 2, 2), threads=1, recorder=recorder)
    first = backend.forward(torch.ones(1, 1, 1, 2, 2))
    backend.forward(torch.zeros(1, 1, 1, 2, 2))
    assert torch.equal(first, torch.ones(1, 1, 1, 2, 2))


class Watched(nn.Module):
    """Notes where in memory its input lies."""

    places: ClassVar[set[int]] = set()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.places.add(batch.data_ptr())
        return batch


def test_each_pass_reads_the_memory_that_was_recorded() -> None:
    """A graph knows its input by its place alone."""
    Watched.places.clear()
    backend = CudaBackend(Watched(), device="cpu", shape=(2, 1, 1, 2, 2), threads=1, recorder=replayed)
    given = [torch.full((rows, 1, 1, 2, 2), float(rows)) for rows in (1, 2)]
    assert all(torch.equal(backend.forward(batch), batch) for batch in given)
    assert len(Watched.places) == 1


def test_graphs_need_cuda() -> None:
    with pytest.raises(DeviceError, match="need a CUDA device, and 'cpu' is none"):
        cuda_path(None)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_change_no_bit_of_autocast(flat: bool, dtype: torch.dtype) -> None:
    """nnunetv2's own kind of network under PyTorch's autocast, with its weights as they are and converted once."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet").PlainConvUNet
    convolution, norm = (nn.Conv2d, nn.InstanceNorm2d) if flat else (nn.Conv3d, nn.InstanceNorm3d)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = unet(
            1, 2, [4, 8], convolution, 3, [1, 2], 1, 3, 1, True, norm, {"affine": True}, nonlin=nn.LeakyReLU
        ).eval()  # fmt: skip
    network.decoder.deep_supervision = False
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batch = torch.randn(2, 1, *([16, 16] if flat else [8, 8, 8]), generator=torch.Generator().manual_seed(1))
    halved = in_half(network, dtype, channels_last=False)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(halved(batch), network(batch))
        found, expected = in_half(network, dtype)(batch), network(batch)
    assert float((found - expected).abs().max()) < 0.05  # another order of the channels sums in another order
    assert {value.dtype for value in halved.state_dict().values()} == {dtype, torch.float32}
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    last = torch.channels_last if flat else torch.channels_last_3d
    weights = [m.weight for m in in_half(network, dtype).modules() if isinstance(m, convolution)]
    assert weights and all(weight.is_contiguous(memory_format=last) for weight in weights)


def test_a_graph_is_recorded_after_warming_up_and_beside_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's calls, replaced by what notes them; a GPU was not there to run them."""
    calls: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            calls.append(f"enter {self.name}")

        def __exit__(self, *error: object) -> None:
            calls.append(f"leave {self.name}")

        def wait_stream(self, other: Noted) -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def replay(self) -> None:
            calls.append("replay")

    def graph(made: Noted, *, pool: object, capture_error_mode: str) -> Noted:
        assert (pool, capture_error_mode) == ("shared", "thread_local")
        return made

    current = Noted("current")
    for name, value in {
        "device": lambda device: Noted("device"),
        "Stream": lambda device: Noted("side"),
        "stream": lambda stream: stream,
        "current_stream": lambda device: current,
        "synchronize": lambda device: calls.append("synchronize"),
        "CUDAGraph": lambda: Noted("graph"),
        "graph": graph,
        "graph_pool_handle": lambda: "shared",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    output = torch.zeros(1)
    recorded = CudaGraphs(torch.device("cuda", 63))(lambda: calls.append("pass") or output)
    recorded.replay()
    assert recorded.output is output
    warm = ["enter side", "pass", "pass", "pass", "leave side"]
    around = ["enter device", "side waits for current", *warm, "current waits for side", "synchronize"]
    assert calls == [*around, "enter graph", "pass", "leave graph", "leave device", "replay"]


def test_on_cuda_nnunets_autocast_runs_with_repeatable_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "autocast", lambda kind: asked.append(kind) or contextlib.nullcontext())
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    products.allow_tf32 = True
    try:
        for precision in (FAST, EXACT):
            with precision.arithmetic(torch.device("cuda")):
                assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
                assert not cudnn.allow_tf32 and not products.allow_tf32
            assert cudnn.benchmark and products.allow_tf32
    finally:
        products.allow_tf32 = False
    assert asked == ["cuda"]


def test_a_gpu_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert capability(torch.device("cuda", 0)) == "cuda 9.0 NVIDIA H200"
    assert capability(torch.device("mps", 0)) == "mps"


def test_threads_are_pinned_for_each_batch() -> None:
    class Network(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch * torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        backend = TorchBackend(Network(), device="cpu", batch=1, threads=2)
        torch.set_num_threads(3)
        assert backend.forward(torch.ones(1, 1, 1, 1, 1)).item() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"batch": 0, "threads": 1}, {"batch": 1, "threads": 0}])
def test_impossible_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TorchBackend(nn.Identity(), device="cpu", **options)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:a", "cuda:-1", "CPU", "cpu:0"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda, cuda:N or mps"):
        select_device(name)


@pytest.fixture
def two_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two_cuda_devices")
@pytest.mark.parametrize(
    ("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_devices_where_there_are_two(name: str, expected: str) -> None:
    assert select_device(name) == torch.device(expected)


@pytest.mark.usefixtures("two_cuda_devices")
def test_a_third_device_of_two_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2' is not available.*finds 2 CUDA devices"):
        select_device("cuda:2")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_an_absent_accelerator_is_an_error_and_never_the_cpu(name: str) -> None:
    with pytest.raises(DeviceError, match=f"'{name}' is not available"):
        TorchBackend(nn.Identity(), device=name, batch=1, threads=1)


@pytest.mark.usefixtures("no_accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert select_device("auto") == torch.device("cpu")


def test_an_apple_gpu_is_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("mps") == torch.device("mps", 0)
