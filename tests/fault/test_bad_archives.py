"""Hostile and broken exported zips: each is refused by one message with file and finding, nothing written outside."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.models import archive
from connectomics.models.checkpoint import load_model
from connectomics.models.locate import ModelRequest

from nnunet_models import make_model

FOLDER = "nnUNetTrainer__nnUNetPlans__2d"
CHECKPOINT = f"{FOLDER}/fold_0/checkpoint_final.pth"


@pytest.fixture(scope="session")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good export by name."""
    place = tmp_path_factory.mktemp("good_archive")
    root = make_model(place, dimensions=2, patch=(16, 16), features=(4, 8))
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def pack(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


def add(path: Path, name: str, data: bytes = b"x", mode: int = 0) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(info, data)


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def edit(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    change(entries)
    path.unlink()
    pack(path, entries)


def encrypt(path: Path) -> None:
    """Set the flag that says that every entry is encrypted."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def declare_size(path: Path, size: int, name: bytes) -> None:
    """Have the directory say that an entry unpacks to another size."""
    data = bytearray(path.read_bytes())
    at = data.rfind(name) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 24 : at + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)


class Calls:
    """Unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@dataclass(frozen=True)
class Case:
    """``damage`` changes a good zip; loading it says every one of ``words``."""

    name: str
    damage: Callable[[Path], object]
    words: tuple[str, ...]
    error: type[ModelError] = ModelError


def duplicate(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        add(path, CHECKPOINT)


CASES = [
    Case("climbs out", lambda z: add(z, "../marker"), ("'../marker' leads outside", "nothing was unpacked")),
    Case("climbs out from within", lambda z: add(z, f"{FOLDER}/../../marker"), ("leads outside",)),
    Case("checkpoint that climbs out", lambda z: add(z, "../x/fold_0/checkpoint_final.pth"), ("leads outside",)),
    Case("absolute name", lambda z: add(z, "/tmp/marker"), ("'/tmp/marker' leads outside",)),
    Case("drive letter", lambda z: add(z, "C:/marker"), ("leads outside",)),
    Case("backslashes", lambda z: add(z, "..\\marker"), ("read differently",)),
    Case("empty part", lambda z: add(z, f"{FOLDER}//plans.json"), ("leads outside",)),
    Case("dot", lambda z: add(z, f"{FOLDER}/./plans.json"), ("leads outside",)),
    Case(
        "name with a NUL",
        lambda z: [add(z, "harmless_marker"), replace_bytes(z, b"harmless_marker", b"harmless\0marker")],
        ("read differently",),
    ),
    Case("name with a newline", lambda z: add(z, "a\nb"), ("read differently",)),
    Case("symbolic link", lambda z: add(z, f"{FOLDER}/l", b"/etc/passwd", stat.S_IFLNK | 0o777), ("a link",)),
    Case("device", lambda z: add(z, f"{FOLDER}/fold_0/null", b"", stat.S_IFCHR | 0o666), ("a device",)),
    Case("the same name twice", duplicate, (CHECKPOINT, "twice")),
    Case("encrypted", encrypt, ("is encrypted",)),
    Case(
        "a bomb of zeros as the checkpoint",
        lambda z: edit(z, lambda e: e.update({CHECKPOINT: bytes(1 << 24)})),
        (CHECKPOINT, "16777216 bytes", "200 times"),
    ),
    Case(
        "JSON of 70 MB",
        lambda z: edit(z, lambda e: e.update({f"{FOLDER}/plans.json": b"[0.123, " * (9 << 20)})),
        ("plans.json", "would unpack to", "67108864"),
    ),
    Case(
        "checkpoint larger than it says",
        lambda z: declare_size(z, 100, CHECKPOINT.encode()),
        ("the archive is damaged", "CRC"),
    ),
    Case(
        "checkpoint smaller than it says",
        lambda z: declare_size(z, 200_000, CHECKPOINT.encode()),
        (CHECKPOINT, "damaged"),
    ),
    Case("no checkpoint", lambda z: edit(z, lambda e: e.pop(CHECKPOINT)), ("no training folder", "found: none")),
    Case("no plans", lambda z: edit(z, lambda e: e.pop(f"{FOLDER}/plans.json")), ("plans.json", "lacks this file")),
    Case("empty file", lambda z: z.write_bytes(b""), ("damaged, cut short or no zip file",)),
    Case("text", lambda z: z.write_text("<html>404</html>"), ("no zip file",)),
    Case("cut in half", lambda z: z.write_bytes(z.read_bytes()[:9000]), ("cut short",)),
    Case(
        "damaged within",
        lambda z: z.write_bytes(z.read_bytes()[:3000] + bytes(200) + z.read_bytes()[3200:]),
        ("damaged",),
    ),
    Case(
        "unknown compression",
        lambda z: replace_bytes(z, b"\x08\x00", b"\x63\x00"),
        ("compression",),
    ),
    Case(
        "checkpoint that calls os.system",
        lambda z: edit(z, lambda e: e.update({CHECKPOINT: pickle.dumps(Calls(f"touch '{z.parent}/marker'"))})),
        (CHECKPOINT, f"{os.name}.system", "model.trust_code"),
        UnsafeModelError,
    ),
    Case(
        "plans that name os.system",
        lambda z: edit(
            z,
            lambda e: e.update(
                {n: d.replace(b"torch.nn.LeakyReLU", b"os.system") for n, d in e.items() if n.endswith("plans.json")}
            ),
        ),
        ("plans.json", "'nonlin' names 'os.system'"),
        UnsafeModelError,
    ),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_is_refused_and_nothing_is_left(
    case: Case, entries: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    archive_path = tmp_path / "model.zip"
    pack(archive_path, entries)
    assert load_model(ModelRequest(archive_path)).spec.folds == ("0",)
    case.damage(archive_path)
    with pytest.raises(ModelError) as caught:
        load_model(ModelRequest(archive_path))
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert str(archive_path) in message
    for word in case.words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 700
    assert list(temporary.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.zip", "temporary"]


def test_too_many_entries(entries: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "model.zip", entries)
    monkeypatch.setattr(archive, "_MOST_MEMBERS", 2)
    with pytest.raises(ModelError, match="holds 3 entries, expected at most 2"):
        load_model(ModelRequest(tmp_path / "model.zip"))


def test_a_path_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(ModelRequest(tmp_path / ("x" * 300 + ".zip")))


def test_a_folder_that_is_named_like_a_zip_is_a_folder(tmp_path: Path) -> None:
    root = make_model(tmp_path / "made", dimensions=2, patch=(16, 16), features=(4, 8))
    copied = shutil.copytree(root, tmp_path / "model.zip")
    assert load_model(ModelRequest(copied)).spec.folds == ("0",)
