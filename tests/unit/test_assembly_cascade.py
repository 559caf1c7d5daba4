"""What a second stage is given besides the image is refused, in a sentence, when it does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from connectomics.cli import main
from connectomics.core.errors import ConfigError, ModelError, VolumeError
from connectomics.lightning.inference import InferenceManager

from nnunet_models import make_model
from small_jobs import em_like, final_names, infer_words, quick_folder, write_h5

CPU = ["system.device=cpu", "system.num_cpus=1"]
STAGE = "model.previous_stage"


@dataclass(frozen=True)
class World:
    """Both stages, models that do not belong to them, and volumes with their labels."""

    folder: Path

    def words(self, *more: str, model: str = "second") -> list[str]:
        return infer_words(self.folder / model, self.folder / "out", self.folder / "data" / "a.h5", *more)

    def manager(self, *more: str, model: str = "second") -> InferenceManager:
        return InferenceManager.from_checkpoint(self.folder / model, [*CPU, *more])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with quick_folder() as folder:
        models: dict[str, dict[str, object]] = {
            "first": {"name": "2d_lowres"},
            "second": {"previous_stage": "2d_lowres"},
            "fullres": {},
            "fourfold": {"name": "2d_lowres", "classes": 4},
            "coarse": {"name": "2d_lowres", "spacing": (2.0, 2.0)},
        }
        for name, how in models.items():
            stated = {"dimensions": 2, "classes": 3, "patch": (16, 16), "features": (4, 8), "reader": "SimpleITKIO"}
            made = make_model(folder / "made" / name, **stated | how)  # type: ignore[arg-type]
            shutil.move(made, folder / name)
        for name in "ab":
            write_h5(folder / "data" / f"{name}.h5", em_like((2, 24, 32)))
            write_h5(folder / "labels" / f"{name}_found.h5", (em_like((2, 24, 32)) // 100).astype(np.uint8))
        write_h5(folder / "small.h5", np.zeros((2, 24, 30), np.uint8))
        strange = np.zeros((2, 24, 32), np.float32)
        strange[1, 5, 6] = 3
        write_h5(folder / "strange.h5", strange)
        yield World(folder)


@pytest.mark.parametrize(
    ("model", "stated", "error", "said"),
    [
        ("first", "first", ConfigError, "no second stage of a cascade"),
        ("second", "nowhere", ConfigError, "which does not exist"),
        ("second", "fullres", ModelError, "is configuration '2d', but the plans name '2d_lowres'"),
        ("second", "fourfold", ModelError, "the stages of a cascade must be trained on the same channels and labels"),
        ("second", "coarse", ConfigError, r"trained at spacing \(None, 2.0, 2.0\), this model at .*resample=plan"),
    ],
)
def test_a_first_stage_that_does_not_fit(
    world: World, model: str, stated: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        world.manager(f"{STAGE}='{world.folder / stated}'", model=model)


def test_a_first_stage_that_is_a_second(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "second", tmp_path / "second")
    plans = json.loads((tmp_path / "second" / "plans.json").read_text())
    (cascade, _) = plans["configurations"]
    plans["configurations"][cascade]["previous_stage"] = cascade
    (tmp_path / "second" / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match="is itself the second stage"):
        InferenceManager.from_checkpoint(tmp_path / "second", [*CPU, f"{STAGE}='{tmp_path / 'second'}'"])


def test_sections_with_a_mask_are_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "second", tmp_path / "second")
    plans = json.loads((tmp_path / "second" / "plans.json").read_text())
    plans["configurations"]["2d"]["use_mask_for_norm"] = [True]
    (tmp_path / "second" / "plans.json").write_text(json.dumps(plans))
    InferenceManager.from_checkpoint(tmp_path / "second", CPU)
    with pytest.raises(ModelError, match="normalises within a mask"):
        InferenceManager.from_checkpoint(tmp_path / "second", [*CPU, "inference.case=slice"])


@pytest.mark.parametrize(
    ("stated", "code", "said"),
    [
        (None, 2, "second stage of a cascade (previous_stage '2d_lowres'); set model.previous_stage"),
        ("labels/a_found.h5", 2, "one volume for 2; write * where the volume's name stands"),
        ("small/*.h5", 3, "no such file or folder"),
        ("small.h5", 3, "expected the previous stage's labels of extent (2, 24, 32)"),
        ("strange.h5", 3, "value 3.0 at voxel (z, y, x) (1, 5, 6) is no label of the model, which has [0, 1, 2]"),
    ],
)
def test_labels_that_do_not_fit(
    world: World, stated: str | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if stated is None else [f"{STAGE}='{world.folder / stated}'"]
    words = world.words(*more)
    if code == 2:
        words[3] = f"inference.volume_mode.file_pattern='{world.folder / 'data' / '*.h5'}'"
    assert main(words) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert not final_names(world.folder / "out")
    if stated is None:
        assert main(["doctor", *words[1:]]) == 3
        assert said in capsys.readouterr().out


def test_each_volume_has_its_own_labels(world: World, tmp_path: Path) -> None:
    words = world.words(f"{STAGE}='{world.folder}/labels/*_found.h5'", f"inference.data.output_path={tmp_path}")
    words[3] = f"inference.volume_mode.file_pattern='{world.folder / 'data' / '*.h5'}'"
    assert main(words) == 0
    record = json.loads((tmp_path / "b_labels.run" / "provenance.json").read_text())
    assert "b_found.h5" in json.dumps(record["previous_stage"])


def test_arrays_need_labels_too(world: World) -> None:
    image = em_like((2, 24, 32))
    with pytest.raises(ConfigError, match="give the labels of the first"):
        world.manager().predict(image)
    with pytest.raises(VolumeError, match=r"have shape \(1, 2, 24, 31\), expected \(2, 24, 32\)"):
        world.manager().predict(image, previous=np.zeros((2, 24, 31), np.uint8))
    labels = world.manager().predict(image[0], previous=np.zeros((24, 32), np.uint8)).labels
    assert labels.shape == (24, 32)


def test_inspect_names_the_previous_stage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(world.folder / "second")]) == 0
    assert "previous stage     2d_lowres" in capsys.readouterr().out
