"""Voxels a second of ``connectomics evaluate``: the table of pairs, reading, and scores, beside scikit-image's table.

Truth is the phantom's mitochondria as components, or with ``--labels`` any volume of ids (``.npy``); the prediction is
the truth moved by some voxels. Prints ratios of one run; ``--quick`` takes a small volume, ``--json`` prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cc3d
import h5py
import numpy as np
from skimage.metrics import contingency_table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from connectomics.core.geometry import Box  # noqa: E402
from connectomics.evaluate.comparison import Comparison, compare  # noqa: E402
from connectomics.evaluate.contingency import Contingency  # noqa: E402
from connectomics.evaluate.instances import instance_scores  # noqa: E402
from connectomics.volumes.opening import open_volume  # noqa: E402


def ids(words: argparse.Namespace) -> np.ndarray:
    """The truth, (z, y, x)."""
    if words.labels:
        found: np.ndarray = np.load(words.labels)
        return found
    shape = "16x512x512" if words.quick else "64x2048x2048"
    reader = open_volume(f"phantom:{shape}?seed=7&what=label")
    return cc3d.connected_components(reader.read(Box.of_shape(reader.info.extent))[0])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Best of three, and what came out."""
    best, found = float("inf"), None
    for _ in range(3):
        began = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - began)
    return best, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small phantom")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--labels", type=Path, help="a .npy of ids instead of the phantom")
    words = parser.parse_args()
    truth = ids(words)
    prediction = np.roll(truth, (0, 3, 2), (0, 1, 2))
    counting, table = timed(lambda: Contingency.from_arrays(prediction, truth))
    theirs, dense = timed(lambda: contingency_table(truth, prediction, sparse_type="array"))
    scoring, scores = timed(lambda: instance_scores(table))
    with tempfile.TemporaryDirectory() as folder:
        job = Comparison("volume", f"{folder}/prediction.h5", f"{folder}/truth.h5")
        for path, array in ((job.prediction, prediction), (job.truth, truth)):
            with h5py.File(path, "w") as file:
                file.create_dataset("main", data=array, chunks=True, compression="lzf", shuffle=True)
        streaming, streamed = timed(lambda: compare(job))
    same = dense.nnz == streamed.counts.size and int(streamed.counts.sum()) == truth.size
    facts = {
        "machine": platform.platform(),
        "voxels": truth.size,
        "pairs": int(table.counts.size),
        "objects": scores["truth_objects"],
        "counting_voxels_per_s": truth.size / counting,
        "streaming_from_hdf5_voxels_per_s": truth.size / streaming,
        "scikit_image_table_voxels_per_s": truth.size / theirs,
        "times_faster_than_scikit_image": theirs / counting,
        "scores_s": scoring,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tables_agree": same,
    }
    if words.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")


if __name__ == "__main__":
    main()
