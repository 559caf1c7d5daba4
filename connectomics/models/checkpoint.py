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
from connectomics.models.archive import unpacked
from connectomics.models.converted import (
    DATASET,
    MANIFEST,
    PLANS,
    check_file,
    is_converted,
    read_manifest,
    read_weights,
    weights_name,
)
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
    resampling_rule,
    resolve_configuration,
)
from connectomics.models.spec import ModelSpec
from connectomics.models.unpickle import read_checkpoint

_log = logging.getLogger(__name__)
_TELLING = {"plans": ("dataset_name", "plans_name"), "dataset_json": ("labels", "regions_class_order", "channel_names")}
CHECKPOINT_NAME = "checkpoint_final.pth"
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for a backend: what it is, and one network a fold.

    The networks are on the CPU in eval mode; they take float32 [n, c, z, y, x] (z = 1 for 2D models) and give
    logits float32 [n, k, z, y, x]. An ensemble's logits are averaged by the caller. ``plans`` and ``dataset`` are the
    JSON values it was built from.
    """

    spec: ModelSpec
    networks: tuple[nn.Module, ...]
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Fold:
    """What one checkpoint says."""

    path: Path
    trainer_name: str
    configuration: str
    mirror_axes: tuple[int, ...]
    init_args: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Source:
    """What a model's files say, however they are kept.

    ``originals`` are the checkpoints nnU-Net wrote, ``stated_identity`` the architecture and ``ModelSpec.sha256`` that
    a copy of all of them claims.
    """

    members: list[_Fold]
    plans: PlanText
    dataset: PlanText
    originals: tuple[tuple[str, str], ...]
    folds: tuple[str, ...]
    checkpoint_name: str
    files: tuple[tuple[str, str], ...]
    weights_sha256: str
    stated_identity: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ModelReading:
    """A model whose weights fit the network but are not in it yet."""

    spec: ModelSpec
    skeleton: NNUNetModel
    members: list[_Fold]
    plans: PlanText
    dataset: PlanText
    originals: tuple[tuple[str, str], ...]


def load_model(
    path: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint_name: str = CHECKPOINT_NAME,
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
        used), a fold's folder, a nnU-Net training folder ``Trainer__Plans__configuration``, or an exported ``.zip``
        (``MODEL.zip/Trainer__Plans__configuration`` where it holds several), or a folder that ``connectomics
        convert`` wrote.
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
    with unpacked(path, folds=folds, checkpoint_name=checkpoint_name) as place:
        model = read_model(place, folds, checkpoint_name, (plans, dataset), sha256, trust_code, architecture)
        networks = tuple(_with_weights(model.skeleton, member) for member in model.members)
        return LoadedModel(model.spec, networks, model.plans.values, model.dataset.values)


def read_spec(
    path: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint_name: str = CHECKPOINT_NAME,
    plans: Path | None = None,
    dataset: Path | None = None,
    sha256: str | None = None,
    trust_code: bool = False,
    architecture: str = "nnunet",
) -> ModelSpec:
    """What ``load_model`` would load, all but the weights' values checked; arguments and errors as there."""
    with unpacked(path, folds=folds, checkpoint_name=checkpoint_name) as place:
        return read_model(place, folds, checkpoint_name, (plans, dataset), sha256, trust_code, architecture).spec


def read_model(
    path: Path,
    folds: Sequence[str] | None,
    checkpoint_name: str,
    stated: tuple[Path | None, Path | None],
    sha256: str | None,
    trust_code: bool,
    architecture: str,
) -> ModelReading:
    """Read a model that is not packed, weights checked but for their values; see ``load_model``."""
    read = _from_copy if is_converted(path) else _from_training
    source = read(path, folds, checkpoint_name, stated, sha256, trust_code)
    spec, plan = _describe(source.members[0], source.plans, source.dataset, trust_code)
    skeleton = build_architecture(architecture, plan)
    for member in source.members:
        _check_fit(skeleton.network, member, plan.where)
    facts = {
        "weights": [digest for _, digest in source.originals],
        "plans": source.plans.text,
        "dataset": source.dataset.text,
        "architecture": architecture,
    }
    spec = replace(
        spec,
        folds=source.folds,
        checkpoint_name=source.checkpoint_name,
        files=source.files,
        weights_sha256=source.weights_sha256,
        sha256=key_of(facts),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
    )
    if source.stated_identity not in (None, (architecture, spec.sha256)):
        raise ModelError(
            f"{path / MANIFEST}: states {source.stated_identity} as architecture and identity of the original, but its "
            f"files give {(architecture, spec.sha256)}; convert the model again with this version and architecture"
        )
    return ModelReading(spec, skeleton, source.members, source.plans, source.dataset, source.originals)


def _from_training(
    path: Path,
    folds: Sequence[str] | None,
    checkpoint_name: str,
    stated: tuple[Path | None, Path | None],
    sha256: str | None,
    trust_code: bool,
) -> _Source:
    """The files that nnU-Net wrote."""
    files = locate_model(path, folds=folds, checkpoint_name=checkpoint_name, plans=stated[0], dataset=stated[1])
    digests = _digests(files)
    weights_sha256 = _weights_sha256(path, digests, sha256)
    members = [_read_fold(checkpoint, trust_code) for checkpoint in files.checkpoints]
    _check_agreement(members)
    json_files = [f for f in (files.plans, files.dataset) if f is not None]
    guessed = files.folds is None
    return _Source(
        members=members,
        plans=_json_of(files.plans, members[0], "plans", guessed=guessed and stated[0] is None),
        dataset=_json_of(files.dataset, members[0], "dataset_json", guessed=guessed and stated[1] is None),
        originals=digests,
        folds=files.folds or (str(members[0].init_args.get("fold", "unknown")),),
        checkpoint_name=files.checkpoints[0].name,
        files=(*digests, *((files.name_of(f), sha256_of_file(f)) for f in json_files)),
        weights_sha256=weights_sha256,
    )


def _from_copy(
    path: Path,
    folds: Sequence[str] | None,
    checkpoint_name: str,
    stated: tuple[Path | None, Path | None],
    sha256: str | None,
    trust_code: bool,
) -> _Source:
    """A folder that ``connectomics convert`` wrote; there is no code in it that could be trusted."""
    manifest, manifest_sha256 = read_manifest(path)
    _check_expected(path, manifest_sha256, sha256)
    if stated != (None, None):
        raise ModelError(
            f"{path}: a converted model has its plans and dataset description within; leave model.nnunet_plans and "
            "model.nnunet_dataset unset, or state them when converting"
        )
    if checkpoint_name not in (CHECKPOINT_NAME, manifest.checkpoint_name):
        raise ModelError(
            f"{path}: was converted from {manifest.checkpoint_name}, but model.checkpoint_name asks for "
            f"{checkpoint_name}; convert that one, or leave the key unset"
        )
    chosen = manifest.folds if folds is None else tuple(folds)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(manifest.folds):
        raise ModelError(
            f"{path}: model.folds names {list(chosen)}, expected each once out of {', '.join(manifest.folds)}"
        )
    names = [weights_name(fold) for fold in chosen]
    for name in (PLANS, DATASET, *names):
        check_file(path, name, manifest)
    return _Source(
        members=[
            _Fold(
                path=path / name,
                trainer_name=manifest.trainer_name,
                configuration=manifest.configuration,
                mirror_axes=manifest.mirror_axes,
                init_args={"fold": fold},
                weights=read_weights(path / name),
            )
            for fold, name in zip(chosen, names, strict=True)
        ],
        plans=read_json(path / PLANS),
        dataset=read_json(path / DATASET),
        originals=tuple(manifest.original[manifest.folds.index(fold)] for fold in chosen),
        folds=chosen,
        checkpoint_name=manifest.checkpoint_name,
        files=((MANIFEST, manifest_sha256), *((name, manifest.files[name]) for name in (*names, PLANS, DATASET))),
        weights_sha256=manifest_sha256,
        stated_identity=(manifest.architecture, manifest.original_sha256) if chosen == manifest.folds else None,
    )


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
    _check_expected(path, found, expected)
    return found


def _check_expected(path: Path, found: str, expected: str | None) -> None:
    if expected is not None and expected.strip().lower() != found:
        raise ModelError(
            f"{path}: its sha256 is {found}, but model.sha256 expects {expected}; this is another model or a "
            "damaged copy, so fetch it again or correct model.sha256"
        )


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
        resampling_data=resampling_rule(configuration, "resampling_fn_data"),
        resampling_probabilities=resampling_rule(configuration, "resampling_fn_probabilities"),
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


def state_of(member: _Fold, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def check_finite(member: _Fold) -> None:
    """Raise unless every weight is a number.

    Raises
    ------
    ModelError
        If one is infinite or not a number.
    """
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


def _with_weights(skeleton: NNUNetModel, member: _Fold) -> NNUNetModel:
    """A copy of the network on the CPU with one fold's weights as float32, in eval mode."""
    check_finite(member)
    model = copy.deepcopy(skeleton)
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model.to_empty(device="cpu")
    state = state_of(member, model.network.state_dict())
    model.network.load_state_dict(state)
    return model.float().eval().requires_grad_(False)
