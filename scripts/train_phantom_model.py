"""Train the embedded example model: nnU-Net on sections of the phantom, by nnunetv2's own code.

    python scripts/train_phantom_model.py --work DIR --output connectomics/example/phantom_mito_2d

Writes the sections as a raw dataset, lets nnunetv2 plan, makes the planned network smaller, preprocesses,
trains with a stock trainer, copies what inference needs, and scores it on sections of a seed it has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from connectomics.core.geometry import Box
from connectomics.volumes.phantom.volume import open_phantom, section_damage

DATASET = "Dataset001_PhantomMito"
PLANS = "nnUNetPlans_small"
SIDE = 512
TRAINING_SEEDS = range(101, 113)
SCORE_SEED = 7  # the demonstration's; not among the training seeds
FEATURES = [8, 16, 32, 64, 64, 64]


def training_sections() -> list[tuple[int, int]]:
    """(seed, z): four well separated sections of each seed, and one folded and one faint one of some."""
    sections = []
    for n, seed in enumerate(TRAINING_SEEDS):
        sections += [(seed, z) for z in (5, 62, 119, 176) if section_damage(seed, z) == ""]
        if n % 3 == 0:
            damaged = {section_damage(seed, z): (seed, z) for z in range(2000)}
            sections += [damaged["fold"], damaged["faint"]]
    return sections


def read_section(what: str, seed: int, z: int) -> Any:
    """One section (SIDE x SIDE, uint8), taken at another place for each seed and z."""
    y, x = 600 * (z % 7), 600 * (seed % 11)
    reader = open_phantom(f"phantom:{z + 1}x8192x8192?seed={seed}&what={what}")
    return reader.read(Box((z, y, x), (z + 1, y + SIDE, x + SIDE)))[0, 0]


def write_raw_dataset(folder: Path) -> None:
    """Write the training sections as nnU-Net wants them."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sections = training_sections()
    for seed, z in sections:
        case = f"phantom_{seed}_{z:04d}"
        imageio.imwrite(folder / "imagesTr" / f"{case}_0000.png", read_section("image", seed, z))
        imageio.imwrite(folder / "labelsTr" / f"{case}.png", read_section("label", seed, z))
    description = {
        "channel_names": {"0": "EM"},
        "labels": {"background": 0, "mitochondrion": 1},
        "numTraining": len(sections),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=4))


def plan_and_preprocess(preprocessed: Path) -> None:
    """nnU-Net's planning, a smaller network and patch under another plans name, its preprocessing."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )

    extract_fingerprint_dataset(1, num_processes=1, check_dataset_integrity=True)
    plan_experiment_dataset(1)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    plans["configurations"] = {"2d": plans["configurations"]["2d"]}
    plan = plans["configurations"]["2d"]
    plan["patch_size"] = [256, 256]
    plan["batch_size"] = 2
    stages = len(FEATURES)
    plan["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": FEATURES,
        "kernel_sizes": [[3, 3]] * stages,
        "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }
    (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans, indent=4))
    preprocess_dataset(1, PLANS, ("2d",), (1,))


def train(preprocessed: Path, epochs: int) -> Path:
    """Train on all sections with nnU-Net's trainer for ``epochs``; the folder of the trained model.

    The class is imported from its own module: nnU-Net's search by name imports every trainer there is, and
    some of them need packages that are not wanted here.
    """
    import torch
    from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs

    name = "nnUNetTrainer_1epoch" if epochs == 1 else f"nnUNetTrainer_{epochs}epochs"
    plans = json.loads((preprocessed / f"{PLANS}.json").read_text()) | {"continue_training": False}
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    trainer = vars(nnUNetTrainer_Xepochs)[name](plans, "2d", "all", dataset, torch.device("cpu"))
    trainer.run_training()
    return Path(trainer.output_folder_base)


def copy_model(trained: Path, output: Path) -> Path:
    """Copy plans, dataset.json and the checkpoint without optimiser state and log; the checkpoint's path."""
    import torch

    checkpoint = torch.load(trained / "fold_all" / "checkpoint_final.pth", "cpu", weights_only=False)
    del checkpoint["optimizer_state"], checkpoint["logging"]
    target = output / "fold_all" / "checkpoint_final.pth"
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, target)
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(trained / name, output / name)
    return target


def score(model: Path, sections: int) -> None:
    """Print Dice on sections of the seed that was not trained on, as nnU-Net's own predictor labels them."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(model / "plans.json"))
    dataset = json.loads((model / "dataset.json").read_text())
    checkpoint = torch.load(model / "fold_all" / "checkpoint_final.pth", "cpu", weights_only=False)
    configuration = plans.get_configuration("2d")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        plans.get_label_manager(dataset).num_segmentation_heads,
        deep_supervision=False,
    )
    axes = checkpoint["inference_allowed_mirroring_axes"]
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    weights = [checkpoint["network_weights"]]
    predictor.manual_initialization(network, plans, configuration, weights, dataset, checkpoint["trainer_name"], axes)
    network.load_state_dict(weights[0])
    scores = []
    for z in range(sections):
        image = read_section("image", SCORE_SEED, z).astype(np.float32)[None, None]
        truth = read_section("label", SCORE_SEED, z) > 0
        found = predictor.predict_single_npy_array(image, {"spacing": [999, 1, 1]}, None, None, False)[0] > 0
        scores.append(2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1))
        print(f"seed {SCORE_SEED} section {z:3d} {section_damage(SCORE_SEED, z):6s} Dice {scores[-1]:.4f}")
    print(f"mean Dice of {sections} sections: {np.mean(scores):.4f}")


def main() -> None:
    """Run all steps; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's files, about 100 MB")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--epochs", type=int, choices=(1, 5, 10, 20, 50, 100), default=10)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--score-only", action="store_true", help="train nothing, score --output")
    arguments = parser.parse_args()

    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(arguments.work.resolve() / name)
    import torch

    torch.set_num_threads(arguments.threads)
    if not arguments.score_only:
        preprocessed = arguments.work.resolve() / "preprocessed" / DATASET
        write_raw_dataset(arguments.work.resolve() / "raw" / DATASET)
        plan_and_preprocess(preprocessed)
        # augmentation in this process; set only now because the planner cannot do with 0
        os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
        torch.set_num_threads(arguments.threads)
        checkpoint = copy_model(train(preprocessed, arguments.epochs), arguments.output)
        print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.2f} MB")
    score(arguments.output, 24)


if __name__ == "__main__":
    main()
