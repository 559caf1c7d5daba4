"""Small models for tests, written by nnunetv2's own trainer, in folders like those of a real training.

``make_model`` takes about a tenth of a second a fold (after nnunetv2's import); keep its folders in session
fixtures.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATASET_NAME = "Dataset901_Small"
PLANS_NAME = "nnUNetPlans"


def _architecture(
    kind: str, dimensions: int, stages: int, features: Sequence[int], strides: list[Any], convolutions: int
) -> dict[str, Any]:
    blocks = "n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"
    network = "PlainConvUNet" if kind == "plain" else "ResidualEncoderUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * stages,
            "strides": strides,
            blocks: [convolutions] * stages,
            "n_conv_per_stage_decoder": [convolutions] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(
    *,
    dimensions: int,
    architecture: str = "plain",
    channels: int = 1,
    patch: Sequence[int],
    reader: str = "NaturalImage2DIO",
    scheme: str | Sequence[str] = "ZScoreNormalization",
    spacing: Sequence[float] | None = None,
    features: Sequence[int] = (4, 8),
    axis_order: Sequence[int] = (0, 1, 2),
    masked: Sequence[bool] = (),
    resampling: Mapping[str, Any] | None = None,
    name: str | None = None,
    previous_stage: str | None = None,
    convolutions: int = 1,
) -> dict[str, Any]:
    """Plans as nnunetv2 2.8's planner writes them; of their configurations the first is the model's."""
    name = name or ("2d" if dimensions == 2 else "3d_fullres")
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    stages = len(features)
    strides = [[1] * dimensions] + [[2] * dimensions] * (stages - 1)
    configuration = {
        "data_identifier": f"{PLANS_NAME}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(2 * p) for p in patch],
        "spacing": list(spacing or [1.0] * dimensions),
        "normalization_schemes": [scheme] * channels if isinstance(scheme, str) else list(scheme),
        "use_mask_for_norm": list(masked) if masked else [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resample,
        "resampling_fn_seg_kwargs": {**resample, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resample, "order": 1},
        "architecture": _architecture(architecture, dimensions, stages, features, strides, convolutions),
        "batch_dice": dimensions == 2,
        **(resampling or {}),
    }
    configurations = {name: configuration}
    if previous_stage is not None:
        kind, _, rest = name.partition("_")
        second = {"inherits_from": name, "previous_stage": previous_stage}
        configurations = {f"{kind}_cascade_{rest}".rstrip("_"): second, name: configuration}
    intensities = {"max": 250.0, "mean": 120.0, "median": 118.0, "min": 0.0, "std": 40.0}
    intensities |= {"percentile_00_5": 20.0, "percentile_99_5": 230.0}
    return {
        "dataset_name": DATASET_NAME,
        "plans_name": PLANS_NAME,
        "original_median_spacing_after_transp": [999.0, 1.0, 1.0] if dimensions == 2 else [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [1 if reader == "NaturalImage2DIO" else 16, 64, 64],
        "image_reader_writer": reader,
        "transpose_forward": list(axis_order),
        "transpose_backward": [list(axis_order).index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): dict(intensities) for c in range(channels)},
    }


def make_dataset(
    *,
    channels: int = 1,
    classes: int = 2,
    reader: str = "NaturalImage2DIO",
    labels: Mapping[str, int | list[int]] | None = None,
    regions_class_order: Sequence[int] | None = None,
) -> dict[str, Any]:
    """dataset.json with the labels given, else background, label_1, label_2, ..."""
    endings = {"NaturalImage2DIO": ".png", "Tiff3DIO": ".tif", "SimpleITKIO": ".nii.gz"}
    return {
        "channel_names": {str(c): f"EM{c}" for c in range(channels)},
        "labels": dict(labels or {"background": 0, **{f"label_{k}": k for k in range(1, classes)}}),
        **({} if regions_class_order is None else {"regions_class_order": list(regions_class_order)}),
        "numTraining": 4,
        "file_ending": endings[reader],
    }


def make_model(
    folder: Path,
    *,
    dimensions: int,
    architecture: str = "plain",
    channels: int = 1,
    classes: int = 2,
    patch: Sequence[int],
    folds: Sequence[str] = ("0",),
    mirror_axes: Sequence[int] | None = None,
    reader: str = "NaturalImage2DIO",
    scheme: str | Sequence[str] = "ZScoreNormalization",
    spacing: Sequence[float] | None = None,
    features: Sequence[int] = (4, 8),
    seed: int = 0,
    trainer: str = "nnUNetTrainer",
    give_weights: Callable[[torch.nn.Module], None] | None = None,
    labels: Mapping[str, int | list[int]] | None = None,
    regions_class_order: Sequence[int] | None = None,
    axis_order: Sequence[int] = (0, 1, 2),
    masked: Sequence[bool] = (),
    resampling: Mapping[str, Any] | None = None,
    name: str | None = None,
    previous_stage: str | None = None,
    convolutions: int = 1,
) -> Path:
    """Write a nnU-Net training folder and return it; weights are random unless ``give_weights`` sets others.

    Parameters
    ----------
    folder
        Where to make ``<trainer>__nnUNetPlans__<configuration>``.
    dimensions
        2 (configuration ``2d``) or 3 (``3d_fullres``).
    architecture
        ``plain`` (PlainConvUNet) or ``resenc`` (ResidualEncoderUNet).
    patch
        Two or three sizes, divisible by 2 to the number of stages less one.
    mirror_axes
        As in the checkpoint, axes of the patch; None: all, (): no mirroring.
    scheme
        Normalisation of each channel, or one for all.
    features
        Feature maps of each stage.
    seed
        Decides the weights, together with the fold's position.
    give_weights
        Changes the network in place before it is saved, for example trains it.
    labels, regions_class_order
        As in dataset.json; None: ``classes`` plain labels.
    axis_order
        ``transpose_forward``; the patch and the mirror axes are those of the transposed axes.
    masked
        ``use_mask_for_norm`` of each channel; empty: False for all.
    resampling
        Keys of the configuration that replace the planner's own resampling.
    name
        Of the configuration, where it is not ``2d`` or ``3d_fullres``.
    convolutions
        Of each stage; nnU-Net's planner takes 2.
    previous_stage
        Makes it the second stage of a cascade after the configuration of this name: of ``3d_fullres`` it makes
        ``3d_cascade_fullres``.
    """
    plans = make_plans(
        dimensions=dimensions,
        architecture=architecture,
        channels=channels,
        patch=patch,
        reader=reader,
        scheme=scheme,
        spacing=spacing,
        features=features,
        axis_order=axis_order,
        masked=masked,
        resampling=resampling,
        name=name,
        previous_stage=previous_stage,
        convolutions=convolutions,
    )
    dataset = make_dataset(
        channels=channels, classes=classes, reader=reader, labels=labels, regions_class_order=regions_class_order
    )
    configuration = next(iter(plans["configurations"]))
    root = folder / f"{trainer}__{PLANS_NAME}__{configuration}"
    axes = tuple(range(dimensions)) if mirror_axes is None else tuple(mirror_axes)
    for position, fold in enumerate(folds):
        target = root / f"fold_{fold}" / "checkpoint_final.pth"
        target.parent.mkdir(parents=True)
        _write_checkpoint(
            target, plans, dataset, fold, axes, trainer, give_weights or enliven, seed=1000 * seed + position
        )
    (root / "plans.json").write_text(json.dumps(plans, indent=4))
    (root / "dataset.json").write_text(json.dumps(dataset, indent=4))
    return root


def _write_checkpoint(
    target: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    fold: str,
    mirror_axes: tuple[int, ...],
    trainer_name: str,
    give_weights: Callable[[torch.nn.Module], None],
    *,
    seed: int,
) -> None:
    """Let nnU-Net's trainer build its network and save its checkpoint, with lively weights."""
    configuration = next(iter(plans["configurations"]))
    with _nnunet_folders(plans, configuration), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = _trainer_class(trainer_name)(
            {**copy.deepcopy(plans), "continue_training": False},
            configuration,
            fold if fold == "all" else int(fold),
            copy.deepcopy(dataset),
            device=torch.device("cpu"),
        )
        trainer.initialize()
        give_weights(trainer.network)
        trainer.inference_allowed_mirroring_axes = mirror_axes or None
        for value in (0.5, 0.6):
            trainer.logger.log("mean_fg_dice", np.float64(value), trainer.current_epoch)
            trainer.logger.log("dice_per_class_or_region", [np.float32(value)], trainer.current_epoch)
            trainer.current_epoch += 1
        trainer._best_ema = np.float64(0.51)
        trainer.save_checkpoint(str(target))


@torch.no_grad()
def enliven(network: torch.nn.Module) -> None:
    """Random affine normalisation and larger heads, so that every class wins somewhere in a random image."""
    for name, parameter in network.named_parameters():
        if ".norm." in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "seg_layers" in name and parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter))
        elif "seg_layers" in name:
            parameter.zero_()


@contextlib.contextmanager
def _nnunet_folders(plans: dict[str, Any], configuration: str) -> Iterator[None]:
    """A place for what a trainer writes beside its checkpoint, and silence."""
    folder = Path(tempfile.mkdtemp(prefix="nnunet_"))
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    before = {name: os.environ.get(name) for name in names}
    data = folder / "nnUNet_preprocessed" / plans["dataset_name"]
    data /= list(plans["configurations"].values())[-1]["data_identifier"]
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # the trainer infers its data format from one file's ending
    try:
        os.environ.update({name: str(folder / name) for name in names})
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder)


@functools.cache
def _trainer_class(name: str) -> Any:
    """A trainer class of nnunetv2, found as it does but without modules that need other packages."""
    import importlib
    import pkgutil

    import nnunetv2.training.nnUNetTrainer as home

    for module in pkgutil.walk_packages(home.__path__, f"{home.__name__}."):
        if "primus" not in module.name and not module.ispkg:
            found = vars(importlib.import_module(module.name)).get(name)
            if found is not None:
                return found
    raise LookupError(f"nnunetv2 has no trainer {name}")
