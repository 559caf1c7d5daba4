"""``connectomics config keys``: every key with its default and meaning, and the pages that are written from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from connectomics.cli import main
from connectomics.config.load import known_keys, load_config
from connectomics.config.reference import entries

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_key_is_told_with_a_default_that_the_program_takes(tmp_path: Path) -> None:
    told = [entry for entry in entries() if not entry.key.startswith("decoding[")]
    assert [entry.key for entry in told] == list(known_keys())
    for entry in told:
        stated = {"null": "null", '""': '""'}.get(entry.default, entry.default)
        assert load_config(None, [f"{entry.key}={stated}"]) == load_config(None, []), entry.key
        assert entry.plain and "](" not in entry.plain and "`" not in entry.plain


def test_keys_of_steps_are_told_too() -> None:
    told = {entry.key: entry.default for entry in entries("decoding[")}
    assert told["decoding[connected_components].connectivity"] == "26"
    assert told["decoding[filters].max_voxels"] == "null"


def test_the_command_prints_what_begins_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "inference.output"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [k for k in known_keys() if k.startswith("inference.output")]
    assert main(["config", "keys", "--json"]) == 0
    assert {entry["key"] for entry in json.loads(capsys.readouterr().out)} >= set(known_keys())
    assert main(["config", "keys", "inference.outptu"]) == 2
    assert "no key begins with 'inference.outptu'" in capsys.readouterr().err


def test_guide_and_tutorial_say_what_the_schema_says() -> None:
    words = [sys.executable, str(REPOSITORY / "scripts" / "write_config_pages.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
