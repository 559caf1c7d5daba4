"""Mitochondria as objects on real EM: the shared 2D model, sections it never saw, components, scores of objects.

The model ``vnc_mito_2d`` (fold 0) was trained on sections of one stack; nnU-Net's own split kept 00, 07, 08 and 11 for
validation, so fold 0 did not learn from them, but they lie next to sections it did learn from, and the fold was looked
at on them. The published truth is a binary mask, not objects: truth and prediction are labelled alike, by components.

``sections`` takes each section by itself (8-connected): sections are 45 nm thick and pixels 4.6 nm, so what touches
from one section to the next is often not one object. ``stack`` takes all 16 sections as a volume (26-connected), of
which fold 0 has seen 12 in training: its scores are for comparing, not for judging the model. Components of fewer than
``--smallest`` voxels are removed on both sides. CONNECTOMICS_SHARED_DATA names the data, which are CC BY-NC-SA 3.0
(Gerhard et al. 2013) and not part of the project; keep pictures of them out of it too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cc3d
import imageio.v3 as iio
import numpy as np
import numpy.typing as npt

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from connectomics import InferenceManager  # noqa: E402
from connectomics.evaluate.contingency import Contingency, side_by_side  # noqa: E402
from connectomics.evaluate.instances import instance_scores  # noqa: E402
from connectomics.evaluate.montage import montage  # noqa: E402
from connectomics.evaluate.objects import Overlaps, match_table, write_matches  # noqa: E402
from connectomics.evaluate.semantic import Confusion  # noqa: E402
from connectomics.evaluate.semantic import scores as semantic_scores  # noqa: E402
from connectomics.lightning.evaluation import Scores  # noqa: E402
from connectomics.lightning.score_table import score_table  # noqa: E402

UNSEEN = (0, 7, 8, 11)
Array = npt.NDArray[Any]
CLASSES = {"background": (0,), "mitochondrion": (1,)}
METRICS = ("dice", "iou", "precision", "recall")


def predicted(shared: Path, sections: list[int]) -> tuple[Array, Array, Array]:
    """Raw, predicted and true foreground, (z, y, x)."""
    words = ["model.folds=[0]", "system.device=cpu", "system.num_cpus=1"]
    manager = InferenceManager.from_checkpoint(shared / "models" / "vnc_mito_2d", words)
    raw = np.stack([iio.imread(shared / f"em/vnc/raw/{n:02}.png") for n in sections])
    truth = np.stack([iio.imread(shared / f"em/vnc/mito/{n:02}.png") > 0 for n in sections])
    given = np.concatenate([manager.predict(section[None]).labels for section in raw])
    return raw, given > 0, truth


def objects(mask: Array, smallest: int) -> Array:
    """Components of a section (8-connected) or a stack (26-connected)."""
    flat = mask[0] if len(mask) == 1 else mask
    found = cc3d.connected_components(flat, connectivity=8 if flat.ndim == 2 else 26)
    kept: Array = cc3d.dust(found, threshold=smallest, connectivity=8 if flat.ndim == 2 else 26)
    return kept.reshape(mask.shape)


def entry(ids: Contingency, given: Array, truth: Array) -> dict[str, Any]:
    """Scores of classes and of objects."""
    found = semantic_scores(Confusion.of(Contingency.from_arrays(given, truth), 2), CLASSES, METRICS)
    return found | {"instances": instance_scores(ids)}


def measured(given: Array, truth: Array, names: list[str], smallest: int, folder: Path) -> Scores:
    """Scores of each piece (a section or the stack) by its name, and of all."""
    tables = [
        Contingency.from_arrays(objects(p, smallest), objects(t, smallest)) for p, t in zip(given, truth, strict=True)
    ]
    rows = zip(names, tables, given, truth, strict=True)
    volumes = {name: entry(table, p, t) for name, table, p, t in rows}
    paths = [
        write_matches(match_table(Overlaps.of(table)), folder, name.replace(" ", "_"))
        for name, table in zip(names, tables, strict=True)
    ]
    pooled = entry(side_by_side(tables), np.concatenate(list(given)), np.concatenate(list(truth)))
    return Scores(folder / "mito_instances.json", volumes, pooled, {}, tuple(paths))


def main() -> None:
    """Predict, label, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", choices=["sections", "stack"], default="sections")
    parser.add_argument("--smallest", type=int, default=100, metavar="VOXELS", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for tables of matches and a picture; outside the project")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = parser.parse_args()
    shared = Path(os.environ["CONNECTOMICS_SHARED_DATA"])
    sections = list(UNSEEN) if words.labelled == "sections" else list(range(16))
    raw, given, truth = predicted(shared, sections)
    with tempfile.TemporaryDirectory() as place:
        folder = words.output or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if words.labelled == "sections":
            names = [f"section {n:02}" for n in sections]
            result = measured(given[:, None], truth[:, None], names, words.smallest, folder)
        else:
            result = measured(given[None], truth[None], ["16 sections"], words.smallest, folder)
        if words.output:
            shown = [objects(mask[1:2], words.smallest)[0] for mask in (given, truth)]
            montage(raw[1], shown[0], shown[1], folder / "mito_instances.png")
    if words.json:
        print(json.dumps(result.content, indent=1))
        return
    print(score_table(result))
    for name, count in (("matched at 0.5", "50"), ("matched at 0.75", "75")):
        counts = result.pooled["instances"]["matched"][count]
        print(f"{name:16} tp {counts['tp']}, fp {counts['fp']}, fn {counts['fn']}")


if __name__ == "__main__":
    main()
