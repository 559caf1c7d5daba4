"""Choosing a backend: the one that is named or its reason, auto's next, and one kind for all networks of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from torch import nn

from connectomics.config.load import load_config
from connectomics.core.errors import ConfigError, DeviceError
from connectomics.core.features import BACKENDS, PRECISIONS
from connectomics.models.backends import torch_eager
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import choose
from connectomics.models.backends.contract import BackendRequest, ModelNetworks
from connectomics.models.backends.cuda import CudaBackend
from connectomics.models.backends.precisions import EXACT, FAST, default_precision

TERMS = BackendRequest("cpu", EXACT, 1, 1)
NONE = Artefacts(None)


class Bessel(nn.Module):
    """What OpenVINO has no operation for."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(batch)


def networks(*modules: nn.Module) -> ModelNetworks:
    return ModelNetworks(modules, "0" * 64, 1, (2, 4, 4))


def kinds(name: str, *models: ModelNetworks, terms: BackendRequest = TERMS) -> tuple[list[list[str]], tuple[str, ...]]:
    chosen = choose(name, terms, models, NONE)
    return [[b.numeric_class.backend.split()[0] for b in row] for row in chosen.backends], chosen.notes


def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)


def test_the_configuration_knows_the_same_names() -> None:
    for key, names in (("system.backend", ("auto", *BACKENDS.names())), ("inference.precision", PRECISIONS.names())):
        for name in names:
            load_config(None, [f"{key}={name}"])
        with pytest.raises(ConfigError, match=f"must be one of {', '.join(names)}"):
            load_config(None, [f"{key}=other"])


def test_the_named_backend_runs_every_network() -> None:
    pair, single = networks(nn.Identity(), nn.ReLU()), networks(nn.Identity())
    assert kinds("torch", pair, single) == ([["torch", "torch"], ["torch"]], ())


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'tensorrt' is not a backend; use auto, torch, compile, openvino"):
        choose("tensorrt", TERMS, [networks(nn.Identity())], NONE)


def test_auto_takes_openvino_first_on_the_cpu() -> None:
    pytest.importorskip("openvino")
    assert kinds("auto", networks(nn.ReLU()), networks(nn.ReLU())) == ([["openvino"], ["openvino"]], ())


def test_auto_goes_on_without_openvino_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_openvino(monkeypatch)
    found, (note,) = kinds("auto", networks(nn.ReLU()))
    assert found == [["torch"]]
    assert "openvino was not taken" in note and "pip install -e '.[openvino]' -c constraints.txt" in note
    assert note in caplog.text
    with pytest.raises(DeviceError, match=r"backend 'openvino' is not available: .*-e .\.\[openvino\]"):
        kinds("openvino", networks(nn.ReLU()))


def test_one_network_that_openvino_cannot_run_turns_all_to_the_next() -> None:
    pytest.importorskip("openvino")
    found, (note,) = kinds("auto", networks(nn.ReLU()), networks(nn.ReLU(), Bessel()))
    assert found == [["torch"], ["torch", "torch"]]
    assert "cannot run this network" in note and "bessel_j0" in note
    with pytest.raises(DeviceError, match=r"cannot run this network.*set system.backend=torch"):
        kinds("openvino", networks(Bessel()))


def test_a_processor_without_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("openvino")
    asked = library.Core.get_property

    def less(self: Any, device: str, name: str) -> Any:
        found = asked(self, device, name)
        return [c for c in found if c != "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else found

    monkeypatch.setattr(library.Core, "get_property", less)
    with pytest.raises(DeviceError, match=r"which this processor lacks; set inference.precision=exact"):
        kinds("openvino", networks(nn.ReLU()), terms=BackendRequest("cpu", FAST, 1, 1))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match=r"backend 'compile' is not available: it needs a C\+\+ compiler"):
        kinds("compile", networks(nn.ReLU()))


def test_openvino_sends_nothing_anywhere(tmp_path: Path) -> None:
    """Its telemetry package reports each import and conversion unless it is kept out."""
    pytest.importorskip("openvino_telemetry")
    code = (
        "import logging, sys\n"
        "from connectomics.models.backends.openvino import load_openvino\n"
        "level = logging.getLogger().level\n"
        "load_openvino()\n"
        "assert 'openvino.tools.ovc.telemetry_stub' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        "import openvino_telemetry  # others may use it as before\n"
        "assert logging.getLogger().level == level\n"
    )
    with ForkServer(tmp_path) as server:
        ended = server.run_code(code)
    assert ended.code == 0, ended.stderr


def test_mps_has_no_fast_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(DeviceError, match="device 'mps' has no fast precision"):
        kinds("torch", networks(nn.Identity()), terms=BackendRequest("mps", FAST, 1, 1))


def test_openvino_is_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="backend 'openvino' runs on the CPU, but the device is 'cuda'"):
        kinds("openvino", networks(nn.Identity()), terms=BackendRequest("cuda", FAST, 1, 1))
    assert default_precision("auto") is FAST
    assert default_precision("cpu") is EXACT


def test_on_cuda_fast_is_recorded_and_exact_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Recording(CudaBackend):
        def __init__(self, network: nn.Module, **options: Any) -> None:
            made.append(options)
            super().__init__(network, **options | {"device": "cpu", "recorder": refuse})

    def refuse(run: Any) -> Any:
        raise RuntimeError("no graph here")

    monkeypatch.setattr(torch_eager, "CudaBackend", Recording)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found, notes = kinds("auto", networks(nn.ReLU(), nn.ReLU()), terms=BackendRequest("cuda:1", FAST, 3, 2))
    assert found == [["torch", "torch"]]
    assert notes == ("passes are not recorded as a graph: no graph here",)
    assert made == [{"device": "cuda:1", "shape": (3, 1, 2, 4, 4), "threads": 2, "precision": FAST}] * 2
