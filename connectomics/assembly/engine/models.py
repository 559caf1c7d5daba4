"""The models: which the configuration names, how each is loaded, what ``inspect`` says of it, and copies of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from connectomics.assembly.settings import ModelSettings
from connectomics.core.errors import ModelError, OutputError
from connectomics.core.files import replacing
from connectomics.models.checkpoint import LoadedModel, load_model
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest
from connectomics.models.spec import ModelSpec


def load(stated: ModelSettings, number: int = 0) -> LoadedModel:
    """Load one of the models that are named; ModelError where it is not what the configuration says."""
    request = stated.requests[number]
    loaded = load_model(request)
    _check_expectations(stated.expected, loaded.spec, request.path)
    return loaded


def load_models(stated: ModelSettings) -> list[tuple[Path, LoadedModel]]:
    """The model that is named and those of ``model.ensemble``, which must segment the same labels of the same channels.

    Raises
    ------
    ModelError
        If one cannot be loaded, or does not fit the first.
    """
    loaded = [(request.path, load(stated, i)) for i, request in enumerate(stated.requests)]
    for path, other in loaded[1:]:
        check_alike(
            loaded[0][1].spec, other.spec, str(path), str(loaded[0][0]), what_they_are="the models of an ensemble"
        )
    return loaded


def check_alike(ours: ModelSpec, theirs: ModelSpec, path: str, first: str, what_they_are: str) -> None:
    """Refuse (ModelError) a model that does not segment the same labels of the same channels as the first."""
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


def _check_expectations(expected: Mapping[str, object], spec: ModelSpec, path: Path) -> None:
    for key, stated in expected.items():
        found = {"in_channels": spec.channels, "out_channels": spec.classes, "do_2d": spec.dimensions == 2}[
            key.rpartition(".")[2]
        ]
        if stated != found:
            raise ModelError(f"{path}: {key} is {stated}, but the model has {found}; mend the key or leave it null")


def describe(stated: ModelSettings) -> dict[str, object]:
    """What ``connectomics inspect`` prints of a model, as JSON values."""
    spec = load(stated).spec
    axes = "zyx"  # of the volume; patch, spacing and mirror axes are those of the transposed axes
    return {
        "model": str(stated.requests[0].path),
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


def convert(request: ModelRequest, output: Path) -> dict[str, object]:
    """Convert a model; the folder appears when it is complete and was read back. What is returned is printed.

    Raises
    ------
    OutputError
        If ``output`` exists or cannot be written.
    ModelError
        If the model cannot be used.
    """
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output}: is there already; give another name or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as folder:
            folder.mkdir()
            spec = convert_model(request, folder)
            written_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); check the folder and its disk"
        ) from error
    return {
        "copy": str(output),
        "folds": ", ".join(spec.folds),
        "bytes": written_bytes,
        "sha256": spec.weights_sha256,
    }
