"""``connectomics config keys``: every key with its default and meaning, and the pages that are written from them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from connectomics.cli import main
from connectomics.config.load import known_keys, load_config
from connectomics.config.reference import KeyEntry, entries
from connectomics.core.errors import ConfigError

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
    (entry,) = entries("decoding[slice_linking].measure")
    assert (entry.plain, entry.allowed) == (
        "iou, or overlap over the smaller of the two.",
        "text; must be one of iou, overlap",
    )
    (entry,) = entries("decoding[filters].keep_largest")
    assert entry.plain.endswith("null for all.") and entry.allowed == "a whole number, or null; must be 1 or more"


def test_what_a_key_takes_is_told_as_it_is_refused() -> None:
    refused = {
        "system.seed": ("many", "a whole number"),
        "system.num_cpus": ("0", "must be 1 or more"),
        "model.folds": ("best", "each a fold is a number from 0 on, or all"),
        "inference.roi": ("4", "a list of lists, each of whole numbers, or null"),
        "inference.sliding_window.blending": ("linear", "must be one of gaussian, constant"),
        "inference.output.formats": ("[h5,h5]", "each value may stand only once"),
        "test.evaluation.metrics": (
            "[auc]",
            "each must be one of dice, iou, precision, recall, ap, f1, pq, voi, arand",
        ),
    }
    for key, (value, words) in refused.items():
        assert words in next(entry.allowed for entry in entries(key)), key
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"{key}={value}"])
        assert key in str(caught.value), key
        assert str(caught.value).endswith(words if words.startswith("each value") else words.removeprefix("each ")), key


def test_the_command_prints_what_begins_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "inference.output"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [k for k in known_keys() if k.startswith("inference.output")]
    assert main(["config", "keys", "--json"]) == 0
    told = {entry["key"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert told.keys() >= set(known_keys())
    assert told["inference.output.overwrite"]["allowed"] == "true or false"
    assert main(["config", "keys", "system.inference.num_w"]) == 0
    line = (
        "system.inference.num_workers = null  threads that read ahead in the survey; null: 1 [a whole number, or null; "
    )
    assert capsys.readouterr().out == f"{line}must be 1 or more]\n"
    assert main(["config", "keys", "inference.outptu"]) == 2
    assert "no key begins with 'inference.outptu'" in capsys.readouterr().err


def test_guide_and_tutorial_say_what_the_schema_says() -> None:
    words = [sys.executable, str(REPOSITORY / "scripts" / "write_config_pages.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_tutorial_gets_a_line_for_a_new_key_and_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    pages = importlib.import_module("write_config_pages")
    text = (REPOSITORY / "tutorials" / "nnunet_mito_inference.yaml").read_text()
    keys = [entry for entry in entries() if not entry.key.startswith("decoding[")]
    new = KeyEntry("inference.output.colour", "blue", "what colour it has", "text")
    place = 1 + [entry.key for entry in keys].index("inference.output.overwrite")
    written = pages.tutorial(text, [*keys[:place], new, *keys[place:]])
    before, after = OmegaConf.create(text), OmegaConf.create(written)
    assert after.inference.output.pop("colour") == "blue"
    assert after == before and "colour: blue                # what colour it has" in written
