"""``connectomics convert``: an inference-only copy of the configured model under a name of its own."""

from __future__ import annotations

from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.core.files import replacing
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest


def convert(request: ModelRequest, output: Path) -> dict[str, object]:
    """Convert a model; the folder appears when it is complete and was read back.

    Returns
    -------
    dict
        What ``connectomics convert`` prints, as JSON values.

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
