"""A batch that tune measured to be faster is used for volumes that fill it and whose blocks it leaves as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from tuned import keep_profile, torch_trial

from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.engines import PADDED, TOO_LARGE, Engines, against_batch
from connectomics.assembly.memory import plan_volume
from connectomics.assembly.volumes import segmenter_of
from connectomics.config.load import load_config
from connectomics.core.errors import ResourceError
from connectomics.core.geometry import Box
from connectomics.volumes.volume import Array, VolumeInfo

from nnunet_models import make_model
from small_jobs import quick_folder

BATCH = "inference.sliding_window.sw_batch_size"


@dataclass
class Extent:
    """A volume of which only the shape matters."""

    info: VolumeInfo
    identity: dict[str, object] = field(default_factory=dict)

    def read(self, box: Box) -> Array:
        raise AssertionError("nothing is read")

    def close(self) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    with quick_folder() as folder:
        yield make_model(folder, dimensions=3, patch=(8, 64, 64), features=(4, 8), reader="Tiff3DIO", mirror_axes=())


def made(model: Path, cache: Path, *words: str) -> Engine:
    stated = ["system.device=cpu", "system.num_cpus=1", "system.backend=auto", f"system.cache_dir='{cache}'", *words]
    return build_engine(load_config(None, stated), model)


def volume(z: int, y: int, x: int) -> VolumeInfo:
    return VolumeInfo((1, z, y, x), np.dtype(np.uint8), (1, min(y, 64), min(x, 64)))


@pytest.mark.parametrize(
    ("width", "four_s", "expected"),
    [
        (64 + 3 * 32, 0.094, None),  # four windows in a row
        (64 + 3 * 32, 0.096, PADDED),  # not chosen, were it not for what is measured again below
        (64 + 2 * 32, 0.074, PADDED),  # three, so a quarter is empty
        (64 + 2 * 32, 0.071, None),
        (64, 0.02375, None),  # one
        (64, 0.0238, PADDED),
    ],
)
def test_what_stays_empty_counts(model: Path, tmp_path: Path, width: int, four_s: float, expected: str | None) -> None:
    keep_profile(tmp_path, model, torch_trial(1, 0.1), torch_trial(4, 0.01))
    engine = made(model, tmp_path)
    assert engine.models[0].window.batch == 4
    keep_profile(tmp_path, model, torch_trial(1, 0.1), torch_trial(4, four_s))
    assert against_batch(engine, volume(8, 64, width)) == expected


def test_what_is_not_measured_any_more_is_not_faster(model: Path, tmp_path: Path) -> None:
    path = keep_profile(tmp_path, model, torch_trial(1, 0.1), torch_trial(4, 0.01))
    engine = made(model, tmp_path)
    wide = volume(8, 64, 64 + 3 * 32)
    assert against_batch(engine, wide) is None
    keep_profile(tmp_path, model, torch_trial(1, 0.1))
    assert against_batch(engine, wide) == PADDED
    path.unlink()
    assert against_batch(engine, wide) == PADDED


def test_blocks_are_not_made_smaller_for_a_batch_nor_refused(model: Path, tmp_path: Path) -> None:
    """Each budget is held against the plans with four windows a pass and with one, both stated."""
    keep_profile(tmp_path, model, torch_trial(1, 0.1), torch_trial(4, 0.01))
    engine = made(model, tmp_path)
    seen = set()
    budgets = [(volume(64, 400, 400), more) for more in range(300, 405, 6)]
    budgets += [(volume(8, 64, 64 + 3 * 32), more) for more in range(230, 280, 4)]
    for info, more in budgets:
        plans, budget = [], engine.memory.base_bytes + (more << 20)
        for batch in (4, 1):
            stated = replaced(engine, budget, batch)
            try:
                plans.append(plan_volume(stated, segmenter_of(stated, None), info)[0].block_shape)
            except ResourceError:
                plans.append((0, 0, 0))
        small = replaced(engine, budget, 4)
        if plans[1] == (0, 0, 0):
            with pytest.raises(ResourceError, match=r"raise system.memory_budget_gb"):
                against_batch(small, info)
            continue
        found = against_batch(small, info)
        assert found == (None if plans[0] == plans[1] else TOO_LARGE)
        seen.add((plans[0] == (0, 0, 0), found))
    assert seen == {(False, None), (False, TOO_LARGE), (True, TOO_LARGE)}, "every case has been met"


def replaced(engine: Engine, budget_bytes: int, batch: int) -> Engine:
    models = tuple(replace(m, window=replace(m.window, batch=batch)) for m in engine.models)
    return replace(engine, models=models, settings=replace(engine.settings, budget_bytes=budget_bytes))


def test_each_volume_gets_the_engine_that_suits_it_made_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "connectomics")
    keep_profile(tmp_path, model, torch_trial(1, 0.1), torch_trial(4, 0.05))
    engine = made(model, tmp_path)
    engines = Engines(engine)
    wide, narrow = Extent(volume(8, 64, 64 + 3 * 32)), Extent(volume(8, 64, 64))
    assert engines.suiting(wide) is engine
    single = engines.suiting(narrow)
    assert single.settings.numeric_class == {**engine.settings.numeric_class, "batch": 1}
    assert single.models[0].window.batch == 1
    assert PADDED in caplog.text
    assert engines.suiting(narrow) is single and engines.suiting(wide) is engine and len(list(engines)) == 2


def test_a_stated_batch_is_kept_whatever_it_costs(model: Path, tmp_path: Path) -> None:
    engine = made(model, tmp_path, f"{BATCH}=4")
    assert Engines(engine).suiting(Extent(volume(8, 64, 64))) is engine
