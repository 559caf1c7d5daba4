"""The oracle: nnunetv2 itself, with float32 accumulators and Gaussian, and a case's exact statistics injected.

Nothing of ours computes here, except that ``summaries`` (from our survey) may replace nnU-Net's float32 mean and std.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from connectomics.inference.case import Case
from connectomics.inference.normalise import ChannelSummary

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    from nnunetv2.ensembling.ensemble import average_probabilities
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def make_predictor(folder: Path, folds: Sequence[str], *, mirror: bool = True, step: float = 0.5) -> Any:
    """A ``nnUNetPredictor`` on the CPU for a training folder, without nnunetv2's search through all trainers."""
    import json

    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    dataset = json.loads((folder / "dataset.json").read_text())
    states = [
        torch.load(folder / f"fold_{f}" / "checkpoint_final.pth", map_location="cpu", weights_only=False) for f in folds
    ]
    configuration = plans.get_configuration(states[0]["init_args"]["configuration"])
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, configuration, dataset),
        plans.get_label_manager(dataset).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )
    network.load_state_dict(states[0]["network_weights"])
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = predict_from_raw_data.nnUNetPredictor(
            tile_step_size=step, use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False
        )
    predictor.manual_initialization(
        network,
        plans,
        configuration,
        [s["network_weights"] for s in states],
        dataset,
        states[0]["trainer_name"],
        states[0]["inference_allowed_mirroring_axes"],
    )
    return predictor


@contextlib.contextmanager
def float32_accumulators() -> Iterator[None]:
    """Let nnU-Net accumulate in float32 instead of half precision, with a float32 Gaussian."""
    gaussian: Any = functools.partial(compute_gaussian, dtype=torch.float32)
    gaussian.cache_clear = compute_gaussian.cache_clear
    with (
        mock.patch.object(torch, "half", torch.float32),
        mock.patch.object(predict_from_raw_data, "compute_gaussian", gaussian),
    ):
        yield


@contextlib.contextmanager
def injected(summaries: Sequence[ChannelSummary]) -> Iterator[None]:
    """Let nnU-Net's z-score use these statistics, one channel after the other, within its own mask where it has one."""
    channels = iter(summaries)

    def run(self: Any, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        summary = next(channels)
        image = image.astype(np.float32, copy=False)
        where = np.ones(image.shape, bool)
        if self.use_mask_for_norm:
            assert seg is not None
            where = seg >= 0
        image[where] = (image[where] - np.float32(summary.mean)) / max(np.float32(summary.std), np.float32(1e-8))
        return image

    with mock.patch.object(ZScoreNormalization, "run", run):
        yield


def planned_spacing(predictor: Any) -> list[float]:
    """The spacing (z, y, x) of an image that is not resampled."""
    planned = list(predictor.configuration_manager.spacing)
    planned = [999.0] * (3 - len(planned)) + planned
    return [planned[axis] for axis in predictor.plans_manager.transpose_backward]


def predict(
    predictor: Any,
    image: np.ndarray,
    *,
    exact: bool = True,
    summaries: Sequence[ChannelSummary] | None = None,
    probabilities: bool = False,
    spacing: Sequence[float] | None = None,
    previous: np.ndarray | None = None,
) -> Any:
    """nnU-Net's segmentation (z, y, x) of one case, and its probabilities (k, z, y, x) on request.

    Parameters
    ----------
    image
        (c, z, y, x), raw.
    exact
        float32 accumulators; False is stock nnU-Net.
    summaries
        Statistics to use instead of nnU-Net's own.
    spacing
        Of the image (z, y, x); that of the plan, so that nothing is resampled, where it is not given.
    previous
        Labels (z, y, x) of the previous stage of a cascade, which nnU-Net's readers give as float32.
    """
    properties = {"spacing": list(spacing or planned_spacing(predictor))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if exact:
            stack.enter_context(float32_accumulators())
        if summaries is not None:
            stack.enter_context(injected(summaries))
        stage = None if previous is None else previous[None].astype(np.float32)
        return predictor.predict_single_npy_array(image, properties, stage, None, probabilities)


def predict_files(predictor: Any, images: Path, output: Path, *, exact: bool = True) -> None:
    """What ``nnUNetv2_predict`` does with a folder of images, read and written by nnU-Net, in this process."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if exact:
            stack.enter_context(float32_accumulators())
        if hasattr(predictor, "predict_from_files_sequential"):
            predictor.predict_from_files_sequential(str(images), str(output), False, True)
            return
        reader = predictor.plans_manager.image_reader_writer_class()  # nnunetv2 2.5 has processes only
        ending = predictor.dataset_json["file_ending"]
        for first in sorted(images.glob(f"*_0000{ending}")):
            case = first.name[: -len(ending) - 5]
            files = sorted(str(path) for path in images.glob(f"{case}_????{ending}"))
            image, properties = reader.read_images(files)
            predictor.predict_single_npy_array(image, properties, None, str(output / case), False)


def command(
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    entry: str = "predict_entry_point",
    exact: bool = False,
) -> None:
    """Run ``nnUNetv2_predict`` itself, in this process: case after case, which nnU-Net offers too, on one thread.

    Parameters
    ----------
    words
        Its arguments.
    environment
        ``nnUNet_results`` and its like.
    entry
        The function that the command calls.
    exact
        float32 accumulators; False is stock nnU-Net.
    """

    def sequential(
        self: Any,
        images: Any,
        output: Any,
        save_probabilities: bool,
        overwrite: bool,
        folder_with_segs_from_prev_stage: str | None = None,
        **_: object,
    ) -> Any:
        found = (images, output, save_probabilities, overwrite, folder_with_segs_from_prev_stage)
        return self.predict_from_files_sequential(*found)

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(folders_of(environment or {}))
        stack.enter_context(mock.patch.object(sys, "argv", [entry, *words]))
        stack.enter_context(mock.patch.object(multiprocessing, "cpu_count", lambda: 1))
        stack.enter_context(mock.patch.object(predict_from_raw_data.nnUNetPredictor, "predict_from_files", sequential))
        if exact:
            stack.enter_context(float32_accumulators())
        vars(predict_from_raw_data)[entry]()


@contextlib.contextmanager
def folders_of(environment: Mapping[str, str]) -> Iterator[None]:
    """Let nnU-Net find its folders where an environment says; older releases read it when they are imported."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name, module in list(sys.modules.items()):
            for variable in environment if name.startswith("nnunetv2.") else ():
                if isinstance(vars(module).get(variable, 0), str | None):
                    stack.enter_context(mock.patch.object(module, variable, environment[variable]))
        yield


@contextlib.contextmanager
def computed_once(predictor: Any) -> Iterator[None]:
    """Let the logits of one case serve every call."""
    logits: list[torch.Tensor] = []
    compute = predictor.predict_logits_from_preprocessed_data

    def run(data: torch.Tensor) -> torch.Tensor:
        if not logits:
            logits.append(compute(data))
        return logits[0].clone()

    with mock.patch.object(predictor, "predict_logits_from_preprocessed_data", run):
        yield


Answer = tuple[np.ndarray, np.ndarray]


def predict_cases(
    predictor: Any,
    image: np.ndarray,
    cases: Sequence[Case],
    spacing: Sequence[float] | None,
    *,
    exact: bool = True,
    inject: bool = False,
    previous: np.ndarray | None = None,
) -> Answer:
    """nnU-Net's labels (from logits) and probabilities of a volume that is one case, or a case for each section.

    ``inject`` gives it the cases' own statistics.
    """
    labels, probabilities = [], []
    for case in cases:
        part = image[(slice(None), *case.region.slices)]
        options: dict[str, Any] = {"exact": exact, "summaries": case.channels if inject else None, "spacing": spacing}
        options["previous"] = None if previous is None else previous[case.region.slices]
        with computed_once(predictor):
            labels.append(predict(predictor, part, **options))
            probabilities.append(predict(predictor, part, **options, probabilities=True)[1])
    return np.concatenate(labels), np.concatenate(probabilities, axis=1)


def ensembled(label_manager: Any, answers: Sequence[Answer]) -> Answer:
    """What nnU-Net makes of its members' answers; a single one stands for itself."""
    if len(answers) == 1:
        return answers[0]
    with tempfile.TemporaryDirectory() as folder:
        for i, (_, probabilities) in enumerate(answers):
            np.savez(f"{folder}/{i}.npz", probabilities=probabilities)
        mean = average_probabilities([f"{folder}/{i}.npz" for i in range(len(answers))])
    return label_manager.convert_probabilities_to_segmentation(mean), mean
