"""A run goes on with the backend and threads it was begun with, or is refused; fast is measured once a run."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from tuned import keep_profile, torch_trial

from connectomics.assembly.engine import backends
from connectomics.cli import main
from connectomics.core.geometry import Vec3
from connectomics.inference.predictor import RollingPredictor
from connectomics.models.backends import cached, torch_eager
from connectomics.models.backends.contract import Backend
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.planning.memory import Footprint, Work
from connectomics.stages.predict.precision_check import FastContract

from nnunet_models import make_model
from small_jobs import em_like, finals, infer_words, quick_folder, write_h5

CUT = "inference.block_shape=[1,24,32]"
AUTO = "system.backend=auto"
FAST = ("inference.precision=fast", "inference.max_disagreement=1")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        make_model(made / "model", dimensions=2, patch=(16, 16), features=(4, 8), mirror_axes=())
        write_h5(made / "v.h5", em_like((2, 24, 32)))
        yield made


def run(folder: Path, output: Path, *words: str) -> int:
    (model,) = (folder / "model").iterdir()
    return main(infer_words(model, output, folder / "v.h5", CUT, *words))


def provenance(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "v_labels.run" / "provenance.json").read_text())
    return content


def begin(folder: Path, output: Path, *words: str) -> bytes:
    """A run that was stopped before its last steps; what it would have written."""
    assert run(folder, output, *words) == 0
    written = (output / "v_labels.h5").read_bytes()
    (output / "v_labels.h5").unlink()
    return written


def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture
def openvino() -> None:
    pytest.importorskip("openvino")


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("began_with", ["torch", "openvino"])
def test_auto_goes_on_with_the_backend_the_run_was_begun_with(folder: Path, tmp_path: Path, began_with: str) -> None:
    expected = begin(folder, tmp_path, f"system.backend={began_with}")
    assert run(folder, tmp_path, AUTO) == 0
    assert provenance(tmp_path)["numeric_class"]["backend"].startswith(began_with)
    assert f'system.backend="{began_with}"' in provenance(tmp_path)["command"]
    with h5py.File(tmp_path / "v_labels.h5") as file:
        found = file["main"][:]
    (tmp_path / "expected.h5").write_bytes(expected)
    with h5py.File(tmp_path / "expected.h5") as file:
        assert np.array_equal(found, file["main"][:])


@pytest.mark.usefixtures("openvino")
def test_another_named_backend_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(folder, tmp_path, "system.backend=torch")
    assert run(folder, tmp_path, "system.backend=openvino") == 3
    assert "system.allow_mixed_devices=true" in capsys.readouterr().out
    assert run(folder, tmp_path, "system.backend=openvino", "system.allow_mixed_devices=true") == 0
    assert provenance(tmp_path)["numeric_class"] == "mixed"


@pytest.mark.usefixtures("openvino")
def test_a_backend_that_is_gone_is_named_and_the_run_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder, tmp_path, AUTO)
    before = provenance(tmp_path)["numeric_class"]["backend"]
    without_openvino(monkeypatch)
    capsys.readouterr()
    assert run(folder, tmp_path, AUTO) == 3
    said = capsys.readouterr().out
    assert before.startswith("openvino 20") and before in said
    assert "pip install -e '.[openvino]'" in said and "system.allow_mixed_devices=true" in said
    assert finals(tmp_path) == {}
    assert run(folder, tmp_path, AUTO, "system.allow_mixed_devices=true") == 0
    assert provenance(tmp_path)["numeric_class"] == "mixed"
    assert "openvino was not taken" in provenance(tmp_path)["backend_choice"][0]


def test_threads_are_those_the_run_was_begun_with(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path, "system.num_cpus=3")
    assert run(folder, tmp_path, "system.num_cpus=null") == 0
    assert provenance(tmp_path)["numeric_class"]["threads"] == 3


def tuned(folder: Path, cache: Path, *seconds: tuple[int, float]) -> tuple[str, str]:
    """What is measured of batches, and the words by which a run takes it."""
    (model,) = (folder / "model").iterdir()
    keep_profile(cache, model, *(torch_trial(batch, window_s) for batch, window_s in seconds))
    return f"system.cache_dir='{cache}'", "system.backend=auto"


def test_the_batch_that_was_measured_is_kept_by_a_rerun_whatever_is_measured_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three windows a row: batches of three; then one is faster, then five, then nothing is known."""
    words = tuned(folder, tmp_path / "cache", (1, 0.1), (3, 0.05))
    output = tmp_path / "out"
    expected = begin(folder, output, *words)
    assert "\n3 windows a forward pass, which connectomics tune" in "\n" + capsys.readouterr().err
    first = provenance(output)
    assert first["numeric_class"]["batch"] == 3
    assert "3 windows a forward pass, which connectomics tune measured" in first["backend_choice"][0]
    assert "3 windows a forward pass" in (output / "v_labels.run" / "run.log").read_text()
    assert "inference.sliding_window.sw_batch_size=3" in first["command"]
    for later in [((1, 0.1), (3, 0.2)), ((1, 0.1), (5, 0.01)), ()]:
        tuned(folder, tmp_path / "cache", *later)
        assert run(folder, output, *words) == 0
        assert provenance(output)["numeric_class"] == first["numeric_class"]
        assert (output / "v_labels.h5").read_bytes() == expected
        monkeypatch.setattr(RollingPredictor, "predict", None)
        assert run(folder, output, *words) == 0, "it is finished, and skipped"
        monkeypatch.undo()
        (output / "v_labels.h5").unlink()


def test_what_was_begun_with_one_window_goes_on_so_after_tune(folder: Path, tmp_path: Path) -> None:
    expected = begin(folder, tmp_path / "out")
    assert provenance(tmp_path / "out")["numeric_class"]["batch"] == 1
    words = tuned(folder, tmp_path / "cache", (1, 0.1), (3, 0.05))
    assert run(folder, tmp_path / "out", *words) == 0
    assert provenance(tmp_path / "out")["numeric_class"]["batch"] == 1
    assert (tmp_path / "out" / "v_labels.h5").read_bytes() == expected
    assert run(folder, tmp_path / "new", *words) == 0
    assert provenance(tmp_path / "new")["numeric_class"]["batch"] == 3


def test_a_stated_batch_is_another_class_than_a_measured_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tuned(folder, tmp_path / "cache", (1, 0.1), (3, 0.05))
    begin(folder, tmp_path / "out", *words)
    one = "inference.sliding_window.sw_batch_size=1"
    assert run(folder, tmp_path / "out", *words, one) == 3
    assert "system.allow_mixed_devices=true" in capsys.readouterr().out
    assert run(folder, tmp_path / "out", *words, one, "system.allow_mixed_devices=true") == 0
    assert provenance(tmp_path / "out")["numeric_class"] == "mixed"


def test_a_batch_that_memory_does_not_hold_any_more_is_refused_or_mixed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tuned(folder, tmp_path / "cache", (1, 0.1), (3, 0.05))
    begin(folder, tmp_path / "out", *words)
    tuned(folder, tmp_path / "cache", (1, 0.1))
    needs = Work.footprint

    def more(self: Work, block: Vec3, extent: Vec3) -> Footprint:
        return Footprint(1 << 60, 0) if self.network.batch == 3 else needs(self, block, extent)

    monkeypatch.setattr(Work, "footprint", more)
    capsys.readouterr()
    assert run(folder, tmp_path / "out", *words) == 3
    said = capsys.readouterr().out
    assert "'batch': 3" in said and "raise system.memory_budget_gb" in said and "allow_mixed_devices=true" in said
    assert run(folder, tmp_path / "out", *words, "system.allow_mixed_devices=true") == 0
    assert provenance(tmp_path / "out")["numeric_class"] == "mixed"


def test_where_memory_holds_no_batch_a_window_is_computed_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tuned(folder, tmp_path / "cache", (1, 0.1), (3, 0.05))
    needs = Work.footprint

    def more(self: Work, block: Vec3, extent: Vec3) -> Footprint:
        return Footprint(1 << 60, 0) if self.network.batch == 3 else needs(self, block, extent)

    monkeypatch.setattr(Work, "footprint", more)
    assert run(folder, tmp_path, *words) == 0
    assert provenance(tmp_path)["numeric_class"]["batch"] == 1
    assert "the memory budget has no room" in (tmp_path / "v_labels.run" / "run.log").read_text()
    assert run(folder, tmp_path / "stated", *words, "inference.sliding_window.sw_batch_size=3") == 3


def test_fast_is_measured_once_and_its_result_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(folder, tmp_path, *FAST)
    found = provenance(tmp_path)["agreement"]
    (kept,) = (tmp_path / "v_labels.run").glob("*/agreement.json")
    assert json.loads(kept.read_text())["differ"] == found["differ"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(FastContract, "measure", None)
        assert run(folder, tmp_path, *FAST) == 0
        assert provenance(tmp_path)["agreement"] == found
        capsys.readouterr()
        assert run(folder, tmp_path, "inference.precision=fast", "inference.max_disagreement=0") == 0  # it is finished
        (tmp_path / "v_labels.h5").unlink()
        assert run(folder, tmp_path, "inference.precision=fast", "inference.max_disagreement=0") == 3
    assert "inference.precision=exact" in capsys.readouterr().out
    shutil.copy(kept, tmp_path / "kept.json")
    kept.write_text('{"voxels": 1, ')
    assert run(folder, tmp_path, *FAST) == 0
    assert kept.read_bytes() == (tmp_path / "kept.json").read_bytes()


def test_what_fast_computed_for_the_sample_is_not_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Counter[str]()
    forward = TorchBackend.forward

    def counted(self: TorchBackend, batch: torch.Tensor) -> torch.Tensor:
        passes[self.numeric_class.precision] += 1
        return forward(self, batch)

    monkeypatch.setattr(TorchBackend, "forward", counted)
    assert run(folder, tmp_path / "exact") == 0
    windows = passes.pop("exact")
    assert run(folder, tmp_path / "fast", *FAST) == 0
    assert passes == {"exact": windows, "fast": windows}
    monkeypatch.setattr(cached, "CACHED_BYTES", 0)
    assert run(folder, tmp_path / "again", *FAST) == 0
    assert passes["fast"] == windows + 2 * windows
    assert finals(tmp_path / "again") == finals(tmp_path / "fast")


def test_fast_and_exact_are_two_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path) == 0
    capsys.readouterr()
    assert run(folder, tmp_path, *FAST) == 3
    assert "overwrite=true" in capsys.readouterr().out
    assert run(folder, tmp_path, *FAST, "inference.output.overwrite=true") == 0
    assert "bfloat16 instead of float32" in provenance(tmp_path)["nnunet"]


def test_on_a_gpu_a_run_goes_on_with_the_batch_that_fitted_when_it_began(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if this processor were a GPU, once with memory for two windows, then for any number."""
    most = 2

    def tried(backend: Backend, channels: int, patch: Vec3) -> None:
        if backend.numeric_class.batch > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backends, "try_batch", tried)
    monkeypatch.setattr(torch_eager, "capability", lambda device: "cuda 9.0 NVIDIA H200")
    eight = "inference.sliding_window.sw_batch_size=8"
    expected = begin(folder, tmp_path, eight)
    assert provenance(tmp_path)["numeric_class"]["batch"] == 2
    assert "inference.sliding_window.sw_batch_size=2" in provenance(tmp_path)["command"]
    most = 100
    assert run(folder, tmp_path, eight) == 0
    assert provenance(tmp_path)["numeric_class"]["batch"] == 2
    assert (tmp_path / "v_labels.h5").read_bytes() == expected
    (tmp_path / "v_labels.h5").unlink()
    most = 1
    capsys.readouterr()
    assert run(folder, tmp_path, eight) == 3
    assert "system.allow_mixed_devices=true" in capsys.readouterr().out
