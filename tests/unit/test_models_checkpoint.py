"""Loading models: equal to the networks nnunetv2 builds, and every place a model's files may lie."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.core.fingerprint import sha256_of_bytes, sha256_of_file
from connectomics.models.checkpoint import LoadedModel, load_model, read_spec
from connectomics.models.locate import ModelRequest

from nnunet_models import make_model

KINDS = {
    "plain 2d": {"dimensions": 2, "patch": (16, 24), "features": (4, 8)},
    "plain 3d": {
        "dimensions": 3,
        "patch": (8, 8, 16),
        "features": (4, 8),
        "reader": "Tiff3DIO",
        "channels": 2,
    },
    "resenc 2d": {"dimensions": 2, "patch": (16, 16), "architecture": "resenc", "channels": 2, "classes": 4},
    "resenc 3d": {"dimensions": 3, "patch": (8, 8, 8), "architecture": "resenc", "reader": "SimpleITKIO"},
    "batch norm": {"dimensions": 2, "patch": (16, 16), "trainer": "nnUNetTrainerBN"},
    "no deep supervision": {"dimensions": 2, "patch": (16, 16), "trainer": "nnUNetTrainerNoDeepSupervision"},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_model(tmp_path_factory.mktemp("models"), **options, seed=seed)
        for seed, (name, options) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("ensemble"),
        dimensions=2,
        patch=(16, 16),
        features=(4, 8),
        folds=("0", "1", "3", "10", "all"),
    )


@pytest.fixture
def copied(ensemble: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ensemble, tmp_path / "model")


def networks_of_nnunet(root: Path) -> list[nn.Module]:
    """What nnUNetPredictor builds and loads for each checkpoint of a training folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import (
            nnUNetTrainerBN,
        )
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    dataset = json.loads((root / "dataset.json").read_text())
    networks = []
    for file in sorted(root.glob("fold_*/checkpoint_final.pth")):
        checkpoint = torch.load(file, weights_only=False)
        plans = PlansManager(json.loads((root / "plans.json").read_text()))
        configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
        trainer = nnUNetTrainerBN if checkpoint["trainer_name"] == "nnUNetTrainerBN" else nnUNetTrainer
        network = trainer.build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, dataset),
            plans.get_label_manager(dataset).num_segmentation_heads,
            enable_deep_supervision=False,
        )
        network.load_state_dict(checkpoint["network_weights"])
        networks.append(network.eval())
    return networks


@torch.no_grad()
def assert_equal_networks(loaded: LoadedModel, theirs: list[nn.Module]) -> None:
    torch.set_num_threads(1)
    spec = loaded.spec
    window = torch.randn(2, spec.channels, *spec.patch_shape, generator=torch.Generator().manual_seed(5))
    assert len(loaded.networks) == len(theirs)
    for ours, other in zip(loaded.networks, theirs, strict=True):
        expected = other(window[:, :, 0])[:, :, None] if spec.dimensions == 2 else other(window)
        logits = ours(window)
        assert logits.shape == (2, spec.classes, *spec.patch_shape)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, expected)
        assert logits.argmax(1).unique().numel() > 1  # not the trivial network
        assert not ours.training
        assert spec.parameters == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_the_network_that_nnunet_builds(models: dict[str, Path], name: str) -> None:
    assert_equal_networks(load_model(ModelRequest(models[name])), networks_of_nnunet(models[name]))


@pytest.mark.parametrize("name", ["vnc_mito_2d", "vnc_mito_3d", "vnc_multi_2d"])
def test_logits_of_trained_models_equal_nnunets(shared_data: Path, name: str) -> None:
    root = shared_data / "models" / name
    assert_equal_networks(load_model(ModelRequest(root)), networks_of_nnunet(root))


def test_spec_of_a_trained_2d_model(shared_data: Path) -> None:
    spec = read_spec(shared_data / "models" / "vnc_mito_2d")
    assert (spec.configuration, spec.dimensions, spec.patch_shape) == ("2d", 2, (1, 256, 256))
    assert (spec.trainer_name, spec.plans_name) == ("nnUNetTrainer_10epochs", "nnUNetPlans_small")
    assert spec.label_names == (("background", 0), ("mito", 1))
    assert spec.class_values == (0, 1)
    assert spec.mirror_axes == (1, 2)
    assert spec.spacing == (None, 1.0, 1.0)
    assert spec.slice_case
    assert spec.folds == ("0", "1")
    assert round(spec.parameters / 1e6, 2) == 0.44
    (channel,) = spec.normalisations
    assert (channel.scheme, channel.lower, channel.upper) == ("ZScoreNormalization", 10.0, 201.0)


def test_spec_of_a_trained_3d_model(shared_data: Path) -> None:
    spec = read_spec(shared_data / "models" / "vnc_mito_3d")
    assert (spec.configuration, spec.dimensions, spec.patch_shape) == ("3d_fullres", 3, (12, 96, 96))
    assert spec.mirror_axes == (0, 1, 2)
    assert spec.spacing == (45.0, 9.2, 9.2)
    assert (spec.image_reader, spec.slice_case) == ("Tiff3DIO", False)


def test_a_model_trained_on_all_data_is_found_where_there_are_no_numbered_folds(shared_data: Path) -> None:
    spec = read_spec(shared_data / "models" / "vnc_multi_2d")
    assert spec.folds == ("all",)
    assert spec.classes == 5


def test_spec_of_a_model_of_regions(tmp_path: Path) -> None:
    labels: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "rim": [3], "ignore": 4}
    root = make_model(tmp_path, dimensions=2, patch=(16, 16), labels=labels, regions_class_order=[1, 2, 3])
    spec = load_model(ModelRequest(root)).spec
    assert spec.regions == (("whole", (1, 2, 3)), ("core", (3, 2)), ("rim", (3,)))
    assert (spec.class_values, spec.classes, spec.ignored_label) == ((1, 2, 3), 3, 4)
    assert spec.label_names == (("background", 0), ("whole", 1), ("core", 2), ("rim", 3), ("ignore", 4))


def test_read_spec_says_what_load_model_says(ensemble: Path) -> None:
    assert read_spec(ensemble) == load_model(ModelRequest(ensemble)).spec


def test_numbered_folds_are_found_as_nnunet_finds_them(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    theirs = nnUNetPredictor.auto_detect_available_folds(str(ensemble), "checkpoint_final.pth")
    assert read_spec(ensemble).folds == tuple(str(fold) for fold in theirs)


def test_chosen_folds_keep_their_order(ensemble: Path) -> None:
    loaded = load_model(ModelRequest(ensemble, folds=("3", "0")))
    assert loaded.spec.folds == ("3", "0")
    single = load_model(ModelRequest(ensemble / "fold_3"))
    window = torch.ones(1, 1, 1, 16, 16).cumsum(4)
    assert torch.equal(loaded.networks[0](window), single.networks[0](window))
    assert not torch.equal(loaded.networks[1](window), single.networks[0](window))


def test_fold_all_can_be_chosen(ensemble: Path) -> None:
    assert load_model(ModelRequest(ensemble, folds=("all",))).spec.folds == ("all",)


def test_a_fold_folder_is_a_model_of_one_fold(ensemble: Path) -> None:
    spec = read_spec(ModelRequest(ensemble / "fold_1", folds=("1",)))
    assert spec.folds == ("1",)
    assert [name for name, _ in spec.files] == ["fold_1/checkpoint_final.pth", "plans.json", "dataset.json"]


def test_another_checkpoint_name(copied: Path) -> None:
    (copied / "fold_1" / "checkpoint_final.pth").rename(copied / "fold_1" / "checkpoint_best.pth")
    spec = read_spec(ModelRequest(copied, checkpoint_name="checkpoint_best.pth"))
    assert (spec.folds, spec.checkpoint_name) == (("1",), "checkpoint_best.pth")


def test_a_bare_checkpoint_finds_its_json_beside_it(copied: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "mito.pth"
    bare.parent.mkdir()
    shutil.copy(copied / "fold_3" / "checkpoint_final.pth", bare)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(copied / name, bare.parent)
    spec = read_spec(bare)
    assert [name for name, _ in spec.files] == ["mito.pth", "plans.json", "dataset.json"]
    assert (spec.folds, spec.checkpoint_name) == (("3",), "mito.pth")
    assert spec.weights_sha256 == sha256_of_file(bare)


def test_a_bare_checkpoint_finds_its_json_above_it(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied / "fold_0")
    spec = read_spec(Path("checkpoint_final.pth"))
    assert [name for name, _ in spec.files] == ["checkpoint_final.pth", "plans.json", "dataset.json"]
    assert spec.sha256 == read_spec(ModelRequest(copied, folds=("0",))).sha256


def test_json_beside_a_linked_checkpoint_is_that_of_the_link_or_its_target(ensemble: Path, tmp_path: Path) -> None:
    link = tmp_path / "best.pth"
    link.symlink_to(ensemble / "fold_0" / "checkpoint_final.pth")
    assert read_spec(link).sha256 == read_spec(ModelRequest(ensemble, folds=("0",))).sha256


@pytest.mark.parametrize(("name", "key"), [("plans.json", "dataset_name"), ("dataset.json", "labels")])
def test_another_models_json_near_a_bare_checkpoint_is_not_taken_for_its_own(copied: Path, name: str, key: str) -> None:
    values = json.loads((copied / name).read_text())
    values[key] = {"background": 0, "other": 1} if key == "labels" else "Dataset999_Other"
    (copied / name).write_text(json.dumps(values))
    bare = copied / "fold_0" / "checkpoint_final.pth"
    with pytest.raises(ModelError, match=rf"{name}: its '{key}' differs.*another model"):
        read_spec(bare)
    assert read_spec(ModelRequest(bare, plans=copied / "plans.json", dataset=copied / "dataset.json")).folds == ("0",)
    assert read_spec(ModelRequest(copied, folds=("0",))).folds == ("0",)


def test_a_lone_checkpoint_uses_its_own_copies_and_says_so(
    ensemble: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lone = tmp_path / "a" / "lone.pth"
    lone.parent.mkdir()
    shutil.copy(ensemble / "fold_0" / "checkpoint_final.pth", lone)
    with caplog.at_level(logging.INFO):
        spec = read_spec(lone)
    assert spec.files == (("lone.pth", sha256_of_file(lone)),)
    assert spec.patch_shape == read_spec(ensemble).patch_shape
    assert [record.getMessage().split("no ")[1].split()[0] for record in caplog.records] == [
        "plans.json",
        "dataset.json",
    ]


def test_stated_json_files_are_used(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans = json.loads((copied / "plans.json").read_text())
    plans["plans_name"] = "Other"
    (tmp_path / "stated.json").write_text(json.dumps(plans))
    spec = read_spec(ModelRequest(copied, plans=tmp_path / "stated.json", dataset=copied / "dataset.json"))
    assert spec.plans_name == "Other"
    assert "stated.json: its 'plans_name' differs" in caplog.text


def test_one_checkpoints_sha256_is_the_files(ensemble: Path) -> None:
    file = ensemble / "fold_0" / "checkpoint_final.pth"
    assert read_spec(ModelRequest(file, sha256=sha256_of_file(file).upper())).weights_sha256 == sha256_of_file(file)


def test_an_ensembles_sha256_does_not_depend_on_the_order_of_its_folds(ensemble: Path) -> None:
    names = ("fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth")
    expected = sha256_of_bytes("\n".join(f"{n} {sha256_of_file(ensemble / n)}" for n in names).encode())
    forward = read_spec(ModelRequest(ensemble, folds=("0", "1"), sha256=expected))
    backward = read_spec(ModelRequest(ensemble, folds=("1", "0"), sha256=expected))
    assert forward.weights_sha256 == backward.weights_sha256 == expected
    assert forward.sha256 != backward.sha256  # the order of a float mean decides its last bit


def test_the_identity_covers_the_json_files_but_not_their_layout(copied: Path) -> None:
    before = read_spec(copied)
    plans = json.loads((copied / "plans.json").read_text())
    (copied / "plans.json").write_text(json.dumps(plans, sort_keys=True))
    assert read_spec(copied).sha256 == before.sha256
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["nonlin_kwargs"]["negative_slope"] = 0.2
    (copied / "plans.json").write_text(json.dumps(plans))
    after = read_spec(copied)
    assert after.sha256 != before.sha256
    assert after.weights_sha256 == before.weights_sha256


def edit_checkpoint(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_dropped(ensemble: Path, copied: Path, prefix: str) -> None:
    def wrap(content: dict[str, Any]) -> None:
        content["network_weights"] = {prefix + k: v for k, v in content["network_weights"].items()}

    edit_checkpoint(copied / "fold_0" / "checkpoint_final.pth", wrap)
    assert_equal_networks(load_model(ModelRequest(copied, folds=("0",))), networks_of_nnunet(ensemble)[:1])


def test_large_weights_are_finite_though_their_sum_is_not(copied: Path) -> None:
    def enlarge(content: dict[str, Any]) -> None:
        content["network_weights"]["decoder.seg_layers.0.weight"].fill_(3e38)

    edit_checkpoint(copied / "fold_0" / "checkpoint_final.pth", enlarge)
    (network,) = load_model(ModelRequest(copied, folds=("0",))).networks
    assert network.network.decoder.seg_layers[0].weight.max() > 2e38


def test_half_precision_weights_become_float32(ensemble: Path, copied: Path) -> None:
    def halve(content: dict[str, Any]) -> None:
        content["network_weights"] = {k: v.half() for k, v in content["network_weights"].items()}

    edit_checkpoint(copied / "fold_0" / "checkpoint_final.pth", halve)
    (network,) = load_model(ModelRequest(copied, folds=("0",))).networks
    (theirs, *_) = networks_of_nnunet(ensemble)
    for (name, ours), other in zip(network.network.named_parameters(), theirs.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, other.half().float()), name


@pytest.mark.parametrize(("stored", "expected"), [(None, ()), ((), ()), ((1,), (2,)), ([1, 0], (2, 1))])
def test_mirror_axes_shift_by_one_in_2d(copied: Path, stored: object, expected: tuple[int, ...]) -> None:
    edit_checkpoint(
        copied / "fold_0" / "checkpoint_final.pth",
        lambda content: content.update(inference_allowed_mirroring_axes=stored),
    )
    assert read_spec(ModelRequest(copied, folds=("0",))).mirror_axes == expected


def test_mirror_axes_of_old_checkpoints_without_the_key(copied: Path) -> None:
    edit_checkpoint(
        copied / "fold_0" / "checkpoint_final.pth",
        lambda content: content.pop("inference_allowed_mirroring_axes"),
    )
    assert read_spec(ModelRequest(copied, folds=("0",))).mirror_axes == ()


def edit_plans(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plans = json.loads((root / "plans.json").read_text())
    change(plans)
    (root / "plans.json").write_text(json.dumps(plans))


def as_before_2_3(plans: dict[str, Any]) -> None:
    """The keys with which nnunetv2 described a network before plans had 'architecture'."""
    configuration = plans["configurations"]["2d"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 1],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")


def inheriting(plans: dict[str, Any]) -> None:
    parent = plans["configurations"].pop("2d")
    plans["configurations"]["base"] = copy.deepcopy(parent) | {"patch_size": [64, 64]}
    plans["configurations"]["2d"] = {"inherits_from": "base", "patch_size": [16, 16]}


def moved_class(plans: dict[str, Any]) -> None:
    name = "dynamic_network_architectures.architectures.plain_unet.PlainConvUNet"
    plans["configurations"]["2d"]["architecture"]["network_class_name"] = name


@pytest.mark.parametrize("change", [as_before_2_3, inheriting, moved_class])
def test_other_forms_of_plans_give_the_same_network(
    ensemble: Path, copied: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_plans(copied, change)
    loaded = load_model(ModelRequest(copied, folds=("0",)))
    assert_equal_networks(loaded, networks_of_nnunet(ensemble)[:1])
    assert loaded.spec.patch_shape == (1, 16, 16)
    assert loaded.spec.normalisations == read_spec(ensemble).normalisations


def test_a_trusted_class_outside_of_the_list_is_imported(ensemble: Path, copied: Path) -> None:
    def softplus(plans: dict[str, Any]) -> None:
        arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
        arguments |= {"nonlin": "torch.nn.Softplus", "nonlin_kwargs": {}}

    edit_plans(copied, softplus)
    with pytest.raises(UnsafeModelError, match=r"torch\.nn\.Softplus"):
        load_model(ModelRequest(copied, folds=("0",)))
    assert_equal_networks(
        load_model(ModelRequest(copied, folds=("0",), trust_code=True)), networks_of_nnunet(copied)[:1]
    )


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "a": 1, "ignore": 2},
        {"b": 2, "a": 1, "background": 0},
        {"background": 0, "a": [1], "b": 2},
        {"background": 0, "a": 1, "twin": 1, "b": 2},
        {"background": 0, **{f"l{k}": k for k in range(1, 300)}},
        {"background": 0, "a": [1, 2], "b": 2, "ignore": 3},
        {"background": 0, "a": [1, 1], "zero": [0, 0], "b": [0, 2]},
    ],
)
def test_classes_and_label_type_are_those_of_nnunet(labels: dict[str, Any]) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from connectomics.models.plan_text import PlanText
    from connectomics.models.plans import labels as read_labels

    order = [2, 1]
    theirs = LabelManager(labels, order)
    table = read_labels(PlanText({"labels": labels, "regions_class_order": order}, "dataset.json"))
    assert len(table.class_values) == theirs.num_segmentation_heads
    if theirs.has_regions:
        assert [values if len(values) > 1 else values[0] for _, values in table.regions] == theirs.foreground_regions
        assert table.class_values == tuple(order)
    else:
        assert dict(table.label_names).keys() == labels.keys()
        assert (table.class_values, table.regions) == (tuple(range(len(table.class_values))), ())


def test_modality_is_the_older_key_for_channels(copied: Path) -> None:
    dataset = json.loads((copied / "dataset.json").read_text())
    dataset["modality"] = {"0": "SEM"}
    (copied / "dataset.json").write_text(json.dumps(dataset))
    assert read_spec(copied).channel_names == ("SEM",)


def test_ct_normalisation_keeps_the_training_intensities(tmp_path: Path) -> None:
    root = make_model(
        tmp_path,
        dimensions=2,
        patch=(16, 16),
        features=(4, 8),
        channels=2,
        scheme=("CTNormalization", "NoNormalization"),
        reader="SimpleITKIO",
    )
    spec = read_spec(root)
    assert [n.scheme for n in spec.normalisations] == ["CTNormalization", "NoNormalization"]
    first = spec.normalisations[0]
    assert (first.mean, first.std, first.lower, first.upper) == (120.0, 40.0, 20.0, 230.0)
    assert not spec.slice_case


def test_networks_that_were_let_go_are_loaded_again(copied: Path) -> None:
    loaded = load_model(ModelRequest(copied))
    before = [network.state_dict() for network in loaded.networks]
    first = weakref.ref(loaded.networks[0])
    loaded.networks.let_go()
    assert first() is None
    assert len(loaded.networks) == len(before)
    for state, network in zip(before, loaded.networks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state.values(), network.state_dict().values(), strict=True))


def test_networks_of_files_that_changed_meanwhile_are_refused(copied: Path) -> None:
    loaded = load_model(ModelRequest(copied))
    loaded.networks.let_go()
    plans = json.loads((copied / "plans.json").read_text())
    (copied / "plans.json").write_text(json.dumps(plans | {"plans_name": "another"}))
    with pytest.raises(ModelError, match=r"the model's files changed .*; run again"):
        loaded.networks[0]
