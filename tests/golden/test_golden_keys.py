"""Result and run keys stay what they were: whatever users have finished or begun is still known.

``keys.json`` was made by the version before the package was rearranged; see ``make_golden.py``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from answers import once_a_shape
from golden_cases import CASES, KEYS, PROGRAM, derived_keys, differences, run_case

GOLDEN: dict[str, Any] = json.loads(KEYS.read_text())
CONFIGURATIONS: dict[str, dict[str, Any]] = GOLDEN["configurations"]
LABELS = "phantom_2x64x64_seed_7_labels.run"
UNDECIDING = {"two windows a batch, of OpenVINO", "stated blocks", "every format", "another suffix and name"}
"""Settings that do not decide the result: their result key is that of "smaller windows"."""


@pytest.mark.parametrize("name", CASES)
def test_keys_are_the_golden_ones(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    once_a_shape(monkeypatch)  # no key depends on what a network finds
    found = run_case(CASES[name], folder)
    assert list(found) == list(CONFIGURATIONS[name])
    for run, described in found.items():
        told = differences(described, CONFIGURATIONS[name][run])
        assert not told, f"configuration '{name}', {run}:\n" + "\n".join(told)


def test_each_configuration_has_its_keys() -> None:
    assert list(CONFIGURATIONS) == list(CASES)
    assert len(CASES) >= 40
    assert GOLDEN["program"] == PROGRAM == "connectomics 0.1.0"


@pytest.mark.parametrize("name", CASES)
def test_golden_keys_are_the_sha256_of_their_facts(name: str) -> None:
    """Computed by hashlib alone: result key of the facts, run key of result keys, block grid and program."""
    for described in CONFIGURATIONS[name].values():
        assert derived_keys(described) == (described["result_keys"], described["run_key"])


def test_what_decides_the_result_makes_another_key_and_nothing_else_does() -> None:
    keys = {name: json.dumps([run["result_keys"] for run in runs.values()]) for name, runs in CONFIGURATIONS.items()}
    same = {name for name in keys if keys[name] == keys["smaller windows"]}
    others = [key for name, key in keys.items() if name not in same]
    assert same == UNDECIDING | {"smaller windows"}
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blending": "constant"}, "the fact blending is 'gaussian', golden is 'constant'"),
        ({"shade": 1}, "the fact shade is 'absent', golden is 1"),
        ({}, "all known facts are the golden ones; tint is new in provenance.json"),
    ],
)
def test_a_changed_key_names_the_fact(change: dict[str, Any], told: str) -> None:
    found = CONFIGURATIONS["smaller windows"][LABELS] | {"unknown": ["tint"], "program": PROGRAM}
    golden = copy.deepcopy(found)
    assert differences(found, golden) == []
    golden["facts"] |= change
    golden["result_keys"] = {"labels": "0" * 64}
    first, *_, last = differences(found, golden)
    assert first.startswith("result_keys is ")
    assert told in last
