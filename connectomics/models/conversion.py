"""Writes the inference-only copy of a model and reads it back. Called by ``build.convert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from connectomics.errors import ModelError
from connectomics.models.archive import unpacked
from connectomics.models.checkpoint import CHECKPOINT_NAME, check_finite, read_model, state_of
from connectomics.models.converted import Manifest, is_converted, weights_name, write_copy
from connectomics.models.spec import ModelSpec


def convert_model(
    path: Path,
    folder: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint_name: str = CHECKPOINT_NAME,
    plans: Path | None = None,
    dataset: Path | None = None,
    sha256: str | None = None,
    trust_code: bool = False,
    architecture: str = "nnunet",
) -> ModelSpec:
    """Write what inference needs of a model into an empty folder; equal models give equal bytes.

    Parameters
    ----------
    folder
        An empty folder. All other arguments are those of ``load_model``.

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
    if is_converted(path):
        raise ModelError(f"{path}: is a converted model already; copy the folder, or give the nnU-Net model")
    with unpacked(path, folds=folds, checkpoint_name=checkpoint_name) as place:
        model = read_model(place, folds, checkpoint_name, (plans, dataset), sha256, trust_code, architecture)
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
            original=model.originals,
            original_sha256=model.spec.sha256,
            architecture=architecture,
            files={weights_name(fold): "" for fold in model.spec.folds},
        )
        write_copy(folder, manifest, model.plans, model.dataset, states)
        copy = read_model(folder, None, CHECKPOINT_NAME, (None, None), None, trust_code, architecture)
        for member, state in zip(copy.members, states, strict=True):
            same = member.weights.keys() == state.keys() and all(
                member.weights[name].dtype == tensor.dtype and torch.equal(member.weights[name], tensor)
                for name, tensor in state.items()
            )
            if not same or copy.spec.sha256 != model.spec.sha256:
                raise ModelError(
                    f"{member.path}: does not read back as what {path} holds; check the disk and convert again"
                )
    return copy.spec
