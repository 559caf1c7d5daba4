"""OpenVINO on the CPU: float32, or bfloat16 where the processor has it. Needs the extra ``openvino``.

The network is traced with its one input shape and converted within this process; what was compiled is kept in
``Artefacts``. Made by ``choice``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from connectomics.core.errors import DeviceError
from connectomics.core.installation import install_command
from connectomics.models.backends.artefacts import Artefacts, MappedArtefact
from connectomics.models.backends.contract import (
    BackendRequest,
    MadeBackend,
    ModelNetworks,
    NumericClass,
    closed,
    whole_batch,
)
from connectomics.models.backends.device import capability, select_device

CPU = torch.device("cpu")
HINTS = {torch.float32: ("f32", "ACCURACY"), torch.bfloat16: ("bf16", "PERFORMANCE")}
TELEMETRY = "openvino_telemetry"
FAILURES = (  # OpenVINO's own errors, which have no common base
    "GeneralFailure",
    "InitializationFailure",
    "NotImplementedFailure",
    "OpConversionFailure",
    "OpValidationFailure",
)


class OpenVinoBackend:
    """Runs a network compiled by OpenVINO for one shape, on a fixed number of threads.

    The network is asked for only where nothing compiled is kept, and let go before and after. With ``low_memory`` the
    memory of a forward pass is given back after it, for some percent of its time.
    """

    reference: ClassVar[str] = "openvino"
    note: ClassVar[str] = ""
    device: ClassVar[torch.device] = CPU

    def __init__(self, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> None:
        if select_device(request.device).type != "cpu":
            raise DeviceError(
                f"backend 'openvino' runs on the CPU, but the device is '{request.device}'; use backend torch"
            )
        openvino, precision, threads = load_openvino(), request.precision, request.threads
        if precision.dtype(CPU) not in HINTS:
            raise DeviceError(f"backend 'openvino' has no {precision.name} precision; set system.backend=torch")
        core, (hint, mode) = openvino.Core(), HINTS[precision.dtype(CPU)]
        options: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": hint,
            "EXECUTION_MODE_HINT": mode,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # processes that share a machine would be pinned to the same cores
        }
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if hint == "bf16" and "BF16" not in capabilities:
            raise DeviceError(
                f"OpenVINO's {precision.name} precision is bfloat16, which this processor lacks; "
                "set inference.precision=exact"
            )
        self._shape, self._low_memory = networks.shape(request.batch), request.low_memory
        facts: dict[str, object] = {
            "openvino": openvino.__version__,
            "torch": torch.__version__,
            "processor": [core.get_property("CPU", "FULL_DEVICE_NAME"), sorted(capabilities), capability(CPU)],
            "model": f"{networks.sha256} {fold}",
            "shape": list(self._shape),
            "precision": precision.name,
            "threads": threads,
        }
        networks.let_go()
        network = partial(networks.modules.__getitem__, fold)
        self._model, self._kept = _compiled(core, network, self._shape, options, facts=facts, artefacts=artefacts)
        networks.let_go()
        self._infer: Callable[..., Any] = self._model.create_infer_request().infer
        name, half = f"openvino {openvino.__version__.partition('-')[0]}", " BF16" * ("BF16" in capabilities)
        self.numeric_class = NumericClass(name, precision.name, request.batch, threads, device=capability(CPU) + half)

    @classmethod
    def make(cls, networks: ModelNetworks, fold: int, request: BackendRequest, artefacts: Artefacts) -> MadeBackend:
        """See ``BackendKind``."""
        return cls(networks, fold, request, artefacts)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """See ``Backend``."""
        whole = whole_batch(batch, self._shape, CPU)
        found = self._infer([whole.contiguous().numpy()], share_inputs=True)
        if self._low_memory:
            self._model.release_memory()
        return torch.from_numpy(found[0][: batch.shape[0]])

    def close(self) -> None:
        """See ``Backend``."""
        self._infer = closed
        self._model = self._kept = None


def load_openvino() -> Any:
    """The library without its telemetry, which would send events unasked; a DeviceError if it does not load."""
    absent = TELEMETRY not in sys.modules
    if absent:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # an import of it fails, and OpenVINO goes on without
    try:
        openvino = importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"backend 'openvino' is not available: OpenVINO does not load ({reason}); "
            f"{install_command('openvino')}, or set system.backend=torch"
        ) from error
    finally:
        if absent:
            del sys.modules[TELEMETRY]
    return openvino


def _compiled(
    core: Any,
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    options: dict[str, object],
    facts: dict[str, object],
    artefacts: Artefacts,
) -> tuple[Any, MappedArtefact | None]:
    """The network for the CPU: as it was kept, else converted and kept; and the file it may look into."""
    kept = artefacts.get(facts)
    if kept is not None:
        with contextlib.suppress(RuntimeError):  # of another build after all: it is compiled again
            return _loaded(core, kept, options), kept
    front = importlib.import_module("openvino.frontend")
    refusals = (RuntimeError, TypeError, ValueError, *(vars(front)[name] for name in FAILURES))
    try:
        compiled = core.compile_model(_converted(front, network(), shape), "CPU", options)
    except refusals as error:
        reason = " ".join(str(error).split())[:300]
        raise DeviceError(
            f"backend 'openvino' cannot run this network ({type(error).__name__}: {reason}); set system.backend=torch"
        ) from error
    artefacts.put(facts, compiled.export_model().getvalue())
    kept = artefacts.get(facts)
    return (compiled if kept is None else _loaded(core, kept, options)), kept  # which takes half of the memory


def _loaded(core: Any, kept: MappedArtefact, options: dict[str, object]) -> Any:
    """What was kept, laid out anew for this processor; the weights as they were need no memory afterwards."""
    content = importlib.import_module("openvino").Tensor(np.frombuffer(kept.content, np.uint8), shared_memory=True)
    model = core.import_model(content, "CPU", options)
    kept.give_back()
    return model


def _converted(front: Any, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """OpenVINO's model of the network, by its front end: its ``convert_model`` would change the root logger."""
    decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    example = torch.zeros(shape)
    with _quietly(), torch.no_grad():
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
            network.to(CPU).eval(), example, check_trace=False
        )
        frontend = front.FrontEndManager().load_by_framework("pytorch")
        decoder = decoders.TorchScriptPythonDecoder(traced, example_input=example)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape({model.input(0): list(shape)})
    return model


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Tracing warns of what it always does: one shape, and that PyTorch would rather export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
