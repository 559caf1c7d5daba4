"""The list of real files is well formed, and the scripts that fetch and check them can fail.

The files themselves are not in the repository; the long form checks them where CONNECTOMICS_REAL_FILES names a folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FORMATS = {
    "dm", "hdf5", "images", "ims", "mha", "mrc", "n5", "nd2", "nifti", "npy", "nrrd", "precomputed", "tiff", "wkw",
    "zarr", "zarr.zip",
}  # fmt: skip
LICENCES = {
    "AGPL-3.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "GPL-2.0", "GPL-3.0", "MIT", "MIT or Apache-2.0",
    "NIST software", "public domain",
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules."""
    names = ("real_file_list", "independent_readers", "check_real_files", "fetch_real_files")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            sys.modules.pop(name, None)


def test_list_is_well_formed(scripts: dict[str, ModuleType]) -> None:
    rows = scripts["real_file_list"].rows()
    assert len(rows) == len({row.name for row in rows})
    assert len({(row.origin.repository, row.origin.path) for row in rows}) >= 60
    assert sum({row.origin.path: int(row.origin.bytes) for row in rows}.values()) < 100e6
    for row in rows:
        origin, opening, contents = row.origin, row.opening, row.contents
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", origin.repository), row
        assert re.fullmatch("[0-9a-f]{40}", origin.commit), row
        assert re.fullmatch("[0-9a-f]{64}", origin.sha256), row
        assert int(origin.bytes) < 5e6, row
        assert origin.licence in LICENCES, row
        assert opening.format in FORMATS, row
        stated = set(dataclasses.astuple(contents))
        if opening.expected == "read":
            assert opening.reader in scripts["independent_readers"].READERS, row
            assert re.fullmatch("[0-9a-f]{64}", contents.values), row
            assert re.fullmatch(r"\d+(,\d+){3}", contents.shape), row
            np.dtype(contents.dtype)
        else:
            assert re.fullmatch("refused: .+", opening.expected), row
            assert (opening.reader, stated) == ("-", {"-"}), row


def test_formats_not_read_yet_are_in_the_list(scripts: dict[str, ModuleType]) -> None:
    formats = {row.opening.format for row in scripts["real_file_list"].rows()}
    assert scripts["check_real_files"].NOT_READ_YET - formats == set()


@pytest.fixture
def listed(tmp_path: Path, scripts: dict[str, ModuleType]) -> dict[str, Any]:
    """A folder with one array, the list of it, and its row filled by numpy."""
    place = tmp_path / "lab" / "data" / "cell.npy"
    place.parent.mkdir(parents=True)
    np.save(place, np.arange(24, dtype=">u2").reshape(2, 3, 4))
    kinds = scripts["real_file_list"]
    origin = kinds.Origin("lab/data", "0" * 40, "cell.npy", "-", "MIT", sha256="?", bytes="?")
    row = kinds.Row(origin, kinds.Opening("-", "-", "npy", "numpy", expected="read"), kinds.Contents(*"??????"))
    (row,) = scripts["check_real_files"].fill(tmp_path, [row])
    return {"folder": tmp_path, "row": row, "list": tmp_path / "list.tsv", "file": place}


def run(scripts: dict[str, ModuleType], listed: dict[str, Any], **changed: dict[str, str]) -> int:
    """The exit code for a list of the one row, with some cells changed."""
    row = listed["row"]
    parts = {name: dataclasses.replace(getattr(row, name), **cells) for name, cells in changed.items()}
    scripts["real_file_list"].write([dataclasses.replace(row, **parts)], listed["list"])
    code = scripts["check_real_files"].main([str(listed["folder"]), "--list", str(listed["list"])])
    assert isinstance(code, int)
    return code


def test_same_contents_pass(
    scripts: dict[str, ModuleType], listed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed["row"].contents.shape == "1,2,3,4"
    assert run(scripts, listed) == 0
    assert "1 same, 0 DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"origin": {"sha256": "0" * 64}}, "fetch it again"),
        ({"contents": {"values": "0" * 64}}, "other values"),
        ({"contents": {"shape": "1,2,4,3"}}, "shape 1,2,3,4, expected 1,2,4,3"),
        ({"contents": {"voxel_size_nm": "4,4,4"}}, "voxel_size_nm -, expected 4,4,4"),
        ({"contents": {"origin_nm": "1,0,0"}}, "origin_nm 0,0,0, expected 1,0,0"),
        ({"opening": {"expected": "refused: colour"}}, "expected a refusal with 'colour'"),
        ({"opening": {"axes": "zyxc"}}, "refused: "),
        ({"opening": {"format": "nrrd"}}, "take it out of NOT_READ_YET"),
        ({"origin": {"path": "absent.npy"}}, "1 absent"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value[:12],
)
def test_what_differs_fails(
    scripts: dict[str, ModuleType],
    listed: dict[str, Any],
    changed: dict[str, dict[str, str]],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scripts["check_real_files"], "NOT_READ_YET", frozenset({"nrrd"}))
    assert run(scripts, listed, **changed) == 1
    assert told in capsys.readouterr().out


def test_other_reader_that_disagrees_or_is_missing(
    scripts: dict[str, ModuleType],
    listed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def disagreeing(path: Path, inner: str | None, axes: str | None) -> object:
        return scripts["independent_readers"].Reading(np.zeros((1, 2, 3, 4), np.uint16))

    def missing(path: Path, inner: str | None, axes: str | None) -> object:
        raise ImportError("No module named 'numpy'")

    for reader, told in ((disagreeing, "numpy says other values"), (missing, "numpy is missing")):
        monkeypatch.setitem(scripts["check_real_files"].READERS, "numpy", reader)
        assert run(scripts, listed) == 1
        assert told in capsys.readouterr().out


def test_refusal_must_be_in_our_words(scripts: dict[str, ModuleType], listed: dict[str, Any]) -> None:
    listed["file"].write_bytes(b"no array")
    sha, _ = scripts["real_file_list"].digest(listed["folder"], listed["row"].origin)
    origin = {"sha256": sha}
    assert run(scripts, listed, origin=origin, opening={"expected": "refused: cell.npy"}) == 0
    assert run(scripts, listed, origin=origin, opening={"expected": "refused: another reason"}) == 1


def test_digest_of_a_folder_changes_with_any_file(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    kinds = scripts["real_file_list"]
    origin = kinds.Origin("lab/data", "0" * 40, "store", "beside.json", "MIT", sha256="?", bytes="?")
    (tmp_path / "lab/data/store/c").mkdir(parents=True)
    for name in ("store/c/0", "store/zarr.json", "beside.json"):
        (tmp_path / "lab/data" / name).write_text(name)
    before = kinds.digest(tmp_path, origin)
    assert before[1] == len("store/c/0" + "store/zarr.json" + "beside.json")
    for name in ("store/c/0", "beside.json"):
        (tmp_path / "lab/data" / name).write_text("else")
        assert kinds.digest(tmp_path, origin)[0] != before[0]
        (tmp_path / "lab/data" / name).write_text(name)
    assert kinds.digest(tmp_path, origin) == before


def test_fetch_takes_the_listed_paths_of_the_commit(
    scripts: dict[str, ModuleType], listed: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    public, target = listed["folder"] / "public" / "lab" / "data", listed["folder"] / "fetched"

    def git(*words: str) -> str:
        author = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *author, *words], cwd=public, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    public.mkdir(parents=True)
    git("init", "--quiet")
    (public / "cell.npy").write_bytes(listed["file"].read_bytes())
    (public / "other.txt").write_text("not wanted")
    git("add", ".")
    git("commit", "--quiet", "-m", "data")
    git("config", "uploadpack.allowFilter", "true")
    row = listed["row"]
    origin = dataclasses.replace(row.origin, commit=git("rev-parse", "HEAD"))
    scripts["real_file_list"].write([dataclasses.replace(row, origin=origin)], listed["list"])
    words = [str(target), "--list", str(listed["list"]), "--url"]
    assert scripts["fetch_real_files"].main([*words, f"file://{listed['folder']}/public/{{repository}}"]) == 0
    assert [path.name for path in (target / "lab/data").iterdir() if path.name != ".git"] == ["cell.npy"]
    assert scripts["check_real_files"].check(target, dataclasses.replace(row, origin=origin)) == ("same", "")
    assert scripts["fetch_real_files"].main([*words, f"file://{listed['folder']}/nowhere/{{repository}}"]) == 1
    capfd.readouterr()


@pytest.mark.long
def test_real_files_are_read_as_others_read_them() -> None:
    folder = os.environ.get("CONNECTOMICS_REAL_FILES")
    if not folder:
        pytest.skip("CONNECTOMICS_REAL_FILES names no folder; scripts/fetch_real_files.py fills one")
    command = [sys.executable, str(SCRIPTS / "check_real_files.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
