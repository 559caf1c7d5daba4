"""Loads nnU-Net v2 models: finds and checks their files, builds the networks, puts the weights in.

Called by the composition root, ``inspect`` and ``doctor``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import nn

from connectomics.core.errors import ModelError
from connectomics.core.fingerprint import key_of
from connectomics.core.places import local_path
from connectomics.models.arch.nnunet_models import NetworkPlan, NNUNetModel, build_architecture
from connectomics.models.archive import unpacked
from connectomics.models.contents import Fold, read_contents
from connectomics.models.converted import MANIFEST
from connectomics.models.locate import ModelRequest
from connectomics.models.plan_text import PlanText
from connectomics.models.plans import (
    axis_order,
    channel_names,
    check_supported,
    labels,
    normalisations,
    patch_and_spacing,
    previous_stage,
    resampling_rule,
    resolve_configuration,
    trained_on_sections,
)
from connectomics.models.spec import ModelSpec

_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class ModelReading:
    """A model whose weights fit the network but are not in it yet."""

    spec: ModelSpec
    skeleton: NNUNetModel
    members: list[Fold]
    plans: PlanText
    dataset: PlanText


class FoldNetworks(Sequence[nn.Module]):
    """The networks of a model, one a fold, made when one is asked for; once let go they are loaded again.

    Raises
    ------
    ModelError
        By indexing, if the files have changed since.
    """

    def __init__(self, request: ModelRequest, reading: ModelReading) -> None:
        self._request, self._sha256, self._count = request, reading.spec.sha256, len(reading.members)
        self._reading: ModelReading | None = reading
        self._held: tuple[nn.Module, ...] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        if self._held is None:
            self._held = self._made()
        return self._held[index]

    def let_go(self) -> None:
        """Hold no weights, so that what has a copy of its own need not share the memory with them."""
        self._held = self._reading = None

    def _made(self) -> tuple[nn.Module, ...]:
        reading, self._reading = self._reading, None
        if reading is None:
            again = load_model(self._request)
            if again.spec.sha256 != self._sha256:
                raise ModelError(f"{self._request.path}: the model's files changed while it was loaded; run again")
            return tuple(again.networks)
        return tuple(_with_weights(reading.skeleton, member) for member in reading.members)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for a backend: what it is, and one network a fold.

    The networks are on the CPU in eval mode; they take float32 [n, c, z, y, x] (z = 1 for 2D models) and give
    logits float32 [n, k, z, y, x]. An ensemble's logits are averaged by the caller. ``skeleton`` is such a network
    without weights, on PyTorch's device "meta"; ``plans`` and ``dataset`` are the JSON values it was built from.
    """

    spec: ModelSpec
    skeleton: nn.Module
    networks: FoldNetworks
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a model; nothing that its files bring is run unless ``request.trust_code`` allows it.

    Raises
    ------
    ModelError
        If the model cannot be used; the message names the file and the finding.
    UnsafeModelError
        If its files bring code and ``trust_code`` is not set.
    """
    with unpacked(request) as there:
        model = read_model(there)
        for member in model.members:
            check_finite(member)
        networks = FoldNetworks(request, model)
        return LoadedModel(model.spec, model.skeleton, networks, model.plans.values, dataset=model.dataset.values)


def read_spec(model: ModelRequest | str | os.PathLike[str]) -> ModelSpec:
    """What ``load_model`` would load of the model at a path, all but the weights' values checked; errors as there."""
    with unpacked(model if isinstance(model, ModelRequest) else ModelRequest(local_path(model, "the model"))) as there:
        return read_model(there).spec


def read_model(request: ModelRequest) -> ModelReading:
    """Read a model that is not packed, weights checked but for their values; see ``load_model``."""
    source = read_contents(request)
    spec, plan = _describe(source.members[0], source.plans, source.dataset, request.trust_code)
    skeleton = build_architecture(request.architecture, plan)
    for member in source.members:
        _check_fit(skeleton.network, member, plan.where)
    facts = {
        "weights": [member.original[1] for member in source.members],
        "plans": source.plans.text,
        "dataset": source.dataset.text,
        "architecture": request.architecture,
    }
    spec = replace(
        spec,
        folds=tuple(member.name for member in source.members),
        checkpoint_name=source.checkpoint_name,
        files=source.files,
        weights_sha256=source.weights_sha256,
        sha256=key_of(facts),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
    )
    if source.stated_identity not in (None, (request.architecture, spec.sha256)):
        raise ModelError(
            f"{request.path / MANIFEST}: states {source.stated_identity} as architecture and identity of the original, "
            f"but its files give {(request.architecture, spec.sha256)}; convert the model again with this version and "
            "architecture"
        )
    return ModelReading(spec, skeleton, source.members, source.plans, dataset=source.dataset)


def _describe(member: Fold, plans: PlanText, dataset: PlanText, trust_code: bool) -> tuple[ModelSpec, NetworkPlan]:
    """All that the JSON files say, and what the network is built from."""
    configuration = resolve_configuration(plans, member.configuration)
    check_supported(plans, configuration)
    channels = channel_names(dataset)
    table = labels(dataset)
    dimensions, patch, spacing = patch_and_spacing(configuration)
    if any(not 0 <= axis < dimensions for axis in member.mirror_axes):
        raise ModelError(
            f"{member.path}: inference_allowed_mirroring_axes are {member.mirror_axes}, but configuration "
            f"'{member.configuration}' has {dimensions} axes; check that plans.json belongs to this "
            "checkpoint"
        )
    network = PlanText(configuration.get("architecture", dict, "the network"), configuration.where)
    previous = previous_stage(configuration)
    reader = plans.get("image_reader_writer", str, "the name of an image reader")
    spec = ModelSpec(
        configuration=member.configuration,
        dimensions=dimensions,
        trainer_name=member.trainer_name,
        plans_name=plans.get("plans_name", str, "a name"),
        dataset_name=plans.get("dataset_name", str, "a name"),
        patch_shape=patch,
        channel_names=channels,
        label_names=table.label_names,
        class_values=table.class_values,
        normalisations=normalisations(plans, configuration, len(channels)),
        mirror_axes=tuple(axis + 3 - dimensions for axis in member.mirror_axes),
        spacing=spacing,
        resampling_data=resampling_rule(configuration, "resampling_fn_data"),
        resampling_probabilities=resampling_rule(configuration, "resampling_fn_probabilities"),
        image_reader=reader,
        slice_case=trained_on_sections(plans, dimensions, axis_order(plans)),
        folds=(),
        checkpoint_name="",
        files=(),
        weights_sha256="",
        sha256="",
        parameters=0,
        regions=table.regions,
        axis_order=axis_order(plans),
        previous_stage=previous,
        resampling_labels=None if previous is None else resampling_rule(configuration, "resampling_fn_seg"),
    )
    plan = NetworkPlan(
        trainer_name=member.trainer_name,
        dimensions=dimensions,
        channels=spec.input_channels,
        classes=len(table.class_values),
        network_class=network.get("network_class_name", str, "the dotted name of a class"),
        arguments=network.get("arch_kwargs", dict, "the network's arguments"),
        imports=tuple(network.get("_kw_requires_import", list, "names of arguments")),
        patch_shape=patch,
        plans=plans.values,
        configuration=configuration.values,
        where=configuration.where,
        checkpoint=str(member.path),
        trust_code=trust_code,
    )
    return spec, plan


def state_of(member: Fold, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the network's own names: wrappers put a prefix before them."""
    state = {}
    for name, tensor in member.weights.items():
        key = name
        while key not in expected and key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        state[key] = tensor
    return state


def _check_fit(network: nn.Module, member: Fold, where: str) -> None:
    """Raise unless each weight has its place, shape and kind in the network, and each place its weight."""
    expected = network.state_dict()
    state = state_of(member, expected)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshaped = [
        f"'{key}' {list(state[key].shape)} {state[key].dtype}, expected {list(tensor.shape)} {tensor.dtype}"
        for key, tensor in expected.items()
        if key in state
        and (state[key].shape != tensor.shape or state[key].is_floating_point() != tensor.is_floating_point())
    ]
    for count, finding in (
        (len(missing), f"'{next(iter(missing), '')}' is missing"),
        (len(unexpected), f"'{next(iter(unexpected), '')}' is not expected"),
        (len(misshaped), next(iter(misshaped), "")),
    ):
        if count:
            raise ModelError(
                f"{member.path}: the weights do not fit the network of {where}: "
                f"{finding}{f' (and {count - 1} more)' if count > 1 else ''}; check that plans.json and "
                "dataset.json belong to this checkpoint"
            )


def check_finite(member: Fold) -> None:
    """Raise ModelError unless every weight is a number."""
    seen = set()
    for key, tensor in member.weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in seen:
            continue  # another name of the same weights
        seen.add(place)
        # a sum is quicker and finite only if all is; it may overflow where nothing is wrong, so look again then
        if tensor.is_floating_point() and not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{member.path}: the weight '{key}' holds values that are not finite; the training went "
                "wrong or the file is damaged, so use another checkpoint"
            )


def _with_weights(skeleton: NNUNetModel, member: Fold) -> NNUNetModel:
    """A copy of the network on the CPU with one fold's weights as float32, in eval mode."""
    model = copy.deepcopy(skeleton)
    for module in model.modules():  # Module.to_empty does so too, but imports PyTorch's compiler and sympy for it
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
    state = state_of(member, model.network.state_dict())
    model.network.load_state_dict(state)
    return model.float().eval().requires_grad_(False)
