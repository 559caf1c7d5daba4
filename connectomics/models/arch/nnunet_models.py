"""Networks by name: the architecture registry and nnU-Net's networks behind one five-axis forward.

Called by ``checkpoint``. Class names that a plans file carries are looked up in a list here, never imported.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from torch import nn

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.core.features import ARCHITECTURES
from connectomics.core.geometry import Vec3
from connectomics.models.arch.trainers import own_network_trainer
from connectomics.models.nnunet_releases import current_class

_NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (PlainConvUNet, ResidualEncoderUNet)}
_CLASSES: dict[str, tuple[type, ...]] = {
    "conv_op": (nn.Conv2d, nn.Conv3d),
    "norm_op": (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm2d, nn.BatchNorm3d),
    "dropout_op": (nn.Dropout, nn.Dropout2d, nn.Dropout3d),
    "nonlin": (nn.LeakyReLU, nn.ReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    "block": (BasicBlockD, BottleneckD),
}
_LARGEST = {
    "n_stages": 12,
    "features_per_stage": 8192,
    "stem_channels": 8192,
    "bottleneck_channels": 8192,
    "n_conv_per_stage": 64,
    "n_blocks_per_stage": 64,
    "n_conv_per_stage_decoder": 64,
    "kernel_sizes": 31,
    "strides": 16,
}

_MISFIT = (TypeError, ValueError, AssertionError, LookupError, RuntimeError, AttributeError, ImportError)
_RESTORE = "restore the plans file that nnU-Net wrote for this model"


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """What a network is built from, as the plans and the checkpoint state it.

    Parameters
    ----------
    network_class
        Dotted name of the network's class in the plans.
    arguments
        ``arch_kwargs`` of the plans, classes still as dotted names.
    imports
        ``_kw_requires_import``: the arguments whose value is such a name.
    patch_shape
        Network input (z, y, x) in voxels.
    plans, configuration
        The whole plans and the resolved configuration, for trainers that build their own network.
    where, checkpoint
        The plans file and the checkpoint, for messages.
    trust_code
        Whether names outside of the allow-list may be imported and called.
    """

    trainer_name: str
    dimensions: int
    channels: int
    classes: int
    network_class: str
    arguments: Mapping[str, Any]
    imports: tuple[str, ...]
    patch_shape: Vec3
    plans: Mapping[str, Any]
    configuration: Mapping[str, Any]
    where: str
    checkpoint: str
    trust_code: bool


class NNUNetModel(nn.Module):
    """A nnU-Net network that takes and gives five axes [n, c, z, y, x], whatever its dimensions.

    Parameters
    ----------
    network
        nnU-Net's network, whose state dict is the checkpoint's.
    dimensions
        2 or 3; with 2 the depth of the input must be 1.
    """

    def __init__(self, network: nn.Module, dimensions: int) -> None:
        super().__init__()
        self.network = network
        self.dimensions = dimensions

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits [n, k, z, y, x] of windows [n, c, z, y, x]."""
        logits: torch.Tensor
        if self.dimensions == 3:
            logits = self.network(batch)
        else:
            logits = self.network(batch.squeeze(2)).unsqueeze(2)
        return logits


Architecture = Callable[[NetworkPlan], NNUNetModel]
_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(name: str) -> Callable[[Architecture], Architecture]:
    """Decorate a function that builds a network, so that ``model.architecture=name`` finds it in this process.

    Installed packages name theirs as entry points ``connectomics.architectures`` instead.

    Raises
    ------
    ValueError
        If the name is taken.
    """

    def register(builder: Architecture) -> Architecture:
        if name in _ARCHITECTURES or name in ARCHITECTURES:
            raise ValueError(f"architecture '{name}' is already registered")
        _ARCHITECTURES[name] = builder
        return builder

    return register


def build_architecture(name: str, plan: NetworkPlan) -> NNUNetModel:
    """The network of a plan, weights unset; on the meta device where nothing is computed while building it.

    Raises
    ------
    ModelError
        If the architecture is unknown or the plan is impossible.
    UnsafeModelError
        If the plan names classes outside of the allow-list.
    """
    if name not in _ARCHITECTURES and name not in ARCHITECTURES:
        known = sorted({*_ARCHITECTURES, *ARCHITECTURES.names()})
        raise ModelError(f"unknown architecture '{name}'; known: {', '.join(known)}")
    builder: Architecture = _ARCHITECTURES[name] if name in _ARCHITECTURES else ARCHITECTURES.load(name)
    return builder(plan)


def build_nnunet(plan: NetworkPlan) -> NNUNetModel:
    """The network that nnU-Net's trainer builds from the plans, without deep supervision."""
    network_class = _network_class(plan)
    arguments = _classes_resolved(plan)
    if network_class in _NETWORKS.values():
        _check_arguments(plan, network_class, arguments)
    trainer = own_network_trainer(plan.trainer_name, where=plan.checkpoint, trust_code=plan.trust_code)
    try:
        if trainer is not None:
            return NNUNetModel(_built_by(trainer, plan), plan.dimensions)
        # a stock network computes nothing while it is built; another may, which needs real memory
        with torch.device("meta" if network_class in _NETWORKS.values() else "cpu"):
            network = network_class(
                input_channels=plan.channels, num_classes=plan.classes, **{**arguments, "deep_supervision": False}
            )
    except _MISFIT as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{plan.where}: the network {plan.network_class} cannot be built from its arch_kwargs "
            f"({reason}); {_RESTORE}"
        ) from error
    return NNUNetModel(network, plan.dimensions)


def _built_by(trainer: Any, plan: NetworkPlan) -> nn.Module:
    """Let a trainer class build its network, in the signature of nnunetv2 2.8 or the one before."""
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    configuration = ConfigurationManager(copy.deepcopy(dict(plan.configuration)))
    build = trainer.build_network_architecture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "plans_manager" in inspect.signature(build).parameters:
            first: tuple[Any, ...] = (PlansManager(copy.deepcopy(dict(plan.plans))), configuration)
        else:
            first = (
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
            )
        network: nn.Module = build(*first, plan.channels, plan.classes, enable_deep_supervision=False)
    return network


def _network_class(plan: NetworkPlan) -> Any:
    known = {f"{kind.__module__}.{kind.__name__}": kind for kind in _NETWORKS.values()}
    name = current_class(plan.network_class)
    return known[name] if name in known else _trusted(plan.network_class, "network_class_name", plan)


def _classes_resolved(plan: NetworkPlan) -> dict[str, Any]:
    """``arch_kwargs`` with dotted names replaced by classes."""
    arguments = dict(plan.arguments)
    for key in plan.imports:
        if not isinstance(key, str) or key not in arguments:
            raise ModelError(
                f"{plan.where}: _kw_requires_import names '{key!s:.80}', which is not in arch_kwargs; {_RESTORE}"
            )
        if arguments[key] is None:
            continue
        name = str(arguments[key])
        allowed = {spelling: kind for kind in _CLASSES.get(key, ()) for spelling in _spellings(kind)}
        arguments[key] = allowed[name] if name in allowed else _trusted(name, key, plan)
    return arguments


def _spellings(kind: type) -> tuple[str, str]:
    return f"{kind.__module__}.{kind.__name__}", f"torch.nn.{kind.__name__}"


def _trusted(name: str, key: str, plan: NetworkPlan) -> Any:
    """Import a class outside of the allow-list if the user said so."""
    if not plan.trust_code:
        raise UnsafeModelError(
            f"{plan.where}: '{key!s:.80}' names '{name!s:.120}', which is not among the networks and layers nnU-Net's "
            "plans use; nothing of it was run; if you trust where the file comes from, set "
            "model.trust_code=true"
        )
    module, _, attribute = name.rpartition(".")
    try:
        return operator.attrgetter(attribute)(_module_or_class(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{plan.where}: '{key}' names '{name!s:.120}', which cannot be imported ({error}); install the package "
            "it is in"
        ) from error


def _module_or_class(name: str) -> Any:
    """What a dotted name stands for: a module, or a class within one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        outer, _, inner = name.rpartition(".")
        if not outer:
            raise
        return operator.attrgetter(inner)(_module_or_class(outer))


def _check_arguments(plan: NetworkPlan, network_class: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the class does not have, that are absurdly large, or do not fit the patch."""
    known = set(inspect.signature(network_class).parameters) - {"input_channels", "num_classes"}
    for key, value in arguments.items():
        if key not in known:
            raise ModelError(
                f"{plan.where}: arch_kwargs has '{key}', which {network_class.__name__} does not take; check "
                "the plans file and the installed version of dynamic_network_architectures"
            )
        if key in _CLASSES and not plan.trust_code and isinstance(value, str):
            raise ModelError(
                f"{plan.where}: '{key}' is the name '{value}' but not listed in _kw_requires_import; {_RESTORE}"
            )
        if key in _CLASSES and isinstance(value, type) and value.__name__.endswith(f"{5 - plan.dimensions}d"):
            raise ModelError(
                f"{plan.where}: '{key}' is {value.__name__}, but the patch has {plan.dimensions} axes; {_RESTORE}"
            )
        if key in _LARGEST and value is not None:
            for number in _flat(value):
                if not isinstance(number, int) or not 1 <= number <= _LARGEST[key]:
                    raise ModelError(
                        f"{plan.where}: '{key}' holds {number!r:.80}, expected whole numbers from 1 to "
                        f"{_LARGEST[key]}; {_RESTORE}"
                    )
    _check_strides(plan, arguments)


def _check_strides(plan: NetworkPlan, arguments: Mapping[str, Any]) -> None:
    strides = arguments.get("strides")
    if not isinstance(strides, list):
        return
    steps = [[stride] * plan.dimensions if isinstance(stride, int) else stride for stride in strides]
    if any(len(step) != plan.dimensions or any(isinstance(s, list) for s in step) for step in steps):
        raise ModelError(
            f"{plan.where}: 'strides' is {strides!r:.80}, expected {plan.dimensions} numbers a stage; {_RESTORE}"
        )
    for axis in range(plan.dimensions):
        total = math.prod(step[axis] for step in steps)
        if plan.patch_shape[3 - plan.dimensions + axis] % total:
            raise ModelError(
                f"{plan.where}: the patch {plan.patch_shape} (z, y, x) does not divide by the network's "
                f"total stride {total} along axis {'zyx'[3 - plan.dimensions + axis]}; {_RESTORE}"
            )


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]
