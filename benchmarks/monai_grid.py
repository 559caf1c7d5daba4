"""How many labels change when MONAI's sliding window replaces nnU-Net's grid: the shared 2D models on real EM.

Prints one line a model; docs/fidelity.md quotes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from connectomics.lightning.inference import InferenceManager  # noqa: E402

from conftest import shared_data_folder  # noqa: E402

WORDS = ["system.device=cpu", "system.num_cpus=1", "inference.test_time_augmentation.enabled=false"]


def main() -> int:
    data = shared_data_folder()
    if data is None:
        print("the shared models are not on this machine (set CONNECTOMICS_SHARED_DATA); nothing measured")
        return 0
    whole = np.asarray(Image.open(data / "em" / "vnc" / "raw" / "12.png"))
    for model, fold in (("vnc_mito_2d", "0"), ("vnc_multi_2d", "all")):
        for section in (whole, whole[:900, :1000]):
            labels = []
            for engine in ("nnunet", "monai"):
                words = [*WORDS, f"model.folds=[{fold}]", f"inference.sliding_window.engine={engine}"]
                labels.append(InferenceManager.from_checkpoint(data / "models" / model, words).predict(section).labels)
            share = float((labels[0] != labels[1]).mean())
            print(f"{model}, section of {section.shape}: {share:.2%} of the labels differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
