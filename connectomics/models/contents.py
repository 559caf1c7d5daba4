"""What the files of a model say, in the training folder of nnU-Net or in a converted copy. Called by ``checkpoint``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from connectomics.core.errors import ModelError
from connectomics.core.fingerprint import sha256_of_bytes, sha256_of_file
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
from connectomics.models.locate import CHECKPOINT_NAME, ModelFiles, ModelRequest, locate_model
from connectomics.models.plan_text import PlanText, embedded_json, read_json
from connectomics.models.plans import whole_number
from connectomics.models.unpickle import read_checkpoint

_log = logging.getLogger(__name__)
_TELLING = {"plans": ("dataset_name", "plans_name"), "dataset_json": ("labels", "regions_class_order", "channel_names")}


@dataclass(frozen=True, slots=True)
class Fold:
    """What one checkpoint says; ``original`` is name and sha256 of the one nnU-Net wrote."""

    name: str
    original: tuple[str, str]
    path: Path
    trainer_name: str
    configuration: str
    mirror_axes: tuple[int, ...]
    init_args: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ModelContents:
    """What a model's files say, however they are kept.

    ``stated_identity`` is the architecture and ``ModelSpec.sha256`` that a copy of all folds claims.
    """

    members: list[Fold]
    plans: PlanText
    dataset: PlanText
    checkpoint_name: str
    files: tuple[tuple[str, str], ...]
    weights_sha256: str
    stated_identity: tuple[str, str] | None = None


def read_contents(request: ModelRequest) -> ModelContents:
    """Read a model that is not packed; the types of what its files hold are checked, not whether they fit.

    Raises ModelError if a file is missing, damaged or contradicts another.
    """
    return _from_copy(request) if is_converted(request.path) else _from_training(request)


def _from_training(request: ModelRequest) -> ModelContents:
    """The files that nnU-Net wrote."""
    files = locate_model(request)
    digests = _digests(files)
    weights_sha256 = _weights_sha256(request, digests)
    found = zip(files.checkpoints, files.folds or (None,), digests, strict=True)
    members = [_read_fold(path, name, digest, request.trust_code) for path, name, digest in found]
    _check_agreement(members)
    json_files = [f for f in (files.plans, files.dataset) if f is not None]
    guessed = files.folds is None
    return ModelContents(
        members=members,
        plans=_json_of(files.plans, members[0], "plans", guessed=guessed and request.plans is None),
        dataset=_json_of(files.dataset, members[0], "dataset_json", guessed=guessed and request.dataset is None),
        checkpoint_name=files.checkpoints[0].name,
        files=(*digests, *((files.name_of(f), sha256_of_file(f)) for f in json_files)),
        weights_sha256=weights_sha256,
    )


def _from_copy(request: ModelRequest) -> ModelContents:
    """A folder that ``connectomics convert`` wrote; there is no code in it that could be trusted."""
    path, checkpoint_name = request.path, request.checkpoint_name
    manifest, manifest_sha256 = read_manifest(path)
    _check_expected(request, manifest_sha256)
    if (request.plans, request.dataset) != (None, None):
        raise ModelError(
            f"{path}: a converted model has its plans and dataset description within; leave model.nnunet_plans and "
            "model.nnunet_dataset unset, or state them when converting"
        )
    if checkpoint_name not in (CHECKPOINT_NAME, manifest.checkpoint_name):
        raise ModelError(
            f"{path}: was converted from {manifest.checkpoint_name}, but model.checkpoint_name asks for "
            f"{checkpoint_name}; convert that one, or leave the key unset"
        )
    chosen = manifest.folds if request.folds is None else tuple(request.folds)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(manifest.folds):
        raise ModelError(
            f"{path}: model.folds names {list(chosen)}, expected each once out of {', '.join(manifest.folds)}"
        )
    names = [weights_name(fold) for fold in chosen]
    for name in (PLANS, DATASET, *names):
        check_file(path, name, manifest)
    return ModelContents(
        members=[
            Fold(
                fold,
                manifest.original[manifest.folds.index(fold)],
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


def _weights_sha256(request: ModelRequest, digests: tuple[tuple[str, str], ...]) -> str:
    if len(digests) == 1:
        found = digests[0][1]
    else:
        found = sha256_of_bytes("\n".join(f"{name} {digest}" for name, digest in sorted(digests)).encode())
    _check_expected(request, found)
    return found


def _check_expected(request: ModelRequest, found: str) -> None:
    expected = request.sha256
    if expected is not None and expected.strip().lower() != found:
        raise ModelError(
            f"{request.path}: its sha256 is {found}, but model.sha256 expects {expected}; this is another model or a "
            "damaged copy, so fetch it again or correct model.sha256"
        )


def _read_fold(path: Path, name: str | None, original: tuple[str, str], trust_code: bool) -> Fold:
    """Read one checkpoint and check the types of what is used of it; a bare one says its name itself."""
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
    size = path.stat().st_size
    for key, tensor in weights.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{path}: network_weights hold {key!r:.60} that is not a tensor; the file is not usable")
        if tensor.numel() * tensor.itemsize > size:
            raise ModelError(
                f"{path}: the weight {key!r:.60} of shape {list(tensor.shape)!r:.60} is larger than the file of "
                f"{size} bytes, so one number stands for many; it is not what nnU-Net writes, so use another checkpoint"
            )
    return Fold(
        str(init_args.get("fold", "unknown")) if name is None else name,
        original,
        path,
        content["trainer_name"],
        configuration=init_args["configuration"],
        mirror_axes=tuple(axes),
        init_args=init_args,
        weights=weights,
    )


def _check_agreement(members: Sequence[Fold]) -> None:
    first = members[0]
    for other in members[1:]:
        for what, ours, theirs in (
            ("trainer", first.trainer_name, other.trainer_name),
            ("configuration", first.configuration, other.configuration),
            ("mirror axes", first.mirror_axes, other.mirror_axes),
            ("labels", *_contradicting_labels(first, other)),
        ):
            if ours != theirs:
                raise ModelError(
                    f"{other.path}: its {what} ({theirs}) differ from those of {first.path} ({ours}); the "
                    "folds of an ensemble must come from one training"
                )
        if _stated_labels(first) != _stated_labels(other):
            _log.warning("%s: names its labels otherwise than %s; dataset.json decides", other.path, first.path)


def _stated_labels(member: Fold) -> object:
    dataset = member.init_args.get("dataset_json")
    return [dataset.get(key) for key in ("labels", "regions_class_order")] if isinstance(dataset, dict) else None


def _contradicting_labels(first: Fold, other: Fold) -> tuple[object, object]:
    """The labels of two folds where they mean other classes, else twice the same.

    nnU-Net does not look at these copies, and names may be changed between trainings. Folds mean other classes where
    the values differ, or where one name has two values.
    """
    ours, theirs = (_meaning(member.init_args.get("dataset_json")) for member in (first, other))
    if ours is None or theirs is None:
        return None, None
    shared = ours[0].keys() & theirs[0].keys()
    same = all(ours[0][name] == theirs[0][name] for name in shared) and ours[1] == theirs[1]
    return (None, None) if same else (_stated_labels(first), _stated_labels(other))


def _meaning(dataset: object) -> tuple[dict[str, tuple[int | None, ...]], object] | None:
    """Values of a dataset's labels by name, and what counts of them without the names; None where none are stated."""
    if not isinstance(dataset, dict) or not isinstance(dataset.get("labels"), dict):
        return None
    stated: dict[str, Any] = dataset["labels"]
    values = {n: tuple(map(whole_number, v if isinstance(v, (list, tuple)) else [v])) for n, v in stated.items()}
    regions = any(len(several) > 1 for several in values.values())
    counted = list(values.values()) if regions else sorted(values.values(), key=repr)
    return values, (counted, dataset.get("regions_class_order") if regions else None, values.get("ignore"))


def _says_the_same(name: str, within: Mapping[str, Any], text: PlanText) -> bool:
    """Whether two copies of a JSON file agree in a key, labels by their numbers however these are written."""
    meanings = [_meaning(dataset) for dataset in (within, dict(text.values))]
    if name == "labels" and None not in meanings:
        return meanings[0] == meanings[1]
    return bool(within.get(name) == text.values.get(name))


def _json_of(path: Path | None, member: Fold, key: str, *, guessed: bool) -> PlanText:
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
        if isinstance(within, dict) and not _says_the_same(name, within, text):
            if guessed:
                raise ModelError(
                    f"{path}: its '{name}' differs from the one inside {member.path}, so it belongs to "
                    "another model; remove it, or state model.nnunet_plans and model.nnunet_dataset to use "
                    "it all the same"
                )
            _log.warning("%s: its '%s' differs from the one inside %s", path, name, member.path)
    return text
