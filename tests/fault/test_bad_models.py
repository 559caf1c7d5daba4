"""Broken and hostile models: each is refused by one message with file and finding, and nothing runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.core.errors import ModelError, UnsafeModelError
from connectomics.models.checkpoint import load_model, read_spec
from connectomics.models.locate import ModelRequest

from nnunet_models import make_model

CHECKPOINT = "fold_0/checkpoint_final.pth"


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("good_model"), dimensions=2, patch=(16, 16), folds=("0", "1"), features=(4, 8)
    )


class Calls:
    """Unpickling an instance without restriction calls ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def touch_command(root: Path) -> str:
    return f"touch '{root.parent / 'marker'}'"


def edit_json(root: Path, change: Callable[[dict[str, Any]], Any], name: str = "plans.json") -> None:
    values = json.loads((root / name).read_text())
    change(values)
    (root / name).write_text(json.dumps(values, indent=2))


def edit_configuration(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(root, lambda plans: change(plans["configurations"]["2d"]))


def edit_network(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_configuration(root, lambda configuration: change(configuration["architecture"]))


def set_argument(root: Path, key: str, value: Any) -> None:
    edit_network(root, lambda network: network["arch_kwargs"].update({key: value}))


def edit_labels(root: Path, labels: dict[str, Any]) -> None:
    edit_json(root, lambda dataset: dataset.update(labels=labels), "dataset.json")


def edit_regions(root: Path, order: list[Any]) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    edit_json(root, lambda dataset: dataset.update(labels=labels, regions_class_order=order), "dataset.json")


def edit_checkpoint(root: Path, change: Callable[[dict[str, Any]], Any], name: str = CHECKPOINT) -> None:
    content = torch.load(root / name, weights_only=False)
    change(content)
    torch.save(content, root / name)


def edit_weight(root: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def apply(content: dict[str, Any]) -> None:
        key = "decoder.seg_layers.0.weight"
        content["network_weights"][key] = change(content["network_weights"][key])

    edit_checkpoint(root, apply)


def old_plans(network: str | None) -> Callable[[Path], None]:
    def change(configuration: dict[str, Any]) -> None:
        del configuration["architecture"]
        if network is not None:
            configuration["UNet_class_name"] = network

    return lambda root: edit_configuration(root, change)


def hide_code(root: Path, function: Callable[..., Any], *arguments: Any) -> None:
    edit_checkpoint(root, lambda content: content["logging"].update(note=Calls(function, *arguments)))


def zip_without_pickle(root: Path) -> None:
    with zipfile.ZipFile(root / CHECKPOINT, "w") as archive:
        archive.writestr("checkpoint/version", "3")


def cut(root: Path, share: float) -> None:
    data = (root / CHECKPOINT).read_bytes()
    (root / CHECKPOINT).write_bytes(data[: int(len(data) * share)])


def garble_pickle(root: Path) -> None:
    """Swap one instruction of the pickle inside the zip for another."""
    target = root / CHECKPOINT
    with zipfile.ZipFile(target) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(b"}q", b"aq", 1) if name.endswith("data.pkl") else data)


def circle(plans: dict[str, Any]) -> None:
    plans["configurations"]["2d"]["inherits_from"] = "2d_large"
    plans["configurations"]["2d_large"] = {"inherits_from": "2d"}


def second_fold_without_mirroring(content: dict[str, Any]) -> None:
    content["inference_allowed_mirroring_axes"] = None


@dataclass(frozen=True)
class Case:
    """``damage`` changes a copy of the good model; loading ``path`` within it says every one of ``words``."""

    name: str
    damage: Callable[[Path], object]
    words: tuple[str, ...]
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    error: type[ModelError] = ModelError


def nothing(root: Path) -> None:
    """Leave the model as it is."""


HOSTILE = [
    Case(
        "pickle calls os.system",
        lambda r: hide_code(r, os.system, touch_command(r)),
        (CHECKPOINT, f"{os.name}.system", "model.trust_code"),
    ),
    Case(
        "pickle calls eval",
        lambda r: hide_code(r, eval, f"__import__('os').system({touch_command(r)!r})"),
        (CHECKPOINT, "eval"),
    ),
    Case(
        "pickle loads another pickle",
        lambda r: hide_code(r, torch.load, str(r / "other.pth")),
        (CHECKPOINT, "torch.serialization.load"),
    ),
    Case(
        "a bare pickle, no zip",
        lambda r: (r / CHECKPOINT).write_bytes(pickle.dumps(Calls(os.system, touch_command(r)))),
        (CHECKPOINT, f"{os.name}.system"),
    ),
    Case(
        "a bare pickle of the oldest protocol",
        lambda r: (r / CHECKPOINT).write_bytes(pickle.dumps(Calls(os.system, touch_command(r)), protocol=0)),
        (CHECKPOINT, f"{os.name}.system"),
    ),
    Case(
        "a numpy array of objects",
        lambda r: edit_checkpoint(r, lambda c: c["logging"].update(note=np.array([{}], dtype=object))),
        (CHECKPOINT, "numpy dtype 'O8' is not a plain number"),
    ),
    Case(
        "plans name os.system as the network",
        lambda r: edit_network(r, lambda n: n.update(network_class_name="os.system")),
        ("plans.json", "'network_class_name' names 'os.system'", "model.trust_code"),
    ),
    Case(
        "plans name another class of the networks' package",
        lambda r: edit_network(
            r, lambda n: n.update(network_class_name="dynamic_network_architectures.architectures.vgg.VGG")
        ),
        ("plans.json", "vgg.VGG"),
    ),
    Case(
        "plans hide a call behind a network's name",
        lambda r: edit_network(
            r,
            lambda n: n.update(
                network_class_name="dynamic_network_architectures.architectures.unet.torch.hub.PlainConvUNet"
            ),
        ),
        ("plans.json", "unet.torch.hub.PlainConvUNet"),
    ),
    Case(
        "plans name os.system as the nonlinearity",
        lambda r: set_argument(r, "nonlin", "os.system"),
        ("plans.json", "'nonlin' names 'os.system'"),
    ),
    Case(
        "plans name a layer in the place of another",
        lambda r: set_argument(r, "norm_op", "torch.nn.LeakyReLU"),
        ("plans.json", "'norm_op' names 'torch.nn.LeakyReLU'"),
    ),
    Case(
        "plans have an innocent argument imported",
        lambda r: [
            set_argument(r, "conv_bias", "os.system"),
            edit_network(r, lambda n: n["_kw_requires_import"].append("conv_bias")),
        ],
        ("plans.json", "'conv_bias' names 'os.system'"),
    ),
]

BROKEN = [
    Case("cut in half", lambda r: cut(r, 0.5), (CHECKPOINT, "cut short", "sha256")),
    Case("cut at the end", lambda r: cut(r, 0.999), (CHECKPOINT, "cut short")),
    Case("empty file", lambda r: cut(r, 0.0), (CHECKPOINT, "0 bytes")),
    Case(
        "text",
        lambda r: (r / CHECKPOINT).write_text("version https"),
        (CHECKPOINT, "not a PyTorch checkpoint"),
    ),
    Case("zip without pickle", zip_without_pickle, (CHECKPOINT, "0 data.pkl")),
    Case("garbled pickle", garble_pickle, (CHECKPOINT, "damaged")),
    Case("a list", lambda r: torch.save([1, 2], r / CHECKPOINT), (CHECKPOINT, "holds a list")),
    Case(
        "weights alone",
        lambda r: torch.save({"a": torch.ones(1)}, r / CHECKPOINT),
        ("lacks 'network_weights'",),
    ),
    Case(
        "no trainer name",
        lambda r: edit_checkpoint(r, lambda c: c.pop("trainer_name")),
        (CHECKPOINT, "lacks 'trainer_name'"),
    ),
    Case(
        "no configuration",
        lambda r: edit_checkpoint(r, lambda c: c["init_args"].pop("configuration")),
        (CHECKPOINT, "lack 'configuration'"),
    ),
    Case(
        "weights that are no tensors",
        lambda r: edit_checkpoint(r, lambda c: c["network_weights"].update(extra=3)),
        (CHECKPOINT, "'extra'", "not a tensor"),
    ),
    Case(
        "a weight is missing",
        lambda r: edit_checkpoint(r, lambda c: c["network_weights"].pop("decoder.seg_layers.0.bias")),
        (CHECKPOINT, "'decoder.seg_layers.0.bias' is missing", "plans.json"),
    ),
    Case(
        "weights too many",
        lambda r: edit_checkpoint(r, lambda c: c["network_weights"].update(a=torch.ones(1), b=torch.ones(1))),
        (CHECKPOINT, "'a' is not expected (and 1 more)"),
    ),
    Case(
        "a weight of another shape",
        lambda r: edit_weight(r, lambda w: w[:, :1]),
        (CHECKPOINT, "'decoder.seg_layers.0.weight' [2, 1, 1, 1]", "expected [2, 4, 1, 1]"),
    ),
    Case("a weight of whole numbers", lambda r: edit_weight(r, lambda w: w.long()), (CHECKPOINT, "int64")),
    Case(
        "a weight that is not a number",
        lambda r: edit_weight(r, lambda w: w * float("nan")),
        (CHECKPOINT, "decoder.seg_layers.0.weight", "not finite"),
    ),
    Case(
        "more labels than the weights have",
        lambda r: edit_labels(r, {"background": 0, "a": 1, "b": 2}),
        (CHECKPOINT, "seg_layers", "expected [3, 4, 1, 1]"),
    ),
    Case("no plans", lambda r: (r / "plans.json").unlink(), ("plans.json", "lacks this file")),
    Case("no dataset", lambda r: (r / "dataset.json").unlink(), ("dataset.json", "lacks this file")),
    Case(
        "broken JSON",
        lambda r: (r / "plans.json").write_text('{\n "a": 1,\n}'),
        ("plans.json", "broken JSON at line 3"),
    ),
    Case("JSON list", lambda r: (r / "dataset.json").write_text("[]"), ("dataset.json", "holds a list")),
    Case(
        "not text",
        lambda r: (r / "plans.json").write_bytes(b"\xff\xfe\x00"),
        ("plans.json", "not a JSON text"),
    ),
    Case(
        "JSON too deep",
        lambda r: (r / "plans.json").write_text("[" * 99999),
        ("plans.json", "not a JSON text"),
    ),
    Case(
        "configuration not in plans",
        lambda r: edit_json(r, lambda p: p["configurations"].update({"3d": p["configurations"].pop("2d")})),
        ("plans.json", "no configuration '2d', found: 3d"),
    ),
    Case(
        "no configurations",
        lambda r: edit_json(r, lambda p: p.pop("configurations")),
        ("'configurations' is missing",),
    ),
    Case("inherits in a circle", lambda r: edit_json(r, circle), ("plans.json", "2d -> 2d_large -> 2d")),
    Case("old plans without network", old_plans(None), ("plans.json", "UNet_class_name")),
    Case("old plans, unknown network", old_plans("Transformer"), ("plans.json", "cannot be converted")),
    Case(
        "patch of four axes",
        lambda r: edit_configuration(r, lambda c: c.update(patch_size=[16] * 4)),
        ("plans.json", "'patch_size' has 4 axes"),
    ),
    Case(
        "absurd patch",
        lambda r: edit_configuration(r, lambda c: c.update(patch_size=[16, 1 << 20])),
        ("plans.json", "1048576", "up to 4096"),
    ),
    Case(
        "patch that does not divide",
        lambda r: edit_configuration(r, lambda c: c.update(patch_size=[16, 17])),
        ("plans.json", "(1, 16, 17)", "along axis x"),
    ),
    Case(
        "negative spacing",
        lambda r: edit_configuration(r, lambda c: c.update(spacing=[1.0, -1.0])),
        ("plans.json", "'spacing' is [1.0, -1.0]"),
    ),
    Case(
        "patch of another type",
        lambda r: edit_configuration(r, lambda c: c.update(patch_size="16x16")),
        ("plans.json", "'patch_size' is '16x16'"),
    ),
    Case(
        "absurd stages",
        lambda r: set_argument(r, "n_stages", 10**9),
        ("'n_stages' holds 1000000000", "1 to 12"),
    ),
    Case("absurd features", lambda r: set_argument(r, "features_per_stage", [4, 10**8]), ("1 to 8192",)),
    Case("features as text", lambda r: set_argument(r, "features_per_stage", "4"), ("holds '4'",)),
    Case(
        "stages that contradict",
        lambda r: set_argument(r, "n_stages", 3),
        ("plans.json", "PlainConvUNet", "cannot be built"),
    ),
    Case("unknown argument", lambda r: set_argument(r, "attention", True), ("plans.json", "'attention'")),
    Case(
        "missing argument",
        lambda r: edit_network(r, lambda n: n["arch_kwargs"].pop("strides")),
        ("plans.json", "strides", "cannot be built"),
    ),
    Case(
        "import of an argument that is not there",
        lambda r: edit_network(r, lambda n: n["_kw_requires_import"].append("gate")),
        ("plans.json", "_kw_requires_import names 'gate'"),
    ),
    Case(
        "class name that is not imported",
        lambda r: edit_network(r, lambda n: n["_kw_requires_import"].remove("nonlin")),
        ("plans.json", "'nonlin'", "not listed in _kw_requires_import"),
    ),
    Case(
        "3D convolutions in a 2D plan",
        lambda r: set_argument(r, "conv_op", "torch.nn.Conv3d"),
        ("plans.json", "Conv3d", "2 axes"),
    ),
    Case(
        "labels without background",
        lambda r: edit_labels(r, {"a": 0, "b": 1}),
        ("dataset.json", "lack 'background'"),
    ),
    Case(
        "axes that are no permutation",
        lambda r: edit_json(r, lambda p: p.update(transpose_forward=[2, 0, 0])),
        ("plans.json", "'transpose_forward' is [2, 0, 0]", "0, 1 and 2 in some order"),
    ),
    Case(
        "axes of another type",
        lambda r: edit_json(r, lambda p: p.update(transpose_forward="zyx")),
        ("plans.json", "'transpose_forward' is 'zyx'"),
    ),
    Case(
        "axes that are not transposed back",
        lambda r: edit_json(r, lambda p: p.update(transpose_forward=[2, 0, 1])),
        ("plans.json", "'transpose_backward' is [0, 1, 2], expected [1, 2, 0]"),
    ),
    Case(
        "regions without an order",
        lambda r: edit_labels(r, {"background": 0, "whole": [1, 2], "core": 2}),
        ("dataset.json", "'regions_class_order' is missing", "2 whole numbers from 0 to 255"),
    ),
    Case(
        "regions with an order of another length",
        lambda r: edit_regions(r, [1, 2, 3]),
        ("dataset.json", "'regions_class_order' is [1, 2, 3]", "2 whole numbers"),
    ),
    Case(
        "regions painted beyond the type of labels",
        lambda r: edit_regions(r, [1, 256]),
        ("dataset.json", "'regions_class_order' is [1, 256]", "from 0 to 255"),
    ),
    Case(
        "regions painted with words",
        lambda r: edit_regions(r, ["1", True]),
        ("dataset.json", "'regions_class_order' is ['1', True]"),
    ),
    Case(
        "a region of words",
        lambda r: edit_labels(r, {"background": 0, "whole": [1, "two"]}),
        ("dataset.json", "label 'whole' is [1, 'two']", "whole number"),
    ),
    Case(
        "an ignore label that is a region",
        lambda r: edit_labels(r, {"background": 0, "a": 1, "ignore": [2, 3]}),
        ("dataset.json", "label 'ignore' is [2, 3]", "whole number"),
    ),
    Case(
        "labels in nnU-Net v1's form",
        lambda r: edit_labels(r, {"0": "background"}),
        ("dataset.json", "label '0'"),
    ),
    Case(
        "ignore label in between",
        lambda r: edit_labels(r, {"background": 0, "a": 2, "ignore": 1}),
        ("dataset.json", "'ignore' is 1", "3"),
    ),
    Case(
        "no channels",
        lambda r: edit_json(r, lambda d: d.update(channel_names={}), "dataset.json"),
        ("dataset.json", "'channel_names' is empty"),
    ),
    Case(
        "one scheme too many",
        lambda r: edit_configuration(r, lambda c: c["normalization_schemes"].append("NoNormalization")),
        ("plans.json", "2 normalization_schemes for the 1 channels"),
    ),
    Case(
        "a mask for one channel too many",
        lambda r: edit_configuration(r, lambda c: c.update(use_mask_for_norm=[True, False])),
        ("plans.json", "'use_mask_for_norm' is [True, False], expected true or false for each of the 1 channels"),
    ),
    Case(
        "a mask that is no truth value",
        lambda r: edit_configuration(r, lambda c: c.update(use_mask_for_norm=["no"])),
        ("plans.json", "'use_mask_for_norm' is ['no'], expected true or false"),
    ),
    Case(
        "CT without intensities",
        lambda r: [
            edit_json(r, lambda p: p.pop("foreground_intensity_properties_per_channel")),
            edit_configuration(r, lambda c: c.update(normalization_schemes=["CTNormalization"])),
        ],
        ("plans.json", "CTNormalization of channel 0 needs mean"),
    ),
    Case(
        "mirror axis the model lacks",
        lambda r: edit_checkpoint(r, lambda c: c.update(inference_allowed_mirroring_axes=(0, 2)), CHECKPOINT),
        (CHECKPOINT, "(0, 2)", "2 axes"),
        path=CHECKPOINT,
    ),
    Case(
        "mirror axes of another type",
        lambda r: edit_checkpoint(r, lambda c: c.update(inference_allowed_mirroring_axes="xy")),
        (CHECKPOINT, "'xy'"),
    ),
    Case(
        "folds that disagree",
        lambda r: edit_checkpoint(r, second_fold_without_mirroring, "fold_1/checkpoint_final.pth"),
        ("fold_1/checkpoint_final.pth", "mirror axes", "fold_0/checkpoint_final.pth"),
    ),
    Case(
        "checkpoint's own plans are no mapping",
        lambda r: [(r / "plans.json").unlink(), edit_checkpoint(r, lambda c: c["init_args"].update(plans=3))],
        (CHECKPOINT, "init_args 'plans'", "holds a int"),
        path=CHECKPOINT,
    ),
    Case(
        "checkpoint's own plans hold a tensor",
        lambda r: [
            (r / "plans.json").unlink(),
            edit_checkpoint(r, lambda c: c["init_args"]["plans"].update(x=torch.ones(1))),
        ],
        (CHECKPOINT, "init_args 'plans'", "not plain values"),
        path=CHECKPOINT,
    ),
]

CASCADES = [
    Case(
        "previous stage without a name",
        lambda r: edit_configuration(r, lambda c: c.update(previous_stage=3)),
        ("plans.json", "'previous_stage' is 3", "configuration's name"),
    ),
    Case(
        "first stage called a second",
        lambda r: edit_configuration(r, lambda c: c.update(previous_stage="3d_lowres")),
        ("weights do not fit", "plans.json"),
        path=CHECKPOINT,
    ),
]

UNSUPPORTED = [
    Case(
        "custom preprocessor",
        lambda r: edit_configuration(r, lambda c: c.update(preprocessor_name="MyPreprocessor")),
        ("plans.json", "not supported yet", "MyPreprocessor"),
    ),
    Case(
        "custom label manager",
        lambda r: edit_json(r, lambda p: p.update(label_manager="MyLabels")),
        ("plans.json", "not supported yet", "MyLabels"),
    ),
    Case(
        "custom normalisation",
        lambda r: edit_configuration(r, lambda c: c.update(normalization_schemes=["Percentiles"])),
        ("plans.json", "unknown normalisation 'Percentiles'"),
    ),
    Case(
        "unknown trainer",
        lambda r: edit_checkpoint(r, lambda c: c.update(trainer_name="MyTrainer")),
        (CHECKPOINT, "unknown trainer 'MyTrainer'", "model.trust_code"),
        path=CHECKPOINT,
    ),
]

MISPLACED = [
    Case("no such path", nothing, ("nowhere.pth", "no such file or folder"), path="nowhere.pth"),
    Case("empty folder", lambda r: (r / "empty").mkdir(), ("empty", "none"), path="empty"),
    Case("folder named .pth", lambda r: (r / "a.pth").mkdir(), ("a.pth", "no fold_X folder"), path="a.pth"),
    Case("name too long", nothing, ("cannot be read",), path="x" * 300),
    Case("no such fold", nothing, ("fold_7", "fold_0/checkpoint_final.pth"), options={"folds": ("7",)}),
    Case("a fold twice", nothing, ("each once",), options={"folds": ("0", "0")}),
    Case("no fold at all", nothing, ("at least one fold",), options={"folds": ()}),
    Case("other fold than the folder", nothing, ("this is fold 0",), path="fold_0", options={"folds": ("1",)}),
    Case("folds of a file", nothing, (CHECKPOINT, "folds 1"), path=CHECKPOINT, options={"folds": ("1",)}),
    Case(
        "no such checkpoint",
        nothing,
        ("no fold_X folder holds a checkpoint_best.pth", CHECKPOINT),
        options={"checkpoint_name": "checkpoint_best.pth"},
    ),
    Case(
        "stated plans absent",
        nothing,
        ("absent.json", "no such file"),
        options={"plans": Path("absent.json")},
    ),
    Case("other sha256", nothing, ("sha256 is", "0000"), path=CHECKPOINT, options={"sha256": "0" * 64}),
    Case("other sha256 of an ensemble", nothing, ("sha256 is", "0000"), options={"sha256": "0" * 64}),
    Case("unknown architecture", nothing, ("'monai'", "known: nnunet"), options={"architecture": "monai"}),
]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        pytest.param(case, error, id=case.name)
        for cases, error in (
            (HOSTILE, UnsafeModelError),
            (BROKEN, ModelError),
            (UNSUPPORTED, ModelError),
            (CASCADES, ModelError),
            (MISPLACED, ModelError),
        )
        for case in cases
    ],
)
def test_is_refused_with_a_reason(case: Case, error: type[ModelError], good_model: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    case.damage(root)
    with pytest.raises(ModelError) as caught:
        load_model(ModelRequest(root / case.path, **case.options))
    message = str(caught.value)
    assert type(caught.value) is error
    for word in case.words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 700
    assert not (tmp_path / "marker").exists()


def test_the_hostile_pickles_are_live(good_model: Path, tmp_path: Path) -> None:
    """With model.trust_code the same file does run: the refusals above are not refusals of a dud."""
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    hide_code(root, os.system, touch_command(root))
    load_model(ModelRequest(root, folds=("0",), trust_code=True))
    assert (tmp_path / "marker").exists()


def test_a_stated_sha256_is_compared_before_anything_is_unpickled(good_model: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    hide_code(root, os.system, touch_command(root))
    with pytest.raises(ModelError, match=r"model\.sha256"):
        load_model(ModelRequest(root, folds=("0",), trust_code=True, sha256="0" * 64))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("damage", [lambda r: cut(r, 0.5), lambda r: (r / CHECKPOINT).write_text("version https")])
def test_a_damaged_file_is_refused_even_with_trust(
    good_model: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    damage(root)
    with pytest.raises(ModelError, match="damaged"):
        load_model(ModelRequest(root, trust_code=True))


def test_a_trusted_class_that_does_not_exist_is_named(good_model: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    edit_network(root, lambda network: network.update(network_class_name="nowhere.Network"))
    with pytest.raises(ModelError, match=r"nowhere\.Network.*cannot be imported"):
        load_model(ModelRequest(root, trust_code=True))


def test_values_of_the_weights_are_left_to_load_model(good_model: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    edit_weight(root, lambda weight: weight * float("inf"))
    assert read_spec(root).configuration == "2d"
    with pytest.raises(ModelError, match="not finite"):
        load_model(ModelRequest(root))


def paths_in(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in parsed JSON, from the outside in."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths_in(value[key], (*path, key))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_nonsense_anywhere_in_the_json_gives_our_error_or_none(good_model: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(good_model, tmp_path / good_model.name)
    text = (root / name).read_text()
    nonsense = [None, -1, 7, float("nan"), True, "os.system", [], [[1]], [[1, [2]]], {}, {"a": 1}, 10**30]
    chosen = random.Random(4)
    refused = 0
    for place in paths_in(json.loads(text)):
        values = json.loads(text)
        target = values
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = chosen.choice(nonsense)
        (root / name).write_text(json.dumps(values))
        try:
            read_spec(ModelRequest(root, folds=("0",)))
        except ModelError as error:
            assert "\n" not in str(error), place
            refused += 1
    assert refused > 3


def test_every_cut_of_a_small_checkpoint_is_refused(tmp_path: Path) -> None:
    """A sweep over lengths: no length gives anything but our error."""
    whole = tmp_path / "whole.pth"
    torch.save(OrderedDict(a=torch.arange(64.0)), whole)
    data = whole.read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "cut.pth").write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut\.pth"):
            load_model(ModelRequest(tmp_path / "cut.pth"))


@contextlib.contextmanager
def world_readable_copy(source: Path) -> Iterator[Path]:
    """A copy that an unprivileged user can reach; pytest's own folders are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="bad_models_"))
    try:
        folder.chmod(0o755)
        yield shutil.copytree(source, folder / source.name)
    finally:
        shutil.rmtree(folder)


def message_of_unprivileged(path: Path) -> str:
    """What loading says to a user who is not root, who may read everything."""
    if os.geteuid() != 0:
        with pytest.raises(ModelError) as caught:
            load_model(ModelRequest(path))
        return str(caught.value)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            load_model(ModelRequest(path))
        except ModelError as error:
            os.write(writing, str(error).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        message = stream.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return message


@pytest.mark.parametrize("name", [CHECKPOINT, "plans.json", "fold_0", "."])
def test_what_may_not_be_read_is_named(good_model: Path, name: str) -> None:
    with world_readable_copy(good_model) as root:
        assert load_model(ModelRequest(root)).spec.folds == ("0", "1")
        (root / name).chmod(0)
        message = message_of_unprivileged(root)
        (root / name).chmod(0o755)
    assert "Permission denied" in message
    assert str(root / name) in message
