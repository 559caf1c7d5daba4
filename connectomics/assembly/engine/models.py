"""The models: which the configuration names, how each is loaded, what ``inspect`` says of it."""

from __future__ import annotations

from pathlib import Path

from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, ModelError
from connectomics.models.checkpoint import LoadedModel, load_model
from connectomics.models.locate import ModelRequest
from connectomics.models.spec import ModelSpec


def checkpoint_path(config: Config, checkpoint: Path | None) -> Path:
    """The model that the command line, or else the configuration, names.

    Raises
    ------
    ConfigError
        If none is named.
    """
    if checkpoint is not None:
        return checkpoint
    if config.model.nnunet_checkpoint is None:
        raise ConfigError("no model is named; give --checkpoint PATH or set model.nnunet_checkpoint")
    return Path(config.model.nnunet_checkpoint)


def load(config: Config, path: Path) -> LoadedModel:
    """Load a model and hold it against what the configuration expects.

    Raises
    ------
    ModelError
        If it cannot be loaded or is not what the configuration says.
    """
    loaded = load_model(model_request(config, path))
    _check_expectations(config, loaded.spec, path)
    return loaded


def load_models(config: Config, checkpoint: Path | None) -> list[tuple[Path, LoadedModel]]:
    """The model that is named and those of ``model.ensemble``, which must segment the same labels of the same channels.

    Raises
    ------
    ConfigError
        If no model is named.
    ModelError
        If one cannot be loaded, or does not fit the first.
    """
    paths = [checkpoint_path(config, checkpoint), *map(Path, config.model.ensemble or ())]
    loaded = [(path, load(config, path)) for path in paths]
    for path, other in loaded[1:]:
        check_alike(loaded[0][1].spec, other.spec, str(path), str(paths[0]), what_they_are="the models of an ensemble")
    return loaded


def check_alike(ours: ModelSpec, theirs: ModelSpec, path: str, first: str, what_they_are: str) -> None:
    """Refuse a model at ``path`` that does not segment the same labels of the same channels as the first.

    Raises
    ------
    ModelError
        Naming what differs.
    """
    for what, expected, found in (
        ("channels", ours.channel_names, theirs.channel_names),
        ("labels", ours.label_names, theirs.label_names),
        ("regions", ours.regions, theirs.regions),
        ("classes", ours.class_values, theirs.class_values),
    ):
        if expected != found:
            raise ModelError(
                f"{path}: its {what} are {found}, but those of {first} are {expected}; {what_they_are} must be trained "
                "on the same channels and labels"
            )


def model_request(config: Config, path: Path) -> ModelRequest:
    """How the configuration wants the model at ``path`` to be read."""
    model = config.model
    return ModelRequest(
        path,
        folds=model.folds,
        checkpoint_name=model.checkpoint_name,
        plans=Path(model.nnunet_plans) if model.nnunet_plans else None,
        dataset=Path(model.nnunet_dataset) if model.nnunet_dataset else None,
        sha256=model.sha256,
        trust_code=model.trust_code,
        architecture=model.architecture,
    )


def _check_expectations(config: Config, spec: ModelSpec, path: Path) -> None:
    expected: tuple[tuple[str, object, object], ...] = (
        ("model.in_channels", config.model.in_channels, spec.channels),
        ("model.out_channels", config.model.out_channels, spec.classes),
        ("data.in_channels", config.data.in_channels, spec.channels),
        ("data.out_channels", config.data.out_channels, spec.classes),
        ("data.do_2d", config.data.do_2d, spec.dimensions == 2),
    )
    for key, stated, found in expected:
        if stated is not None and stated != found:
            raise ModelError(f"{path}: {key} is {stated}, but the model has {found}; mend the key or leave it null")


def describe(config: Config, checkpoint: Path) -> dict[str, object]:
    """What ``connectomics inspect`` prints of a model, as JSON values."""
    spec = load(config, checkpoint).spec
    axes = "zyx"  # of the volume; patch, spacing and mirror axes are those of the transposed axes
    return {
        "model": str(checkpoint),
        "configuration": f"{spec.configuration} ({spec.dimensions}D)",
        "trainer": spec.trainer_name,
        "plans": spec.plans_name,
        "dataset": spec.dataset_name,
        "folds": ", ".join(spec.folds),
        "axes": "".join(axes[a] for a in spec.axis_order),
        "patch (z, y, x)": list(spec.patch_shape),
        "spacing (z, y, x)": list(spec.spacing),
        "channels": ", ".join(spec.channel_names),
        "normalisation": ", ".join(n.scheme + " (nonzero mask)" * n.masked for n in spec.normalisations),
        "labels": ", ".join(f"{value}={name}" for name, value in spec.label_names),
        "regions": ", ".join(f"{name}={'+'.join(map(str, values))}" for name, values in spec.regions) or "none",
        "previous stage": spec.previous_stage or "none",
        "case": "each section" if spec.slice_case else "the whole volume",
        "mirror axes": "".join(axes[a] for a in spec.mirror_axes) or "none",
        "image reader": spec.image_reader,
        "parameters": spec.parameters,
        "sha256": spec.weights_sha256,
        "files": [f"{name} {digest}" for name, digest in spec.files],
    }
