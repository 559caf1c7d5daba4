"""Configurations that must be refused: one line each, naming the key and what would be right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from connectomics.config.load import load_config
from connectomics.core.errors import ConfigError

WINDOW = "inference.sliding_window"
TTA = "inference.test_time_augmentation"
BINARY = "inference.postprocessing.binary"

# overrides, and what the sentence must contain
OVERRIDES: list[tuple[list[str], list[str]]] = [
    # unknown keys
    (["inference.volume_mode.stepp=2"], ["'inference.volume_mode.stepp'", "inference.volume_mode.step"]),
    (["inferense.case=slice"], ["nearest known key is inference.case"]),
    (["flip_axes=[1]"], [f"nearest known key is {TTA}.flip_axes"]),
    (["model.in_chanels=1"], ["nearest known key is model.in_channels"]),
    (["inference.batch_size=1"], ["nearest known key is system.inference.batch_size"]),
    (["inference.output={format:[h5]}"], ["nearest known key is inference.output.formats"]),
    (["quark=1"], ["no known key is like it", "inference"]),
    (["system.seed@run=1"], ["nearest known key is system.seed"]),
    # boxes and masks
    (["inference.roi=[]"], ["inference.roi is []", "[[z, y, x], [z, y, x]]"]),
    (["inference.roi=[[0,0],[1,2]]"], ["inference.roi", "[[z, y, x], [z, y, x]]"]),
    (["inference.roi=[[0,0,0],[1,2,3],[4,5,6]]"], ["inference.roi", "[[z, y, x], [z, y, x]]"]),
    (["inference.roi=[[0,0,-1],[1,2,3]]"], ["inference.roi", "the first voxel and the one after the last"]),
    (["inference.roi=[[0,2,0],[1,2,3]]"], ["inference.roi", "the first voxel and the one after the last"]),
    (["inference.mask="], ["inference.mask is ''", "must name a volume"]),
    (
        ["inference.mask=m.h5", f"{BINARY}.enabled=true", f"{BINARY}.remove_small_objects=9"],
        [f"{BINARY}.remove_small_objects is 9", "inference.mask", "whole ones"],
    ),
    (
        ["inference.roi=[[0,0,0],[1,2,3]]", f"{BINARY}.enabled=true", f"{BINARY}.fill_holes=true"],
        [f"{BINARY}.fill_holes is true", "inference.roi", "whole ones"],
    ),
    # grammar
    (["system.seed"], ["cannot be read", "key=value"]),
    (["system.seed=1,2"], ["several runs"]),
    (["~system.seed"], ["deletes"]),
    (["system=null"], ["system is a section"]),
    (["system=4"], ["system is a section", "found 4"]),
    (["system.seed={a:1}"], ["system.seed holds one value"]),
    (["inference={output.formats:[h5]}"], ["'output.formats' has dots"]),
    (["system.seed='a\nb"], ["cannot be read"]),
    # types
    (["system.seed=many"], ["system.seed is 'many'", "a whole number"]),
    (["inference.roi=[0,0,0,1,2,3]"], ["inference.roi is [0, 0, 0, 1, 2, 3]", "a list of lists", "or null"]),
    (["inference.roi=[[0,0,a],[1,2,3]]"], ["inference.roi", "a list of lists", "whole numbers"]),
    (["inference.roi=[[0,0,1.5],[1,2,3]]"], ["inference.roi", "a list of lists", "whole numbers"]),
    (["inference.roi=[['???',0,0],[1,2,3]]"], ["inference.roi", "a list of lists"]),
    (["inference.roi=4"], ["inference.roi is [4]", "a list of lists"]),
    (["system.seed=1.5"], ["system.seed is 1.5", "a whole number"]),
    (["system.seed=null"], ["system.seed is null", "a whole number"]),
    (["system.seed=[1]"], ["system.seed is [1]", "a whole number"]),
    (["system.num_cpus=true"], ["system.num_cpus is true", "a whole number, or null"]),
    (["inference.output.overwrite=perhaps"], ["inference.output.overwrite is 'perhaps'", "true or false"]),
    ([f"{WINDOW}.overlap=half"], [f"{WINDOW}.overlap is 'half'", "a number, or null"]),
    ([f"{WINDOW}.window_size=[64,big]"], [f"{WINDOW}.window_size", "a list, each a whole number"]),
    (["model.folds=[[0]]"], ["model.folds is [[0]]", "a list, each text"]),
    (["experiment_name=null"], ["experiment_name is null", "text"]),
    (["model.folds=['???']"], ["model.folds"]),
    # interpolation
    (["system.seed=${system.sed}"], ["has no value", "system.sed"]),
    (["system.seed=${system.seed}"], ["has no value"]),
    (["description=${oc.env:NOT_SET_ANYWHERE}"], ["has no value", "NOT_SET_ANYWHERE"]),
    (["description='${oc.decode:abc}'"], ["description", "only ${a.key} and ${oc.env:NAME}"]),
    (["model.folds=['${oc.create:abc}']"], ["model.folds", "only ${a.key} and ${oc.env:NAME}"]),
    # the machine
    (["system.device=gpu"], ["system.device is 'gpu'", "cuda:N"]),
    (["system.seed=-1"], ["system.seed is -1", "0 or more"]),
    (["system.num_cpus=0"], ["system.num_cpus is 0", "1 or more"]),
    (["system.inference.num_cpus=0"], ["system.inference.num_cpus is 0", "1 or more"]),
    (["system.inference.num_workers=0"], ["system.inference.num_workers is 0", "1 or more"]),
    (["system.memory_budget_gb=0"], ["system.memory_budget_gb is 0.0", "positive"]),
    (["system.memory_budget_gb=nan"], ["system.memory_budget_gb is nan", "positive"]),
    (["system.inference.batch_size=4"], ["system.inference.batch_size is 4", f"{WINDOW}.sw_batch_size"]),
    (["system.num_gpus=4"], ["system.num_gpus is 4", "one process per GPU", "start_index"]),
    (["system.inference.num_gpus=-1"], ["system.inference.num_gpus is -1", "0 or more"]),
    # the model
    (
        ["model.use_deep_supervision=true"],
        ["model.use_deep_supervision is true", "full-resolution head only"],
    ),
    (["model.nnunet_device=tpu"], ["model.nnunet_device is 'tpu'"]),
    (
        ["model.nnunet_device=cpu", "system.device=cuda"],
        ["model.nnunet_device is 'cpu'", "'cuda'", "state it once"],
    ),
    (["model.sha256=abc"], ["model.sha256 is 'abc'", "64 hexadecimal"]),
    (["model.folds=[]"], ["model.folds is []", "at least one"]),
    (["model.folds=[0,0]"], ["model.folds", "only once"]),
    (["model.folds=[0,best]"], ["model.folds is 'best'", "or all"]),
    (["model.checkpoint_name=fold_0/checkpoint.pth"], ["model.checkpoint_name", "without folders"]),
    (["model.in_channels=0"], ["model.in_channels is 0", "1 or more"]),
    (["data.out_channels=0"], ["data.out_channels is 0", "1 or more"]),
    (["data.in_channels=1", "model.in_channels=2"], ["data.in_channels is 1", "model.in_channels is 2"]),
    # volumes
    (["inference.volume_mode.start_index=-1"], ["inference.volume_mode.start_index is -1", "0 or more"]),
    (["inference.volume_mode.step=0"], ["inference.volume_mode.step is 0", "1 or more"]),
    (["inference.volume_mode.file_list=[]"], ["inference.volume_mode.file_list is []", "at least one"]),
    (["inference.volume_mode.file_list=[a.h5,a.h5]"], ["inference.volume_mode.file_list", "only once"]),
    (["inference.volume_mode.file_list=absent.txt"], ["'absent.txt'", "No such file", "[path]"]),
    (["inference.volume_mode.file_pattern="], ["inference.volume_mode.file_pattern is ''", "or null"]),
    (
        ["inference.volume_mode.file_list=[a.h5]", "inference.volume_mode.file_pattern=*.h5"],
        ["inference.volume_mode.file_pattern is '*.h5'", "file_list is given too"],
    ),
    (
        ["inference.volume_mode.output_suffix=../x"],
        ["inference.volume_mode.output_suffix", "letters, digits"],
    ),
    (["inference.data.output_path="], ["inference.data.output_path is ''", "folder"]),
    (["inference.case=plane"], ["inference.case is 'plane'", "auto, slice, volume"]),
    (["inference.voxel_size_nm=[8,8]"], ["inference.voxel_size_nm is [8.0, 8.0]", "nanometres"]),
    (["inference.voxel_size_nm=[30,0,8]"], ["inference.voxel_size_nm", "positive"]),
    (["inference.axes=zyy"], ["inference.axes is 'zyy'"]),
    (["inference.axes=qyx"], ["inference.axes is 'qyx'", "c, z, y, x"]),
    (["inference.block_shape=[64,64]"], ["inference.block_shape is [64, 64]", "3 whole numbers"]),
    (["inference.block_shape=[1,64,0]"], ["inference.block_shape is [1, 64, 0]", "1 or more"]),
    # windows and mirroring
    ([f"{WINDOW}.window_size=64"], [f"{WINDOW}.window_size is [64]", "2 or 3"]),
    ([f"{WINDOW}.overlap=1"], [f"{WINDOW}.overlap is 1.0", "below 1"]),
    ([f"{WINDOW}.overlap=-0.1"], [f"{WINDOW}.overlap is -0.1", "at least 0"]),
    ([f"{WINDOW}.sw_batch_size=0"], [f"{WINDOW}.sw_batch_size is 0", "1 or more"]),
    ([f"{WINDOW}.blending=linear"], [f"{WINDOW}.blending is 'linear'", "gaussian, constant"]),
    ([f"{WINDOW}.engine=torch"], [f"{WINDOW}.engine is 'torch'", "nnunet, monai"]),
    (
        [f"{WINDOW}.padding_mode=mirror"],
        [f"{WINDOW}.padding_mode is 'mirror'", "reflect, replicate, circular"],
    ),
    ([f"{WINDOW}.padding_mode=reflect"], [f"{WINDOW}.padding_mode is 'reflect'", "engine=monai"]),
    ([f"{TTA}.flip_axes=[3]"], [f"{TTA}.flip_axes is [3]", "0 = z, 1 = y, 2 = x"]),
    ([f"{TTA}.flip_axes=[1,1]"], [f"{TTA}.flip_axes is [1, 1]", "only once"]),
    ([f"{TTA}.ensemble_mode=max"], [f"{TTA}.ensemble_mode is 'max'", "must be mean"]),
    ([f"{TTA}.act=tanh"], [f"{TTA}.act is 'tanh'", "softmax, sigmoid, none", "null"]),
    ([f"{TTA}.act=none"], [f"{TTA}.act is 'none'", "save_probabilities=true"]),
    ([f"{TTA}.act=none", f"{BINARY}.enabled=true"], [f"{TTA}.act is 'none'", "must be null", "threshold"]),
    ([f"{TTA}.select_channel=1"], [f"{TTA}.select_channel is [1]", "save_probabilities=true"]),
    ([f"{TTA}.select_channel=-1"], [f"{TTA}.select_channel is [-1]", "from 0 on"]),
    ([f"{TTA}.select_channel=[1,1]"], [f"{TTA}.select_channel", "only once"]),
    # results
    ([f"{BINARY}.threshold=1.5"], [f"{BINARY}.threshold is 1.5", "between 0 and 1"]),
    ([f"{BINARY}.threshold=nan"], [f"{BINARY}.threshold is nan", "between 0 and 1"]),
    ([f"{BINARY}.remove_small_objects=-1"], [f"{BINARY}.remove_small_objects is -1", "0 or more"]),
    ([f"{BINARY}.remove_small_objects=9"], [f"{BINARY}.remove_small_objects is 9", "enabled=true"]),
    ([f"{BINARY}.fill_holes=true"], [f"{BINARY}.fill_holes is true", "enabled=true"]),
    (
        ["inference.postprocessing.intensity_scale=0"],
        ["inference.postprocessing.intensity_scale", "positive"],
    ),
    (
        ["inference.postprocessing.intensity_scale=2"],
        ["inference.postprocessing.intensity_scale", "save_prob"],
    ),
    (
        ["inference.postprocessing.intensity_dtype=int4"],
        ["inference.postprocessing.intensity_dtype", "float16"],
    ),
    (
        ["inference.postprocessing.intensity_dtype=uint8"],
        ["inference.postprocessing.intensity_dtype", "save_prob"],
    ),
    (["inference.output.formats=[]"], ["inference.output.formats is []", "h5"]),
    (["inference.output.formats=[h5,nifti]"], ["inference.output.formats is 'nifti'", "h5, zarr, tiff, png"]),
    (["inference.output.formats=[h5,h5]"], ["inference.output.formats", "only once"]),
    # known answers
    (["test.data.test_label=b.h5"], ["test.data.test_label is ['b.h5']", "needs test.data.test_image"]),
    (["test.data.test_image=['']"], ["test.data.test_image is ['']", "no empty one"]),
    (
        ["test.evaluation.metrics=[dice,auc]"],
        ["test.evaluation.metrics is 'auc'", "dice, iou, precision, recall"],
    ),
    (["test.evaluation.metrics=[]"], ["test.evaluation.metrics is []", "enabled=false"]),
    (["test.data.test_instances=i.h5"], ["test.data.test_instances is ['i.h5']", "needs test.data.test_label"]),
    (["test.data.test_ignore=m.h5"], ["test.data.test_ignore is ['m.h5']", "needs test.data.test_label"]),
    (["test.evaluation.ignore_label=-1"], ["test.evaluation.ignore_label is -1", "0 or more"]),
    (["test.evaluation.size_bounds=[5]"], ["test.evaluation.size_bounds is [5]", "name ap in test.evaluation.metrics"]),
    (["test.evaluation.metrics=[ap]", "test.evaluation.size_bounds=[9,5]"], ["size_bounds is [9, 5]", "ascending"]),
    (["test.evaluation.metrics=[pq]", "test.evaluation.foreground=true"], ["foreground is true", "dice, iou"]),
]

# content of the file, and what the sentence must contain besides the file's name
FILES: list[tuple[bytes, list[str]]] = [
    (b"system:\n  seed: [1\n", ["line 3", "not valid YAML"]),
    (b"system: {seed: 1}\nsystem: {seed: 2}\n", ["line 2", "not valid YAML", "system"]),
    (b"system:\n\tseed: 1\n", ["line 2", "not valid YAML"]),
    (b"a: 1\n---\nb: 2\n", ["not valid YAML"]),
    (b"description: \x00\n", ["not valid YAML"]),
    (b"description: " + b"[" * 1500, ["not valid YAML"]),
    (b"description: caf\xe9\n", ["not UTF-8 text", "byte 16"]),
    (b"- system\n- model\n", ["is not a mapping of keys but a list"]),
    (b"42\n", ["is not a mapping of keys"]),
    (b"system:\n  sead: 1\n", ["unknown key 'system.sead'", "nearest known key is system.seed"]),
    (b"inference.case: slice\n", ["'inference.case' has dots"]),
    (b"1: 2\n", ["unknown key '1'"]),
    (b"system: 3\n", ["system is a section", "found 3"]),
    (b"system: {seed: {value: 1}}\n", ["system.seed holds one value"]),
    (b"description: ${a\n", ["cannot be read"]),
    (b"description: !!python/object/apply:os.mkdir [executed]\n", ["line 1", "not valid YAML", "os.mkdir"]),
]


def refusal(path: Path | None, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("overrides", "hints"), OVERRIDES, ids=[" ".join(o) for o, _ in OVERRIDES])
def test_a_bad_override_is_refused_in_one_line(overrides: list[str], hints: list[str]) -> None:
    message = refusal(None, overrides)
    for hint in hints:
        assert hint in message


@pytest.mark.parametrize(("content", "hints"), FILES, ids=[str(c[:40]) for c, _ in FILES])
def test_a_bad_file_is_refused_in_one_line(
    content: bytes, hints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(path, [])
    for hint in ["bad.yaml", *hints]:
        assert hint in message
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"], "nothing the file brings may run"


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.yaml", [])
    assert "directory" in refusal(tmp_path, [])


def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "locked.yaml"
    path.write_text("system: {seed: 1}\n")
    path.chmod(0)
    is_root = os.geteuid() == 0  # root reads everything, so become nobody for a moment
    if is_root:
        os.seteuid(65534)
    try:
        message = refusal(path, [])
    finally:
        if is_root:
            os.seteuid(0)
    assert "locked.yaml cannot be read: Permission denied" in message


def test_a_file_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "volume.h5"
    path.write_bytes(b"\x89HDF\r\n\xff\xfe")
    message = refusal(None, [f"inference.volume_mode.file_list='{path}'"])
    assert "not UTF-8 text" in message and "[path]" in message
    path.write_text("# nothing\n\n")
    assert "at least one name" in refusal(None, [f"inference.volume_mode.file_list='{path}'"])
