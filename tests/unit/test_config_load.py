"""Loading: defaults, YAML, overrides, interpolation; every specified key is there and takes a value."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from connectomics.config.load import known_keys, load_config
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError
from connectomics.stages.decode.object_filters import Filters

TUTORIAL = Path(__file__).resolve().parents[2] / "tutorials" / "nnunet_mito_inference.yaml"

# The specified keys, spelled out a second time on purpose: key, override, expected value, companions.
KEYS: list[tuple[str, str, object, tuple[str, ...]]] = [
    ("experiment_name", "mito", "mito", ()),
    ("description", "'a text, with a comma'", "a text, with a comma", ()),
    ("system.device", "cuda:3", "cuda:3", ()),
    ("system.backend", "auto", "auto", ()),
    ("system.cache_dir", "/scratch/cache", "/scratch/cache", ()),
    ("system.seed", "7", 7, ()),
    ("system.num_gpus", "1", 1, ()),
    ("system.num_cpus", "4", 4, ()),
    ("system.memory_budget_gb", "1.5", 1.5, ()),
    ("system.allow_mixed_devices", "true", True, ()),
    ("system.stale_after_s", "2", 2.0, ()),
    ("system.inference.batch_size", "1", 1, ()),
    ("system.inference.num_gpus", "0", 0, ()),
    ("system.inference.num_cpus", "2", 2, ()),
    ("system.inference.num_workers", "2", 2, ()),
    ("model.architecture", "other", "other", ()),
    ("model.nnunet_checkpoint", "m/checkpoint.pth", "m/checkpoint.pth", ()),
    ("model.nnunet_plans", "m/plans.json", "m/plans.json", ()),
    ("model.nnunet_dataset", "m/dataset.json", "m/dataset.json", ()),
    ("model.nnunet_device", "cpu", "cpu", ()),
    ("model.use_deep_supervision", "false", False, ()),
    ("model.in_channels", "2", 2, ()),
    ("model.out_channels", "2", 2, ()),
    ("model.sha256", "ab" * 32, "ab" * 32, ()),
    ("model.trust_code", "true", True, ()),
    ("model.folds", "[0,all]", ["0", "all"], ()),
    ("model.checkpoint_name", "checkpoint_best.pth", "checkpoint_best.pth", ()),
    ("model.ensemble", "[b,c.zip]", ["b", "c.zip"], ()),
    ("model.previous_stage", "first", "first", ()),
    ("model.ensemble_weights", "[1,2.5]", [1.0, 2.5], ("model.ensemble=[b]",)),
    ("data.do_2d", "true", True, ()),
    ("data.in_channels", "1", 1, ()),
    ("data.out_channels", "3", 3, ()),
    ("inference.case", "slice", "slice", ()),
    ("inference.precision", "fast", "fast", ()),
    ("inference.max_disagreement", "1e-5", 1e-5, ()),
    ("inference.planes", "[xy,xz,yz]", ["xy", "xz", "yz"], ()),
    ("inference.allow_anisotropic_planes", "true", True, ("inference.planes=[xz]",)),
    ("inference.voxel_size_nm", "[30,8,8.5]", [30.0, 8.0, 8.5], ()),
    ("inference.axes", "xyz", "xyz", ()),
    ("inference.block_shape", "[1,64,64]", [1, 64, 64], ()),
    ("inference.roi", "[[0,0,5],[1,64,64]]", [[0, 0, 5], [1, 64, 64]], ()),
    ("inference.mask", "tissue.zarr::3", "tissue.zarr::3", ()),
    ("inference.resample", "plan", "plan", ()),
    ("inference.spacing", "[45,4.6,4]", [45.0, 4.6, 4.0], ("inference.resample=plan",)),
    ("inference.allow_large_resampling", "true", True, ()),
    ("inference.data.output_path", "out/", "out/", ()),
    ("inference.volume_mode.enabled", "false", False, ()),
    ("inference.volume_mode.start_index", "3", 3, ()),
    ("inference.volume_mode.step", "4", 4, ()),
    ("inference.volume_mode.stop_on_error", "true", True, ()),
    ("inference.volume_mode.file_list", "[a.h5,b.h5::raw]", ["a.h5", "b.h5::raw"], ()),
    ("inference.volume_mode.file_pattern", "data/*.h5", "data/*.h5", ()),
    ("inference.volume_mode.output_suffix", "mito", "mito", ()),
    ("inference.sliding_window.window_size", "[64,96]", [64, 96], ()),
    ("inference.sliding_window.overlap", "0.25", 0.25, ()),
    ("inference.sliding_window.sw_batch_size", "2", 2, ()),
    ("inference.sliding_window.blending", "constant", "constant", ()),
    (
        "inference.sliding_window.padding_mode",
        "reflect",
        "reflect",
        ("inference.sliding_window.engine=monai",),
    ),
    ("inference.sliding_window.engine", "monai", "monai", ()),
    ("inference.test_time_augmentation.enabled", "false", False, ()),
    ("inference.test_time_augmentation.flip_axes", "[1,2]", [1, 2], ()),
    ("inference.test_time_augmentation.act", "none", "none", ("inference.output.save_probabilities=true",)),
    (
        "inference.test_time_augmentation.select_channel",
        "1",
        [1],
        ("inference.output.save_probabilities=true",),
    ),
    ("inference.postprocessing.binary.enabled", "true", True, ()),
    ("inference.postprocessing.binary.threshold", "0.7", 0.7, ()),
    (
        "inference.postprocessing.binary.remove_small_objects",
        "50",
        50,
        ("inference.postprocessing.binary.enabled=true",),
    ),
    (
        "inference.postprocessing.binary.fill_holes",
        "true",
        True,
        ("inference.postprocessing.binary.enabled=true",),
    ),
    ("inference.postprocessing.intensity_scale", "255", 255.0, ("inference.output.save_probabilities=true",)),
    (
        "inference.postprocessing.intensity_dtype",
        "uint8",
        "uint8",
        ("inference.output.save_probabilities=true",),
    ),
    ("inference.output.formats", "[h5,zarr,tiff,png]", ["h5", "zarr", "tiff", "png"], ()),
    ("inference.output.pyramid", "false", False, ()),
    ("inference.output.table", "csv", "csv", ()),
    ("inference.output.save_probabilities", "true", True, ()),
    ("inference.output.overwrite", "true", True, ()),
    ("decoding", "[{name: filters, min_voxels: 3}]", [dataclasses.asdict(Filters(min_voxels=3))], ()),
    ("test.data.test_image", "a.h5", ["a.h5"], ()),
    ("test.data.test_label", "[b.h5]", ["b.h5"], ("test.data.test_image=a.h5",)),
    ("test.data.test_prediction", "[a.h5,b.h5]", ["a.h5", "b.h5"], ()),
    ("test.data.test_instances", "i.h5", ["i.h5"], ("test.data.test_image=a.h5", "test.data.test_label=b.h5")),
    ("test.data.test_ignore", "m.h5", ["m.h5"], ("test.data.test_image=a.h5", "test.data.test_label=b.h5")),
    ("test.evaluation.enabled", "false", False, ()),
    ("test.evaluation.metrics", "[dice]", ["dice"], ()),
    ("test.evaluation.foreground", "true", True, ()),
    ("test.evaluation.ignore_label", "255", 255, ()),
    ("test.evaluation.size_bounds", "[5000,15000]", [5000, 15000], ("test.evaluation.metrics=[ap]",)),
]
ONE_VALUE_ONLY = {"inference.test_time_augmentation.ensemble_mode": "mean"}


def value_at(config: Config, key: str) -> object:
    value: object = dataclasses.asdict(config)
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def test_the_specified_keys_are_known() -> None:
    """Later ones are held by ``test_every_key.py`` alone, whose table must have them all."""
    assert set(known_keys()) >= {key for key, *_ in KEYS} | set(ONE_VALUE_ONLY)
    assert len(known_keys()) == len(set(known_keys()))


@functools.cache
def loaded(words: tuple[str, ...]) -> Config:
    return load_config(None, words)


@pytest.mark.parametrize(("key", "text", "expected", "companions"), KEYS, ids=[key for key, *_ in KEYS])
def test_each_key_changes_its_own_value_only(
    key: str, text: str, expected: object, companions: tuple[str, ...]
) -> None:
    without, changed = loaded(companions), load_config(None, [*companions, f"{key}={text}"])
    assert value_at(changed, key) == expected
    assert value_at(without, key) != expected
    others = [other for other in known_keys() if value_at(without, other) != value_at(changed, other)]
    assert others == [key]


def test_no_file_and_no_overrides_give_the_schemas_defaults() -> None:
    assert load_config(None) == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(None).experiment_name = "x"  # type: ignore[misc]


def test_the_tutorial_shows_every_key_with_its_default() -> None:
    tree = OmegaConf.load(TUTORIAL)
    shown = {key for key in known_keys() if OmegaConf.select(tree, key, default="absent") != "absent"}
    assert shown == set(known_keys())
    config, default = load_config(TUTORIAL), Config()
    differing = {key for key in known_keys() if value_at(config, key) != value_at(default, key)}
    assert differing == {"experiment_name", "description", "test.data.test_image", "test.data.test_label"}


def test_the_tutorial_comments_every_value() -> None:
    lines = TUTORIAL.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        is_value = line.strip() and not line.lstrip().startswith("#") and not line.endswith(":")
        assert not is_value or "#" in line or before.lstrip().startswith("#"), line


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("system: {seed: 1, num_cpus: 2}\ndata:\n")
    config = load_config(path, ["system.seed=2", "++system.seed=3", "+inference.case=volume"])
    assert (config.system.seed, config.system.num_cpus, config.inference.case) == (3, 2, "volume")


def test_an_override_may_state_a_section_at_once() -> None:
    config = load_config(None, ["inference.output={formats:[zarr],overwrite:true}"])
    assert (config.inference.output.formats, config.inference.output.overwrite) == (["zarr"], True)


def test_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfsystem: {seed: 5}\n")
    assert load_config(path).system.seed == 5
    path.write_bytes(b"")
    assert load_config(path) == Config()


def test_interpolation_of_keys_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFIG_TEST_FOLDER", "/data/em")
    monkeypatch.setenv("CONFIG_TEST_SEED", "12")
    path = tmp_path / "c.yaml"
    path.write_text(
        "system: {seed: '${oc.env:CONFIG_TEST_SEED}'}\n"
        "inference: {data: {output_path: '${oc.env:CONFIG_TEST_FOLDER}/${experiment_name}'}}\n"
        "test: {data: {test_image: ['${oc.env:CONFIG_TEST_FOLDER}/a.h5']}}\n"
    )
    config = load_config(path, ["experiment_name=run"])
    assert config.system.seed == 12
    assert config.inference.data.output_path == "/data/em/run"
    assert config.test.data.test_image == ["/data/em/a.h5"]


def test_a_file_list_may_be_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "volumes.txt"
    path.write_text("a.h5\n\n  # not this one\n  data/b c.h5::raw \r\nphantom:1x2x3?seed=4\n")
    config = load_config(None, [f'inference.volume_mode.file_list="{path}"'])
    assert config.inference.volume_mode.file_list == ["a.h5", "data/b c.h5::raw", "phantom:1x2x3?seed=4"]


def test_a_value_with_an_equals_sign_needs_its_own_quotes() -> None:
    with pytest.raises(ConfigError, match="quotes"):
        load_config(None, ["test.data.test_image=phantom:1x8x8?seed=2"])
    config = load_config(None, ['test.data.test_image="phantom:1x8x8?seed=2"'])
    assert config.test.data.test_image == ["phantom:1x8x8?seed=2"]


def test_hydra_is_not_imported_without_overrides() -> None:
    code = (
        "import sys; from connectomics.config.load import load_config; load_config(None); "
        "assert 'hydra' not in sys.modules; assert 'torch' not in sys.modules; "
        "load_config(None, ['system.seed=1']); assert 'hydra' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", ["data/1[23].png", "phantom:2x64x64?seed=3", "a,b=c"])
def test_text_that_hydra_cannot_parse_is_taken_as_it_stands(value: str) -> None:
    config = load_config(None, [f"inference.volume_mode.file_pattern={value}"])
    assert config.inference.volume_mode.file_pattern == value
