"""Mitochondria as objects on real EM: the shared 2D model, sections it never saw, components, scores of objects.

The model ``vnc_mito_2d`` (fold 0) was trained on sections of one stack; nnU-Net's own split kept 00, 07, 08 and 11 for
validation, so fold 0 did not learn from them, but they lie next to sections it did learn from, and the fold was looked
at on them. The published truth is a binary mask, not objects: truth and prediction are labelled alike, by components.

``sections`` takes each section by itself (8-connected): sections are 45 nm thick and pixels 4.6 nm, so what touches
from one section to the next is often not one object. ``stack`` takes all 16 sections as a volume (26-connected), of
which fold 0 has seen 12 in training: its scores are for comparing, not for judging the model. ``phantom`` takes 16
sections of the phantom (seed 21, which the embedded model was not trained on), whose truth is objects; it needs no data
and makes the picture of the README. Objects of fewer than ``--smallest`` voxels are removed on both sides.

``--linked`` compares ways to make objects of a stack or of the phantom: 26-connected, and sections linked over z by
``slice_linking``; also with one section missing in the prediction. A true mask is labelled 26-connected and, as
"alike", in the same way.

CONNECTOMICS_SHARED_DATA names the data, which are CC BY-NC-SA 3.0
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
import h5py
import imageio.v3 as iio
import numpy as np
import numpy.typing as npt

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from connectomics import Box, InferenceManager, load_config, open_volume  # noqa: E402
from connectomics.assembly.decode_inputs import DecodingInput  # noqa: E402
from connectomics.assembly.decode_jobs import decoding_request  # noqa: E402
from connectomics.commands.decode import Decoder  # noqa: E402
from connectomics.commands.evaluate import Scores, score_table  # noqa: E402
from connectomics.evaluate.contingency import Contingency, side_by_side  # noqa: E402
from connectomics.evaluate.instances import instance_scores  # noqa: E402
from connectomics.evaluate.montage import montage  # noqa: E402
from connectomics.evaluate.pairs import MATCHED, ObjectPairs, match_table, write_matches  # noqa: E402
from connectomics.evaluate.semantic import Confusion  # noqa: E402
from connectomics.evaluate.semantic import scores as semantic_scores  # noqa: E402

UNSEEN = (0, 7, 8, 11)
EMBEDDED = REPOSITORY / "connectomics" / "example" / "phantom_mito_2d"
PHANTOM = "phantom:16x512x512?seed=21"
Array = npt.NDArray[Any]
CLASSES = {"background": (0,), "mitochondrion": (1,)}
SHOWN = 3  # section of a stack
CORNER = (slice(0, 440), slice(0, 440))  # pixels of the picture
METRICS = ("dice", "iou", "precision", "recall")
WAYS = {
    "26-connected": "connected_components, connectivity: 26",
    "linked": "slice_linking",
    "linked, over a gap": "slice_linking, max_gap: 1",
    "linked one to one": "slice_linking, one_to_one: true",
    "linked by overlap": "slice_linking, measure: overlap, threshold: 0.5",
}
MISSING = 8  # section


def predicted(model: Path, folds: str, raw: Array) -> Array:
    """Foreground (z, y, x) of sections (z, y, x), one forward pass after the other."""
    words = [f"model.folds={folds}", "system.device=cpu", "system.num_cpus=1"]
    manager = InferenceManager.from_checkpoint(model, words)
    found: Array = np.concatenate([manager.predict(section[None]).labels for section in raw]) > 0
    return found


def real(shared: Path, sections: list[int]) -> tuple[Array, Array, Array]:
    """Raw, predicted and true foreground, (z, y, x)."""
    raw = np.stack([iio.imread(shared / f"em/vnc/raw/{n:02}.png") for n in sections])
    truth = np.stack([iio.imread(shared / f"em/vnc/mito/{n:02}.png") > 0 for n in sections])
    return raw, predicted(shared / "models" / "vnc_mito_2d", "[0]", raw), truth


def phantom() -> tuple[Array, Array, Array]:
    """Raw, predicted foreground and true ids, (z, y, x)."""
    raw, truth = (
        reader.read(Box.of_shape(reader.info.extent))[0]
        for reader in (open_volume(f"{PHANTOM}&what={what}") for what in ("image", "instances"))
    )
    return raw, predicted(EMBEDDED, "[all]", raw), truth


def objects(labels: Array, smallest: int) -> Array:
    """Components of a section (8-connected) or a stack (26-connected), of a mask; ids stay what they are."""
    if labels.dtype == bool:
        flat = labels[0] if len(labels) == 1 else labels
        labels = cc3d.connected_components(flat, connectivity=8 if flat.ndim == 2 else 26).reshape(labels.shape)
    ids, sizes = np.unique(labels, return_counts=True)
    kept: Array = np.where(np.isin(labels, ids[sizes >= smallest]), labels, 0)
    return kept


def decoded(mask: Array, step: str) -> Array:
    """Ids of a mask's objects, by a step of ``decoding``."""
    with tempfile.TemporaryDirectory() as place:
        with h5py.File(f"{place}/v.h5", "w") as file:
            file["main"] = mask.astype(np.uint8)
        words = [f"decoding=[{{name: {step}}}]", f"inference.data.output_path='{place}'", "inference.output.table=none"]
        (outcome,) = Decoder(decoding_request(load_config(None, words))).run([DecodingInput(f"{place}/v.h5")])
        assert outcome.state == "done", outcome.reason
        with h5py.File(outcome.paths[0]) as file:
            ids: Array = file["main"][:]
    return ids


def components(mask: Array, smallest: int) -> Array:
    """Ids of the prediction's objects as a user makes them; ``objects`` makes the truth's without this program."""
    ids = decoded(mask, f"connected_components, connectivity: {8 if len(mask) == 1 else 26}")
    return objects(ids, smallest)


def compare_ways(given: Array, truth: Array, smallest: int) -> None:
    """Print counts and average precisions of each way, of the whole prediction and without one section."""
    without = given.copy()
    without[MISSING] = False
    print(f"{'':28}{'predicted':>10}{'true':>6}{'AP50':>7}{'AP75':>7}{'alike: true':>14}{'AP50':>7}{'AP75':>7}")
    for title, mask in (("", given), (f", {MISSING} missing", without)):
        for way, step in WAYS.items():
            found, line = objects(decoded(mask, step), smallest), f"{way + title:28}"
            alike = decoded(truth, step) if truth.dtype == bool else truth
            for width, expected in ((6, objects(truth, smallest)), (14, objects(alike, smallest))):
                scores = instance_scores(Contingency.from_arrays(found, expected), ["ap"])
                line += f"{scores['prediction_objects']:10}" if width == 6 else ""
                line += f"{scores['truth_objects']:{width}}{scores['ap50']:7.3f}{scores['ap75']:7.3f}"
            print(line)


def painted_as_truth(given: Array, truth: Array) -> Array:
    """Predicted ids, those of matched objects replaced by their partners', so that a picture gives both one colour."""
    rows = match_table(ObjectPairs.of(Contingency.from_arrays(given, truth)))
    matched = rows["kind"] == MATCHED
    partner = dict(zip(rows["prediction"][matched].tolist(), rows["truth"][matched].tolist(), strict=True))
    painted: Array = np.vectorize(lambda n: partner.get(n, n + int(truth.max()) if n else 0), otypes=[np.int64])(given)
    return painted


def entry(ids: Contingency, given: Array, truth: Array) -> dict[str, Any]:
    """Scores of classes and of objects."""
    table = Contingency.from_arrays(given, truth).as_foreground()
    found = semantic_scores(Confusion.of(table, 2), CLASSES, METRICS)
    return found | {"instances": instance_scores(ids)}


def measured(given: Array, truth: Array, names: list[str], smallest: int, folder: Path) -> Scores:
    """Scores of each piece (a section or the stack) by its name, and of all."""
    tables = [
        Contingency.from_arrays(components(p, smallest), objects(t, smallest))
        for p, t in zip(given, truth, strict=True)
    ]
    rows = zip(names, tables, given, truth, strict=True)
    volumes = {name: entry(table, p, t) for name, table, p, t in rows}
    paths = [
        write_matches(match_table(ObjectPairs.of(table)), folder, name.replace(" ", "_"))
        for name, table in zip(names, tables, strict=True)
    ]
    pooled = entry(side_by_side(tables), np.concatenate(list(given)), np.concatenate(list(truth)))
    return Scores(folder / "mito_instances.json", volumes, pooled, {}, tuple(paths))


def main() -> None:
    """Predict, label, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", choices=["sections", "stack", "phantom"], default="sections")
    parser.add_argument("--smallest", type=int, default=100, metavar="VOXELS", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for tables of matches and a picture; outside the project")
    parser.add_argument("--linked", action="store_true", help="compare ways to make objects of sections, and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = parser.parse_args()
    sections = list(UNSEEN) if words.labelled == "sections" else list(range(16))
    whole = words.labelled == "phantom"
    raw, given, truth = phantom() if whole else real(Path(os.environ["CONNECTOMICS_SHARED_DATA"]), sections)
    if words.linked:
        compare_ways(given, truth, words.smallest)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = words.output or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if words.labelled == "sections":
            names = [f"section {n:02}" for n in sections]
            result = measured(given[:, None], truth[:, None], names, words.smallest, folder)
        else:
            names = ["16 sections"]
            result = measured(given[None], truth[None], names, words.smallest, folder)
        if words.output:
            cut = slice(None) if len(names) == 1 else slice(1, 2)
            found, expected = components(given[cut], words.smallest), objects(truth[cut], words.smallest)
            place = min(SHOWN, len(found) - 1)
            panels = (raw[cut][place], painted_as_truth(found, expected)[place], expected[place])
            montage(*(panel[CORNER] for panel in panels), path=folder / "mito_instances.png")
    if words.json:
        print(json.dumps(result.content, indent=1))
        return
    print(score_table(result))
    for name, count in (("matched at 0.5", "50"), ("matched at 0.75", "75")):
        counts = result.pooled["instances"]["matched"][count]
        print(f"{name:16} tp {counts['tp']}, fp {counts['fp']}, fn {counts['fn']}")


if __name__ == "__main__":
    main()
