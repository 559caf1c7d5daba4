"""Tampered and hostile inference-only copies: each is refused by one message with file and finding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.core.fingerprint import key_of, sha256_of_file
from connectomics.models.checkpoint import load_model
from connectomics.models.conversion import convert_model
from connectomics.models.locate import ModelRequest

from nnunet_models import make_model

WEIGHTS = "fold_0/weights.safetensors"
HEAD = "decoder.seg_layers.0.weight"


@pytest.fixture(scope="session")
def good_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good_copy")
    (place / "copy").mkdir()
    root = make_model(place, dimensions=2, patch=(16, 16), folds=("0", "1"), features=(4, 8))
    convert_model(ModelRequest(root), place / "copy")
    return place / "copy"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the manifest and, like a forger, bring its own digest up to date."""
    values = json.loads((root / "manifest.json").read_text())
    change(values)
    if sign:
        values.pop("sha256", None)
        values["sha256"] = key_of(values)
    (root / "manifest.json").write_text(json.dumps(values))


def sign_all(root: Path) -> None:
    """Bring every digest of the manifest up to date."""
    edit_manifest(root, lambda m: m.update(files={name: sha256_of_file(root / name) for name in m["files"]}))


def forge_json(root: Path, old: str, new: str, name: str = "plans.json") -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))
    sign_all(root)


def forge_file(root: Path, data: bytes) -> None:
    (root / WEIGHTS).write_bytes(data)
    sign_all(root)


def forge_header(root: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    forge_file(root, len(text).to_bytes(8, "little") + text + data)


def forge_weights(root: Path, change: Callable[[dict[str, torch.Tensor]], object], aliases: str | None = None) -> None:
    data = (root / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load_file(root / WEIGHTS)
    change(tensors)
    own = header["__metadata__"]["aliases"]
    save_file(tensors, root / WEIGHTS, metadata={"aliases": own if aliases is None else aliases})
    sign_all(root)


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def replaced_head(value: torch.Tensor) -> Callable[[Path], None]:
    return lambda root: forge_weights(root, lambda tensors: tensors.update({HEAD: value}))


@dataclass(frozen=True)
class Case:
    """``damage`` changes a good copy; loading it says every one of ``words``."""

    name: str
    damage: Callable[[Path], object]
    words: tuple[str, ...]
    error: type[ModelError] = ModelError


TAMPERED = [
    Case("one bit of the weights", lambda r: flip(r / WEIGHTS), (WEIGHTS, "its sha256 is", "manifest.json states")),
    Case("one letter of the plans", lambda r: flip(r / "plans.json"), ("plans.json", "its sha256 is")),
    Case("one letter of the dataset", lambda r: flip(r / "dataset.json"), ("dataset.json", "its sha256 is")),
    Case("weights cut short", lambda r: (r / WEIGHTS).write_bytes(b"123"), (WEIGHTS, "its sha256 is")),
    Case(
        "weights of another fold", lambda r: shutil.copy(r / "fold_1" / "weights.safetensors", r / WEIGHTS), (WEIGHTS,)
    ),
    Case("weights missing", lambda r: (r / WEIGHTS).unlink(), (WEIGHTS, "cannot be read")),
    Case("dataset missing", lambda r: (r / "dataset.json").unlink(), ("dataset.json", "cannot be read")),
    Case(
        "mirroring switched off",
        lambda r: edit_manifest(r, lambda m: m.update(mirror_axes=[]), sign=False),
        ("manifest.json", "was changed or is damaged"),
    ),
    Case(
        "another trainer",
        lambda r: edit_manifest(r, lambda m: m.update(trainer_name="nnUNetTrainerBN"), sign=False),
        ("manifest.json", "was changed or is damaged"),
    ),
    Case(
        "no digest of its own",
        lambda r: edit_manifest(r, lambda m: m.pop("sha256"), sign=False),
        ("manifest.json", "it states None"),
    ),
    Case(
        "manifest cut short",
        lambda r: (r / "manifest.json").write_text('{"format": '),
        ("manifest.json", "broken JSON"),
    ),
    Case("manifest is a list", lambda r: (r / "manifest.json").write_text("[]"), ("manifest.json", "holds a list")),
    Case("another program's manifest", lambda r: (r / "manifest.json").write_text("{}"), ("its format is None",)),
    Case(
        "manifest with a number JSON lacks",
        lambda r: (r / "manifest.json").write_text('{"format": "connectomics inference model 1", "a": NaN}'),
        ("manifest.json", "not plain"),
    ),
]
FORGED = [
    Case("another network", lambda r: forge_json(r, '"eps": 1e-05', '"eps": 0.5'), ("manifest.json", "identity")),
    Case("another original", lambda r: edit_manifest(r, lambda m: m.update(original_sha256="0" * 64)), ("identity",)),
    Case("another architecture", lambda r: edit_manifest(r, lambda m: m.update(architecture="x")), ("architecture",)),
    Case(
        "plans name os.system",
        lambda r: forge_json(r, "torch.nn.LeakyReLU", "os.system"),
        ("plans.json", "'nonlin' names 'os.system'"),
        UnsafeModelError,
    ),
    Case("fold leads outside", lambda r: edit_manifest(r, lambda m: m.update(folds=["../x", "1"])), ("folds ['../x'",)),
    Case("fold is a number", lambda r: edit_manifest(r, lambda m: m.update(folds=[0, 1])), ("folds [0, 1]",)),
    Case("fold twice", lambda r: edit_manifest(r, lambda m: m.update(folds=["0", "0"])), ("distinct",)),
    Case("no folds", lambda r: edit_manifest(r, lambda m: m.update(folds=[])), ("folds []",)),
    Case("folds missing", lambda r: edit_manifest(r, lambda m: m.pop("folds")), ("'folds' is missing",)),
    Case(
        "file leads outside",
        lambda r: edit_manifest(r, lambda m: m["files"].update({"../../etc/passwd": "0" * 64})),
        ("manifest.json", "files ['../../etc/passwd'"),
    ),
    Case(
        "weights not listed",
        lambda r: edit_manifest(r, lambda m: m["files"].pop(WEIGHTS)),
        ("manifest.json", "expected the JSON files"),
    ),
    Case(
        "digest that is none",
        lambda r: edit_manifest(r, lambda m: m["files"].update({WEIGHTS: 7})),
        ("manifest.json", "no sha256"),
    ),
    Case("original that is none", lambda r: edit_manifest(r, lambda m: m.update(original=[1, 2])), ("no sha256",)),
    Case("one original", lambda r: edit_manifest(r, lambda m: m["original"].pop()), ("1 originals",)),
    Case(
        "mirror axes", lambda r: edit_manifest(r, lambda m: m.update(mirror_axes=[0, "1"])), ("mirror_axes [0, '1']",)
    ),
    Case("mirror axis 5", lambda r: edit_manifest(r, lambda m: m.update(mirror_axes=[5])), ("2 axes",)),
    Case("unknown trainer", lambda r: edit_manifest(r, lambda m: m.update(trainer_name="X")), ("unknown trainer 'X'",)),
    Case(
        "configuration", lambda r: edit_manifest(r, lambda m: m.update(configuration="3d")), ("no configuration '3d'",)
    ),
]
HOSTILE_WEIGHTS = [
    Case("empty file", lambda r: forge_file(r, b""), (WEIGHTS, "header would be 0 bytes")),
    Case("header of 8 EB", lambda r: forge_file(r, b"\xff" * 8 + b"{}"), (WEIGHTS, "header would be 184467440737")),
    Case("header longer than the file", lambda r: forge_file(r, b"\xff\0\0\0\0\0\0\0{}"), (WEIGHTS, "would be 255")),
    Case(
        "header of 17 MB",
        lambda r: forge_header(r, b'{"a": "' + b"x" * (17 << 20) + b'"}'),
        (WEIGHTS, "expected 2 to 16777216"),
    ),
    Case("header that is no JSON", lambda r: forge_header(r, b"\x80\x04os\nsystem\n"), (WEIGHTS, "not a usable")),
    Case("header that is a list", lambda r: forge_header(r, []), (WEIGHTS, "not a usable")),
    Case("a deep header", lambda r: forge_header(r, b'{"a":' + b"[" * 90_000), (WEIGHTS, "not a usable")),
    Case(
        "overlapping tensors",
        lambda r: forge_header(r, {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "a hole between tensors",
        lambda r: forge_header(r, {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [1], 12, 16)}, bytes(16)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "offsets beyond the file",
        lambda r: forge_header(r, {"a": tensor("F32", [1 << 40], 0, 1 << 42)}, bytes(8)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "backward offsets",
        lambda r: forge_header(r, {"a": tensor("F32", [2], 8, 0)}, bytes(8)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "a shape whose product overflows",
        lambda r: forge_header(r, {"a": tensor("F32", [1 << 62, 1 << 62], 0, 8)}, bytes(8)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "a shape other than its bytes",
        lambda r: forge_header(r, {"a": tensor("F32", [3], 0, 8)}, bytes(8)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "bytes after the last tensor",
        lambda r: forge_header(r, {"a": tensor("F32", [2], 0, 8)}, bytes(99)),
        (WEIGHTS, "not a usable"),
    ),
    Case(
        "a dtype nobody has",
        lambda r: forge_header(r, {"a": tensor("PICKLE", [2], 0, 8)}, bytes(8)),
        (WEIGHTS, "not a usable"),
    ),
    Case("short integers", replaced_head(torch.ones(2, 4, 1, 1, dtype=torch.int16)), (HEAD, "int16")),
    Case("eight bit floats", replaced_head(torch.ones(2, 4, 1, 1).to(torch.float8_e5m2)), (HEAD, "float8")),
    Case("whole numbers", replaced_head(torch.ones(2, 4, 1, 1, dtype=torch.int64)), (HEAD, "int64", "do not fit")),
    Case("another shape", replaced_head(torch.ones(2, 5, 1, 1)), (HEAD, "[2, 5, 1, 1]", "do not fit")),
    Case("not a number", replaced_head(torch.full((2, 4, 1, 1), float("nan"))), (HEAD, "not finite")),
    Case("a weight missing", lambda r: forge_weights(r, lambda t: t.pop(HEAD)), (HEAD, "is missing")),
    Case("names of nothing", lambda r: forge_weights(r, dict.copy, '{"a": "b"}'), (WEIGHTS, "not there")),
    Case("names of names", lambda r: forge_weights(r, dict.copy, '{"a": ["b"]}'), (WEIGHTS, "not there")),
    Case("names that are a list", lambda r: forge_weights(r, dict.copy, "[1]"), (WEIGHTS, "not there")),
    Case("names that are no JSON", lambda r: forge_weights(r, dict.copy, "{"), (WEIGHTS, "not a usable")),
    Case(
        "a name twice",
        lambda r: forge_weights(r, dict.copy, json.dumps({HEAD: "decoder.seg_layers.0.bias"})),
        (WEIGHTS, "not there"),
    ),
]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in (*TAMPERED, *FORGED, *HOSTILE_WEIGHTS)])
def test_is_refused_with_a_reason(case: Case, good_copy: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_copy, tmp_path / "copy")
    case.damage(root)
    with pytest.raises(ModelError) as caught:
        load_model(ModelRequest(root))
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    for word in ("copy/", *case.words):
        assert word in message
    assert "\n" not in message
    assert len(message) < 900


def test_the_helpers_do_no_harm_themselves(good_copy: Path, tmp_path: Path) -> None:
    """A copy that was rewritten and signed but not changed loads: the refusals are not refusals of the forger's pen."""
    root = shutil.copytree(good_copy, tmp_path / "copy")
    forge_weights(root, dict.copy)
    assert load_model(ModelRequest(root)).spec.folds == ("0", "1")


def test_trust_does_not_switch_the_digests_off(good_copy: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_copy, tmp_path / "copy")
    flip(root / WEIGHTS)
    with pytest.raises(ModelError, match=r"manifest\.json states"):
        load_model(ModelRequest(root, trust_code=True))
