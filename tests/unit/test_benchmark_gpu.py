"""The benchmark of GPUs says so where there is none; its measuring is run once, small and on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nnunet_models import make_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_exits_with_two_and_says_why(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--quick"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"PyTorch {torch.__version__} finds none" in shown.err and "Nothing was measured" in shown.err


def test_what_it_measures_is_what_it_says(gpu: ModuleType, tmp_path: Path) -> None:
    model = make_model(tmp_path, dimensions=2, patch=(16, 32), features=(4, 8), mirror_axes=(0, 1))
    network, patch = gpu.network_of(model)
    assert patch == (1, 16, 32)
    products = sum(
        2 * module.weight.numel() * (16 * 32 if module.weight.shape[0] == 4 else 8 * 16)
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d) and module.out_channels in (4, 8)
    )
    assert products < gpu.window_flops(model) < 2 * products  # and the transposed one, and the head
    found = gpu.slices_a_second(model, gpu.BackendRequest(24, "exact", True, 2), "cpu", slices=3, rounds=1)
    assert found["windows_a_second"] == pytest.approx(found["slices_a_second"] * 2 * 1 * 4)  # two windows along y
    assert (found["class"]["batch"], found["memory_gb"], found["notes"]) == (2, None, [])
    by_way = gpu.ways(model, "cpu", 2, 1)
    assert list(by_way) == ["autocast", "channels first, kernel by kernel", "channels last, kernel by kernel"]
    assert gpu.peak_flops(torch.device("cpu"), "exact", 64) > 0


def test_processes_begin_when_all_are_ready_and_their_rates_add_up(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of two lines, each of which says when it was told to begin."""
    stand_in = tmp_path / "worker.py"
    stand_in.write_text(
        "import sys, time\n"
        f"ready = open({str(tmp_path / 'order')!r}, 'a')\n"
        "time.sleep(0.2 * ('cuda:1' in sys.argv))\n"
        "ready.write('ready '); ready.flush()\n"
        "print('ready', flush=True); assert sys.stdin.readline() == 'go\\n'\n"
        "ready.write('go '); ready.flush()\n"
        "print(2.5)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(stand_in))
    words = Namespace(batch=[4], rounds=1, slices=1)
    assert gpu.scaling(tmp_path, ["cuda:0", "cuda:1", "cuda:2"], words) == {1: 2.5, 2: 5.0, 3: 7.5}
    assert (tmp_path / "order").read_text().split() == ["ready", "go"] + ["ready"] * 2 + ["go"] * 2 + ["ready"] * 3 + [
        "go"
    ] * 3
