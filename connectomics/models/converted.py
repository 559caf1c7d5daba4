"""Inference-only copies of models: weights as safetensors, everything else as JSON, no pickle, a manifest of digests.

``conversion`` writes them, ``checkpoint`` reads them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from connectomics.core.errors import ModelError
from connectomics.core.fingerprint import key_of, sha256_of_bytes, sha256_of_file
from connectomics.models.plan_text import PlanText, read_json

MANIFEST = "manifest.json"
PLANS, DATASET = "plans.json", "dataset.json"
FORMAT = "connectomics inference model 1"
_FOLD_NAME = re.compile(r"\w{1,40}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST_HEADER_BYTES = 1 << 24
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
_AGAIN = "convert the model again, or fetch the whole folder again from its source"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says.

    Parameters
    ----------
    trainer_name, configuration, mirror_axes
        As the original checkpoints state them; the axes are the network's.
    checkpoint_name
        The original's file name within a fold.
    folds
        Names in the order of their mean.
    original
        (name, sha256) of the original checkpoint of each fold.
    original_sha256
        ``ModelSpec.sha256`` of the original.
    architecture
        The registered architecture that key was made with.
    files
        sha256 of each file of the copy by its name.
    """

    trainer_name: str
    configuration: str
    mirror_axes: tuple[int, ...]
    checkpoint_name: str
    folds: tuple[str, ...]
    original: tuple[tuple[str, str], ...]
    original_sha256: str
    architecture: str
    files: Mapping[str, str]


def is_converted(path: Path) -> bool:
    """Whether ``path`` is a folder that ``connectomics convert`` wrote."""
    try:
        return (path / MANIFEST).is_file()
    except OSError:
        return False  # whatever it is, it is looked at and named where models are located


def weights_name(fold: str) -> str:
    """Where the weights of a fold lie within the folder; a ModelError if its name is not a plain word."""
    if not _FOLD_NAME.fullmatch(fold):
        raise ModelError(f"the fold is named {fold!r:.60}, expected letters and digits; the checkpoint is not usable")
    return f"fold_{fold}/weights.safetensors"


def write_copy(
    folder: Path, manifest: Manifest, plans: PlanText, dataset: PlanText, weights: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Write a copy into an empty folder; equal models give equal bytes. ``manifest.files`` is filled in here.

    ``weights`` has, for each fold of the manifest, tensors by the network's names.
    """
    for name, text in ((PLANS, plans), (DATASET, dataset)):
        (folder / name).write_text(json.dumps(text.values, indent=1) + "\n", encoding="utf-8")
    names = [weights_name(fold) for fold in manifest.folds]
    for name, tensors in zip(names, weights, strict=True):
        (folder / name).parent.mkdir()
        _write_weights(folder / name, tensors)
        (folder / name).chmod((folder / PLANS).stat().st_mode)  # safetensors leaves it to its owner alone
    values: dict[str, object] = {
        "format": FORMAT,
        **asdict(manifest),
        "files": {name: sha256_of_file(folder / name) for name in (PLANS, DATASET, *names)},
    }
    values["sha256"] = key_of(values)
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Networks hold some tensors under several names: each is written once, the other names stand in the header."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        storage = tensor.untyped_storage().data_ptr()
        place = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in seen and tensor.numel():
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = tensor.detach().clone() if storage in storages else tensor.detach().contiguous()
        storages.add(storage)
    save_file(tensors, path, metadata={"aliases": json.dumps(aliases, sort_keys=True)})


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a copy and the sha256 of its file; a ModelError if it is damaged, changed or of another kind."""
    path = folder / MANIFEST
    text = read_json(path)
    values = dict(text.values)
    if values.get("format") != FORMAT:
        raise ModelError(
            f"{path}: its format is {values.get('format')!r:.60}, expected '{FORMAT}'; give a folder that this "
            "version's 'connectomics convert' wrote, or a nnU-Net model"
        )
    stated = values.pop("sha256", None)
    try:
        found = key_of(values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: holds values that are not plain ({error!s:.80}); {_AGAIN}") from error
    if stated != found:
        raise ModelError(
            f"{path}: the manifest was changed or is damaged (its own sha256 is {found}, it states {stated!s:.64}); "
            f"{_AGAIN}"
        )
    manifest = Manifest(
        trainer_name=text.get("trainer_name", str, "a name"),
        configuration=text.get("configuration", str, "a name"),
        mirror_axes=tuple(text.get("mirror_axes", list, "axis numbers")),
        checkpoint_name=text.get("checkpoint_name", str, "a name"),
        folds=tuple(text.get("folds", list, "names of folds")),
        original=tuple(_pair(entry) for entry in text.get("original", list, "names and digests")),
        original_sha256=text.get("original_sha256", str, "a digest"),
        architecture=text.get("architecture", str, "a name"),
        files=text.get("files", dict, "digests by name"),
    )
    _check_manifest(path, manifest)
    return manifest, sha256_of_bytes(path.read_bytes())


def _pair(entry: object) -> tuple[str, str]:
    """A name and a digest, or two empty texts, which are refused as digests."""
    pair = entry if isinstance(entry, list) and len(entry) == 2 else ["", ""]
    return str(pair[0]), str(pair[1])


def _check_manifest(path: Path, manifest: Manifest) -> None:
    folds, axes = manifest.folds, manifest.mirror_axes
    plain = bool(folds) and all(isinstance(f, str) and _FOLD_NAME.fullmatch(f) for f in folds)
    finding = ""
    if not plain or len(set(folds)) < len(folds):
        finding = f"folds {list(folds)!r:.80}, expected distinct plain names"
    elif any(type(a) is not int for a in axes) or len(set(axes)) < len(axes):
        finding = f"mirror_axes {list(axes)!r:.80}, expected distinct axis numbers"
    elif set(manifest.files) != {PLANS, DATASET, *map(weights_name, folds)}:
        finding = f"files {sorted(manifest.files)!r:.200}, expected the JSON files and the weights of its folds"
    elif len(manifest.original) != len(folds):
        finding = f"{len(manifest.original)} originals, expected one a fold"
    elif not all(
        isinstance(digest, str) and _DIGEST.fullmatch(digest)
        for digest in (*manifest.files.values(), *(digest for _, digest in manifest.original), manifest.original_sha256)
    ):
        finding = "digests that are no sha256"
    if finding:
        raise ModelError(f"{path}: holds {finding}; {_AGAIN}")


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Raise ModelError unless a file of the copy is there with the digest that the manifest states."""
    try:
        if not stat.S_ISREG((folder / name).stat().st_mode):
            raise ModelError(f"{folder / name}: is no file; {_AGAIN}")
        found = sha256_of_file(folder / name)
    except OSError as error:
        raise ModelError(f"{folder / name}: cannot be read ({error.strerror}); {_AGAIN}") from error
    if found != manifest.files[name]:
        raise ModelError(
            f"{folder / name}: its sha256 is {found}, but {MANIFEST} states {manifest.files[name]}; the file was "
            f"changed or is damaged, so {_AGAIN}"
        )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by all of their names; a ModelError if it is none, or not of plain weights."""
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(_LARGEST_HEADER_BYTES, os.fstat(stream.fileno()).st_size - 8):
                raise ModelError(
                    f"{path}: its header would be {header_bytes} bytes, expected 2 to {_LARGEST_HEADER_BYTES} and less "
                    f"than the file; it is not a safetensors file, so {_AGAIN}"
                )
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); {_AGAIN}") from error
    except (SafetensorError, ValueError, TypeError, RuntimeError, LookupError, RecursionError) as error:
        finding = " ".join(str(error).split())
        raise ModelError(f"{path}: not a usable safetensors file ({finding:.160}); {_AGAIN}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelError(f"{path}: '{name:.80}' is of {tensor.dtype}, expected a dtype of weights; {_AGAIN}")
    if not isinstance(aliases, dict) or any(
        alias in tensors or not isinstance(name, str) or name not in tensors for alias, name in aliases.items()
    ):
        raise ModelError(f"{path}: its header gives names to tensors that are not there; {_AGAIN}")
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}
