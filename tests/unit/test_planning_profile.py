"""What tune measured: kept whole, of one model and machine, absent when damaged, and picked up by auto alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuned import keep_profile, torch_trial

from connectomics.assembly.engine.backends import as_begun
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import build_engine, make_engine
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.settings import model_settings, resolve
from connectomics.cli import main
from connectomics.config.load import load_config
from connectomics.config.schema import Config, DataConfig, ModelConfig
from connectomics.core.errors import ConfigError, OutputError
from connectomics.forecast.tune import table, tune
from connectomics.lightning.inference import InferenceManager
from connectomics.planning import profile as profiles
from connectomics.planning.profile import Profile, Trial, load_profile, profile_path

from nnunet_models import make_model
from small_jobs import em_like, infer_words, quick_folder, write_h5

BATCH = "inference.sliding_window.sw_batch_size"
SLOW = Trial("openvino", "exact", 1, 1, 0.2, 1.0, 0.0, "", 0.19, 0.21)
FAST = Trial("torch", "exact", 1, 1, 0.1, 2.0, 0.0, "", 0.09, 0.11)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        make_model(place / "model", dimensions=2, patch=(16, 32), features=(4, 8), classes=3)
        write_h5(place / "v.h5", em_like((2, 24, 40)))
        yield place


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    return tmp_path / "cache"


def words(cache: Path, *more: str) -> list[str]:
    return ["system.device=cpu", f"system.cache_dir='{cache}'", *more]


def model_in(folder: Path) -> Path:
    (found,) = (folder / "model").iterdir()
    return found


def keep(folder: Path, cache: Path, *trials: Trial) -> Path:
    return keep_profile(cache, model_in(folder), *trials)


def engine_of(folder: Path, cache: Path, *more: str) -> Engine:
    return build_engine(load_config(None, words(cache, *more)), model_in(folder))


def kind(engine: Engine) -> tuple[object, object]:
    found = engine.settings.numeric_class
    return str(found["backend"]).split()[0], found["threads"]


def test_what_is_kept_is_found_again_whole(folder: Path, cache: Path) -> None:
    failed = Trial("compile", "fast", 1, 2, reason="no compiler")
    path = keep(folder, cache, SLOW, FAST, failed)
    assert load_profile(path) == Profile((SLOW, FAST, failed))
    assert [file.name for file in cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 1}', '{"version": 1, "trials": [{}]}', '{"version": 1, "trials": [1]}'],
)
def test_damage_counts_as_absent(folder: Path, cache: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = keep(folder, cache, FAST)
    path.write_text(text)
    assert load_profile(path) is None
    assert "run connectomics tune again" in caplog.text
    path.unlink()
    caplog.clear()
    assert load_profile(path) is None and not caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "magic"},
        {"threads": 0},
        {"window_s": -1.0},
        {"batch": "1"},
        {"precision": "double"},
        {"slow_s": "1"},
    ],
)
def test_values_that_cannot_be_count_as_damage(folder: Path, cache: Path, change: dict[str, Any]) -> None:
    path = keep(folder, cache, FAST)
    content = json.loads(path.read_text())
    content["trials"][0] |= change
    path.write_text(json.dumps(content))
    assert load_profile(path) is None


def test_another_version_model_patch_or_machine_is_not_taken(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keep(folder, cache, FAST)
    (_, model), *_ = load_models(model_settings(ModelConfig(), DataConfig(), model_in(folder)))
    other = replace(model.spec, sha256="0" * 64)
    assert profile_path(cache, [other], [model.spec.patch_shape], "cpu") != path
    assert profile_path(cache, [model.spec], [(1, 16, 16)], "cpu") != path
    monkeypatch.setattr(profiles, "_processor", lambda: "another")
    assert profile_path(cache, [model.spec], [model.spec.patch_shape], "cpu") != path
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    assert load_profile(path) is None


def test_auto_takes_what_was_measured_to_be_fastest_and_nothing_else_does(folder: Path, cache: Path) -> None:
    pytest.importorskip("openvino")
    assert kind(engine_of(folder, cache, "system.backend=auto", "system.num_cpus=1")) == ("openvino", 1)
    keep(folder, cache, SLOW, FAST, replace(FAST, backend="openvino", threads=2, window_s=0.01))
    assert kind(engine_of(folder, cache, "system.backend=auto", "system.num_cpus=1")) == ("torch", 1)
    assert kind(engine_of(folder, cache, "system.backend=auto")) == ("openvino", 2)
    assert kind(engine_of(folder, cache, "system.backend=openvino", "system.num_cpus=1")) == ("openvino", 1)
    assert kind(engine_of(folder, cache, "system.num_cpus=1")) == ("torch", 1)


def test_a_run_says_what_auto_took_and_keeps_it(
    folder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder, cache, FAST)
    stated = words(cache, "system.backend=auto")
    assert main(infer_words(model_in(folder), tmp_path / "out", folder / "v.h5", *stated)) == 0
    assert (
        "system.backend=auto: backend torch, precision exact, batch 1, threads 1, device cpu" in capsys.readouterr().err
    )
    made = json.loads((tmp_path / "out" / "v_labels.run" / "provenance.json").read_text())
    assert made["numeric_class"]["backend"] == "torch"


def test_only_the_stated_precision_and_batch_count_and_exact_must_be_exact(folder: Path, cache: Path) -> None:
    fast, four = replace(SLOW, precision="fast", window_s=0.001), replace(SLOW, batch=4, window_s=0.001)
    wrong = replace(SLOW, window_s=0.001, disagreement=0.01)
    failed = replace(SLOW, window_s=None, reason="it failed")
    assert Profile((fast, four, wrong, failed, SLOW, FAST)).fastest("exact", 1, None) == (FAST, SLOW)
    assert Profile((SLOW, fast)).fastest("fast", 1, 1) == (fast,)
    assert Profile((SLOW, fast)).fastest("fast", 1, 2) == ()


@pytest.mark.parametrize(
    ("four_s", "slow_s", "batch"),
    [(0.094, 0.0899, 4), (0.096, 0.0899, 1), (0.094, 0.0901, 1), (0.01, 0.0901, 1), (0.2, 0.3, 1), (0.01, None, 1)],
)
def test_a_batch_that_is_open_is_one_unless_another_is_faster_by_more_than_noise(
    four_s: float, slow_s: float | None, batch: int
) -> None:
    """Nine in ten passes of one window took 0.09 s or more."""
    trials = (replace(FAST, batch=4, window_s=four_s, slow_s=slow_s), FAST, replace(SLOW, batch=4), SLOW)
    assert Profile(trials).fastest("exact", None, None)[0].batch == batch
    assert Profile(trials).fastest("exact", None, None, "openvino")[0].backend == "openvino"
    assert Profile(trials).fastest("exact", 4, None)[0].batch == 4
    assert Profile((trials[0],)).fastest("exact", None, None) == (), "nothing says that it is faster than one"


def test_the_batch_that_was_measured_to_be_fastest_is_taken_where_none_is_stated(folder: Path, cache: Path) -> None:
    """Not for another precision, other threads, arrays in memory, or what is promised to be equal to nnU-Net."""
    eight = [torch_trial(n, s, precision="fast") for n, s in ((1, 0.02), (8, 0.01))]
    keep(folder, cache, torch_trial(1, 0.1), torch_trial(4, 0.05), *eight)
    one, auto, fast = "system.num_cpus=1", "system.backend=auto", "inference.precision=fast"
    engine = engine_of(folder, cache, one, auto)
    assert (engine.settings.numeric_class["batch"], engine.models[0].window.batch) == (4, 4)
    assert kind(engine) == ("torch", 1)
    expected = [((auto, f"{BATCH}=1"), 1), ((auto, f"{BATCH}=2"), 2), ((auto, "system.num_cpus=2"), 1)]
    for words_, batch in [*expected, ((), 1), (("system.backend=torch", fast), 8)]:
        assert engine_of(folder, cache, one, *words_).models[0].window.batch == batch, words_
    manager = InferenceManager(load_config(None, words(cache, one)), model_in(folder))
    assert manager.engine.models[0].window.batch == 1


def test_without_a_profile_a_window_is_computed_at_a_time(folder: Path, cache: Path) -> None:
    engine = engine_of(folder, cache, "system.num_cpus=1")
    assert (engine.settings.numeric_class["batch"], engine.models[0].window.batch) == (1, 1)


def test_a_batch_that_takes_half_of_the_budget_is_not_taken(folder: Path, cache: Path) -> None:
    keep(folder, cache, torch_trial(1, 0.1), torch_trial(4, 0.05))
    four_gb = 4 * 16 * 32 * 4 * 10 * 4 / 1e9  # windows, voxels, features of the first layer, maps, bytes
    for budget, batch in ((2.01 * four_gb, 4), (1.99 * four_gb, 1)):
        words_ = "system.backend=auto", f"system.memory_budget_gb={budget:.9f}"
        assert engine_of(folder, cache, "system.num_cpus=1", *words_).models[0].window.batch == batch


def test_a_batch_decides_no_result_key(folder: Path, cache: Path) -> None:
    alone = engine_of(folder, cache, "system.num_cpus=1", "system.backend=auto").identity.facts
    keep(folder, cache, torch_trial(1, 0.1), torch_trial(4, 0.05))
    assert dict(engine_of(folder, cache, "system.num_cpus=1", "system.backend=auto").identity.facts) == dict(alone)


def test_a_measured_backend_that_is_gone_gives_way_to_the_next(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    keep(folder, cache, replace(FAST, backend="compile", window_s=0.01), FAST)
    engine = engine_of(folder, cache, "system.backend=auto", "system.num_cpus=1")
    assert kind(engine) == ("torch", 1)
    assert "compile was not taken" in engine.identity.notes[0]


def as_it_began(config: Config, begun: Mapping[str, object], folder: Path) -> Engine:
    stated = resolve(config, model_in(folder))
    return make_engine(replace(stated, networks=as_begun(stated.networks, begun)))


def test_unfinished_work_keeps_what_it_was_begun_with_whatever_is_measured_later(folder: Path, cache: Path) -> None:
    config = load_config(None, words(cache, "system.backend=auto"))
    begun = dict(build_engine(config, model_in(folder)).settings.numeric_class)
    keep(folder, cache, replace(FAST, threads=7, window_s=1e-6))
    assert kind(build_engine(config, model_in(folder)))[1] == 7
    assert dict(as_it_began(config, begun, folder).settings.numeric_class) == begun
    keep(folder, cache, replace(FAST, threads=7), replace(FAST, threads=7, batch=4, window_s=1e-6, slow_s=1e-6))
    assert build_engine(config, model_in(folder)).models[0].window.batch == 4
    assert dict(as_it_began(config, begun, folder).settings.numeric_class) == begun


def test_tune_measures_tells_and_keeps(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("CXX", "no-such-compiler")
    heard: list[tuple[int, int, str]] = []
    config = load_config(None, words(cache, "system.num_cpus=1"))
    found = tune(config, model_in(folder), str(folder / "v.h5"), 60.0, lambda *each: heard.append(each))
    trials = found.profile.trials
    first = trials[0]
    assert (first.backend, first.precision, first.batch, first.ratio, first.disagreement) == ("torch", "exact", 1, 1, 0)
    assert found.path is not None and load_profile(found.path) == found.profile
    exact = [t for t in trials if t.window_s and t.precision == "exact"]
    assert {(t.backend, t.batch) for t in exact} == {(b, n) for b in ("torch", "openvino") for n in (1, 4)}
    assert all(t.disagreement is not None and t.disagreement < 1e-3 for t in exact)
    assert all(t.quick_s and t.window_s and t.slow_s and t.quick_s <= t.window_s <= t.slow_s for t in exact)
    failed = {t.backend: t.reason for t in trials if t.window_s is None}
    assert "needs a C++ compiler" in failed["compile"]
    assert heard[-1][0] == heard[-1][1] > len(trials)
    lines = table(found)
    assert lines[0].split()[-3:] == ["windows/s", "ratio", "disagreement"]
    assert any(line.startswith("compile") and "needs a C++ compiler" in line for line in lines)


def test_tune_leaves_out_what_there_is_no_time_for(folder: Path, cache: Path) -> None:
    config = load_config(None, words(cache, "system.num_cpus=1"))
    found = tune(config, model_in(folder), str(folder / "v.h5"), 1e-9, lambda *each: None)
    assert found.profile.trials[0].window_s
    assert all("--seconds 1e-09 did not suffice" in t.reason for t in found.profile.trials[1:])
    with pytest.raises(ConfigError, match="--seconds is 0, expected more than 0"):
        tune(config, model_in(folder), str(folder / "v.h5"), 0, lambda *each: None)


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written .*set system.cache_dir"):
        keep(folder, tmp_path / "file" / "cache", FAST)
