"""Unfinished and finished work of an earlier version is gone on with: only what is missing is computed, to equal bytes.

``half_done`` and ``finished`` were made by the version before the package was rearranged; see ``make_golden.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from golden_cases import FINISHED, HALF_DONE, OUTPUT, RUNS, read_stamp, words_of

from connectomics.cli import main

ALLOWED = "system.allow_mixed_devices=true"
ELSEWHERE_SHARE = 1e-4  # of labels that another CPU or PyTorch may give otherwise


@dataclass(frozen=True)
class Golden:
    """The golden material of a job, and a folder in which its command is called again."""

    name: str
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / OUTPUT

    @property
    def half_done(self) -> Path:
        """The killed RUN folder."""
        (found,) = (HALF_DONE / self.name).iterdir()
        return found

    @property
    def run(self) -> Path:
        """The RUN folder of this call."""
        return self.output / self.half_done.name

    @property
    def results(self) -> list[Path]:
        """Files of an undisturbed run."""
        return sorted(path for path in (FINISHED / self.name).iterdir() if path.name.startswith(self.half_done.stem))

    @property
    def volume(self) -> Path:
        """That of them which is HDF5."""
        (found,) = (path for path in self.results if path.suffix == ".h5")
        return found

    def call(self, *more: str) -> int:
        return main([*words_of(RUNS[self.name]), *more])


@pytest.fixture(params=RUNS)
def golden(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.chdir(folder)
    (folder / OUTPUT).mkdir()
    return Golden(request.param, folder)


def recorded(run: Path) -> list[tuple[str, str]]:
    """Each line of the ledgers in a RUN folder that tells of a block: which ledger, and the line."""
    files = sorted(run.glob("*/ledger*/*.jsonl"))
    return [(path.parent.name, line) for path in files for line in path.read_text().splitlines()[1:]]


def class_of(run: Path) -> dict[str, Any]:
    """In which numeric class blocks were computed; empty for decoding, which has none."""
    headers = [json.loads(path.read_text()) for path in run.glob("*/ledger*/header.json")]
    numeric_class: dict[str, Any] = headers[0]["numeric_class"]
    return numeric_class


def test_only_the_missing_blocks_are_computed(golden: Golden) -> None:
    shutil.copytree(golden.half_done, golden.run)
    before = recorded(golden.run)
    device = class_of(golden.run).get("device")
    here = device in (None, f"cpu {torch.backends.cpu.get_cpu_capability()}")
    assert golden.call(*([] if here else [ALLOWED])) == 0

    report = json.loads((golden.run / "report.json").read_text())
    planned = json.loads((FINISHED / golden.name / "report.json").read_text())["planned"]
    assert 0 < len(before) < planned
    assert (report["planned"], report["skipped"], report["done"]) == (planned, len(before), planned - len(before))
    after = [(ledger, json.loads(line)["block"]) for ledger, line in recorded(golden.run)]
    assert len(set(after)) == len(after) == planned, "a block was computed twice, or none at all"
    assert set(before) < set(recorded(golden.run))
    assert len(list(golden.run.glob("*/ledger*/header.json"))) == len({ledger for ledger, _ in after})
    require_equal(golden, here=here)


def require_equal(golden: Golden, *, here: bool) -> None:
    """The results are those of the undisturbed run; bit for bit, where what computed is what computed then."""
    written = sorted(path.name for path in golden.output.iterdir() if path.is_file())
    assert written == [path.name for path in golden.results]
    stamp, before = read_stamp(golden.output / golden.volume.name), read_stamp(golden.volume)
    torch_now, torch_then = (content.pop("versions", {}).get("torch") for content in (stamp, before))
    exact = here and torch_now == torch_then
    if not here:
        assert stamp.pop("numeric_class") == "mixed"
        del before["numeric_class"]
    assert stamp == before
    with h5py.File(golden.output / golden.volume.name) as found, h5py.File(golden.volume) as whole:
        assert dict(found.attrs).keys() == dict(whole.attrs).keys()
        labels, expected = found["main"], whole["main"]
        assert (labels.shape, labels.dtype, labels.chunks) == (expected.shape, expected.dtype, expected.chunks)
        assert np.count_nonzero(expected[:]) > 0
        assert np.mean(labels[:] != expected[:]) <= (0 if exact else ELSEWHERE_SHARE)
    for path in golden.results:
        if path != golden.volume:
            assert (golden.output / path.name).read_bytes() == path.read_bytes()


def test_a_finished_result_is_skipped(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    for path in golden.results:
        shutil.copy(path, golden.output)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in golden.output.iterdir()}
    assert golden.call() == 0
    assert re.findall(r"(?m)^(?:done|skipped|failed) +(\d+)$", capsys.readouterr().out) == ["0", "1", "0"]
    assert not recorded(golden.run)
    assert {p.name: (p.stat().st_ino, p.read_bytes()) for p in golden.output.iterdir() if p.is_file()} == before


def test_a_finished_result_of_something_else_is_not_skipped(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    """So the one before is not skipped merely because it stands there."""
    for path in golden.results:
        shutil.copy(path, golden.output)
    other = "decoding=[{name: connected_components}]" if golden.name == "objects" else "inference.case=volume"
    assert golden.call(other) == 3
    assert "exists, but was made by another model, setting or input" in capsys.readouterr().out


def test_run_folder_and_result_are_of_the_same_run(golden: Golden) -> None:
    """The run key in the ledger is the one that the undisturbed run has stamped on its result."""
    headers = [json.loads(path.read_text()) for path in golden.half_done.glob("*/ledger*/header.json")]
    assert {header["run_key"] for header in headers} == {read_stamp(golden.volume)["run_key"]}
