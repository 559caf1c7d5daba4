"""Loads nnU-Net v2 models: finds and checks their files, builds the networks, puts the weights in.

Called by the composition root, ``inspect`` and ``doctor``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from connectomics.errors import ModelError
from connectomics.fingerprint import key_of, sha256_of_bytes, sha256_of_file
from connectomics.models.arch.nnunet_models import NetworkPlan, NNUNetModel, build_architecture
from connectomics.models.locate import ModelFiles, locate_model
from connectomics.models.plans import (
    PlanText,
    axis_order,
    channel_names,
    check_supported,
    embedded_json,
    labels,
    normalisations,
    patch_and_spacing,
    read_json,
    resolve_configuration,
)
from connectomics.models.spec import ModelSpec
from connectomics.models.unpickle import read_checkpoint

_log = logging.getLogger(__name__)
_TELLING = {"plans": ("dataset_name", "plans_name"), "dataset_json": ("labels", "regions_class_order", "channel_names")}
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for a backend: what it is, and one network a fold.

    The networks are on the CPU in eval mode; they take float32 [n, c, z, y, x] (z = 1 for 2D models) and give
    logits float32 [n, k, z, y, x]. An ensemble's logits are averaged by the caller.
    """

    spec: ModelSpec
    networks: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class _Fold:
    """What one checkpoint says."""

    path: Path
    trainer_name: str
    configuration: str
    mirror_axes: tuple[int, ...]
    init_args: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]


def load_model(
    path: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    plans: Path | None = None,
    dataset: Path | None = None,
    sha256: str | None = None,
    trust_code: bool = False,
    architecture: str = "nnunet",
) -> LoadedModel:
    """Load a model; nothing that its files bring is run unless ``trust_code`` allows it.

    Parameters
    ----------
    path
        A checkpoint file with plans.json and dataset.json beside it or above it (else its own copies are
        used), a fold's folder, or a nnU-Net training folder ``Trainer__Plans__configuration``.
    folds
        Folds of a training folder in the order of their mean, for example ``("0", "1")`` or ``("all",)``;
        None: all numbered folds that hold the checkpoint, else ``fold_all``.
    checkpoint_name
        File within a fold's folder.
    plans, dataset
        The JSON files, where they lie elsewhere.
    sha256
        Expected ``ModelSpec.weights_sha256``, compared before anything is unpickled.
    trust_code
        Unpickle without restriction and import the classes that the plans name.
    architecture
        Name of a registered architecture.

    Raises
    ------
    ModelError
        If the model cannot be used; the message names the file and the finding.
    UnsafeModelError
        If its files bring code and ``trust_code`` is not set.
    """
    spec, skeleton, members = _read(path, folds, checkpoint_name, (plans, dataset), sha256, trust_code, architecture)
    return LoadedModel(spec, tuple(_with_weights(skeleton, member) for member in members))


def read_spec(
    path: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    plans: Path | None = None,
    dataset: Path | None = None,
    sha256: str | None = None,
    trust_code: bool = False,
    architecture: str = "nnunet",
) -> ModelSpec:
    """What ``load_model`` would load, all but the weights' values checked; arguments and errors as there."""
    return _read(path, folds, checkpoint_name, (plans, dataset), sha256, trust_code, architecture)[0]


def _read(
    path: Path,
    folds: Sequence[str] | None,
    checkpoint_name: str,
    stated: tuple[Path | None, Path | None],
    sha256: str | None,
    trust_code: bool,
    architecture: str,
) -> tuple[ModelSpec, NNUNetModel, list[_Fold]]:
    files = locate_model(path, folds=folds, checkpoint_name=checkpoint_name, plans=stated[0], dataset=stated[1])
    digests = _digests(files)
    weights_sha256 = _weights_sha256(path, digests, sha256)
    members = [_read_fold(checkpoint, trust_code) for checkpoint in files.checkpoints]
    _check_agreement(members)
    plan_text = _json_of(files.plans, members[0], "plans", guessed=files.folds is None and stated[0] is None)
    dataset_text = _json_of(
        files.dataset, members[0], "dataset_json", guessed=files.folds is None and stated[1] is None
    )
    spec, plan = _describe(members[0], plan_text, dataset_text, trust_code)
    skeleton = build_architecture(architecture, plan)
    for member in members:
        _check_fit(skeleton.network, member, plan.where)
    json_files = [f for f in (files.plans, files.dataset) if f is not None]
    spec = replace(
        spec,
        folds=files.folds or (str(members[0].init_args.get("fold", "unknown")),),
        checkpoint_name=files.checkpoints[0].name,
        files=(*digests, *((files.name_of(f), sha256_of_file(f)) for f in json_files)),
        weights_sha256=weights_sha256,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
    )
    facts = {
        "weights": [digest for _, digest in digests],
        "plans": plan_text.text,
        "dataset": dataset_text.text,
        "architecture": architecture,
    }
    return replace(spec, sha256=key_of(facts)), skeleton, members


def _digests(files: ModelFiles) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((files.name_of(f), sha256_of_file(f)) for f in files.checkpoints)
    except OSError as error:
        raise ModelError(
            f"{error.filename}: the checkpoint cannot be read ({error.strerror}); check its permissions"
        ) from error


def _weights_sha256(path: Path, digests: tuple[tuple[str, str], ...], expected: str | None) -> str:
    if len(digests) == 1:
        found = digests[0][1]
    else:
        found = sha256_of_bytes("\n".join(f"{name} {digest}" for name, digest in sorted(digests)).encode())
    if expected is not None and expected.strip().lower() != found:
        raise ModelError(
            f"{path}: its sha256 is {found}, but model.sha256 expects {expected}; this is another model or a "
            "damaged copy, so fetch it again or correct model.sha256"
        )
    return found


def _read_fold(path: Path, trust_code: bool) -> _Fold:
    """Read one checkpoint and check the types of what is used of it."""
    content = read_checkpoint(path, trust_code=trust_code)
    for key, kind in (("network_weights", dict), ("init_args", dict), ("trainer_name", str)):
        if not isinstance(content.get(key), kind):
            raise ModelError(
                f"{path}: the checkpoint lacks '{key}' (found: "
                f"{', '.join(map(str, content))[:120] or 'nothing'}); give a checkpoint of a nnU-Net v2 "
                "training"
            )
    init_args, weights = content["init_args"], content["network_weights"]
    if not isinstance(init_args.get("configuration"), str):
        raise ModelError(f"{path}: init_args of the checkpoint lack 'configuration'; give one that nnU-Net v2 wrote")
    axes = content.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, (list, tuple)) or any(type(a) is not int for a in axes) or len(set(axes)) < len(axes):
        raise ModelError(f"{path}: inference_allowed_mirroring_axes are {axes!r:.60}, expected distinct axis numbers")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{path}: network_weights hold {name!r:.60} that is not a tensor; the file is not usable")
    return _Fold(path, content["trainer_name"], init_args["configuration"], tuple(axes), init_args, weights)


def _check_agreement(members: Sequence[_Fold]) -> None:
    first = members[0]
    for other in members[1:]:
        for what, ours, theirs in (
            ("trainer", first.trainer_name, other.trainer_name),
            ("configuration", first.configuration, other.configuration),
            ("mirror axes", first.mirror_axes, other.mirror_axes),
            ("labels", _labels_within(first), _labels_within(other)),
        ):
            if ours != theirs:
                raise ModelError(
                    f"{other.path}: its {what} ({theirs}) differ from those of {first.path} ({ours}); the "
                    "folds of an ensemble must come from one training"
                )


def _labels_within(member: _Fold) -> object:
    dataset = member.init_args.get("dataset_json")
    return [dataset.get(key) for key in ("labels", "regions_class_order")] if isinstance(dataset, dict) else None


def _json_of(path: Path | None, member: _Fold, key: str, *, guessed: bool) -> PlanText:
    """The JSON file if there is one, else the checkpoint's own copy.

    As in nnU-Net the file decides where both differ; but one that merely lay near a bare checkpoint must be
    its own.
    """
    within = member.init_args.get(key)
    if path is None:
        name = f"{key.removesuffix('_json')}.json"
        _log.info("%s: no %s beside or above it, using the copy inside", member.path, name)
        return embedded_json(within, f"{member.path} (init_args '{key}')")
    text = read_json(path)
    for name in _TELLING[key]:
        if isinstance(within, dict) and within.get(name) != text.values.get(name):
            if guessed:
                raise ModelError(
                    f"{path}: its '{name}' differs from the one inside {member.path}, so it belongs to "
                    "another model; remove it, or state model.nnunet_plans and model.nnunet_dataset to use "
                    "it all the same"
                )
            _log.warning("%s: its '%s' differs from the one inside %s", path, name, member.path)
    return text


def _describe(member: _Fold, plans: PlanText, dataset: PlanText, trust_code: bool) -> tuple[ModelSpec, NetworkPlan]:
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
        image_reader=reader,
        slice_case=dimensions == 2 and reader == "NaturalImage2DIO",
        folds=(),
        checkpoint_name="",
        files=(),
        weights_sha256="",
        sha256="",
        parameters=0,
        regions=table.regions,
        axis_order=axis_order(plans),
    )
    plan = NetworkPlan(
        trainer_name=member.trainer_name,
        dimensions=dimensions,
        channels=len(channels),
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


def _state_of(member: _Fold, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the network's own names: wrappers put a prefix before them."""
    state = {}
    for name, tensor in member.weights.items():
        key = name
        while key not in expected and key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        state[key] = tensor
    return state


def _check_fit(network: nn.Module, member: _Fold, where: str) -> None:
    """Raise unless each weight has its place, shape and kind in the network, and each place its weight."""
    expected = network.state_dict()
    state = _state_of(member, expected)
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


def _with_weights(skeleton: NNUNetModel, member: _Fold) -> NNUNetModel:
    """A copy of the network on the CPU with one fold's weights as float32, in eval mode."""
    model = copy.deepcopy(skeleton)
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model.to_empty(device="cpu")
    state = _state_of(member, model.network.state_dict())
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{member.path}: the weight '{key}' holds values that are not finite; the training went "
                "wrong or the file is damaged, so use another checkpoint"
            )
    model.network.load_state_dict(state)
    return model.float().eval().requires_grad_(False)
