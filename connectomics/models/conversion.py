"""Writes the inference-only copy of a model and reads it back. Called by ``assembly.engine.models``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from connectomics.core.errors import ModelError
from connectomics.models.archive import unpacked
from connectomics.models.checkpoint import ModelReading, check_finite, read_model, state_of
from connectomics.models.converted import Manifest, is_converted, weights_name, write_copy
from connectomics.models.locate import ModelRequest
from connectomics.models.spec import ModelSpec


def convert_model(request: ModelRequest, folder: Path) -> ModelSpec:
    """Write what inference needs of a model into an empty folder; equal models give equal bytes.

    Returns
    -------
    ModelSpec
        That of the copy: ``sha256`` is the original's, ``weights_sha256`` the manifest's.

    Raises
    ------
    ModelError
        If the model cannot be used, is a copy already, or the copy does not read back as what it was.
    UnsafeModelError
        If its files bring code and ``trust_code`` is not set.
    """
    if is_converted(request.path):
        raise ModelError(f"{request.path}: is a converted model already; copy the folder, or give the nnU-Net model")
    with unpacked(request) as there:
        model = read_model(there)
        expected = model.skeleton.network.state_dict()
        states = []
        for member in model.members:
            check_finite(member)
            states.append(state_of(member, expected))
        manifest = Manifest(
            trainer_name=model.spec.trainer_name,
            configuration=model.spec.configuration,
            mirror_axes=model.members[0].mirror_axes,
            checkpoint_name=model.spec.checkpoint_name,
            folds=model.spec.folds,
            original=tuple(member.original for member in model.members),
            original_sha256=model.spec.sha256,
            architecture=request.architecture,
            files={weights_name(fold): "" for fold in model.spec.folds},
        )
        write_copy(folder, manifest, model.plans, model.dataset, weights=states)
        return _read_back(request, folder, model, states)


def _read_back(
    request: ModelRequest, folder: Path, model: ModelReading, states: Sequence[Mapping[str, torch.Tensor]]
) -> ModelSpec:
    """What the copy is, every weight of it compared with the original's."""
    copy = read_model(ModelRequest(folder, trust_code=request.trust_code, architecture=request.architecture))
    for member, state in zip(copy.members, states, strict=True):
        same = member.weights.keys() == state.keys() and all(
            member.weights[name].dtype == tensor.dtype and torch.equal(member.weights[name], tensor)
            for name, tensor in state.items()
        )
        if not same or copy.spec.sha256 != model.spec.sha256:
            raise ModelError(
                f"{member.path}: does not read back as what {request.path} holds; check the disk and convert again"
            )
    return copy.spec
