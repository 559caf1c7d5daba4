"""How the configuration decides backend, precision, threads and cache; and fast held to exact on arrays in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.assembly.engine.backends import as_begun, kind_of
from connectomics.assembly.settings import network_settings
from connectomics.config.load import load_config
from connectomics.core.errors import AgreementError
from connectomics.lightning.inference import InferenceManager
from connectomics.models.backends.precisions import EXACT, FAST
from connectomics.stages.predict.precision_check import FastContract

from nnunet_models import make_model
from small_jobs import em_like

BATCH = "inference.sliding_window.sw_batch_size"
BEGUN = {"backend": "openvino 2026.4.1", "precision": "exact", "batch": 1, "threads": 7, "device": "cpu AVX512"}


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(None, [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert network_settings(config).cache == tmp_path / "connectomics"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", "/nowhere/user")
        assert network_settings(config).cache == Path("/nowhere/user/.cache/connectomics")
    assert network_settings(load_config(None, [f"system.cache_dir='{tmp_path}'"])).cache == tmp_path

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert network_settings(config).cache is None


def test_what_is_left_open_is_taken_from_what_was_begun_and_nothing_else() -> None:
    auto = as_begun(network_settings(load_config(None, ["system.backend=auto"])), BEGUN)
    assert (auto.backend, auto.threads) == ("openvino", 7)
    for stated in ("system.num_cpus=2", "system.inference.num_cpus=2"):
        networks = network_settings(load_config(None, ["system.backend=torch", f"{BATCH}=1", stated]))
        assert as_begun(networks, BEGUN) == networks
        assert as_begun(networks, BEGUN | {"batch": 4}) == networks
    for batch in (1, 4):
        assert as_begun(network_settings(load_config(None, [])), BEGUN | {"batch": batch}).batch == batch
    assert kind_of(BEGUN) == "openvino"


def test_precision_is_nnunets_where_it_is_not_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_settings(load_config(None, ["system.device=cpu"])).precision is EXACT
    assert network_settings(load_config(None, ["system.device=cpu", "inference.precision=fast"])).precision is FAST
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert network_settings(load_config(None, [])).precision is FAST
    assert network_settings(load_config(None, ["inference.precision=exact"])).precision is EXACT


def test_threads_are_those_of_this_process_and_at_most_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_settings(load_config(None, ["system.num_cpus=11"])).threads == 11
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert network_settings(load_config(None, [])).threads == 8


def test_arrays_are_held_to_the_contract_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, dimensions=2, patch=(16, 16), features=(4, 8))
    words = ["system.device=cpu", "system.num_cpus=1", "inference.precision=fast"]
    image = em_like((40, 50))
    with pytest.raises(AgreementError, match=r"the image: .*set inference.precision=exact"):
        InferenceManager.from_checkpoint(model, [*words, "inference.max_disagreement=0"]).predict(image)
    lenient = InferenceManager.from_checkpoint(model, [*words, "inference.max_disagreement=1"])
    labels = lenient.predict(image).labels
    monkeypatch.setattr(FastContract, "measure", None)
    assert np.array_equal(lenient.predict(image).labels, labels)
    exact = InferenceManager.from_checkpoint(model, words[:2])
    assert exact.engine.reference is None and "precision" not in exact.engine.identity.facts
    assert dict(lenient.engine.identity.facts) == dict(exact.engine.identity.facts) | {"precision": "fast"}
