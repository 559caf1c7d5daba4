"""``connectomics demo``: the main job on an embedded phantom with an embedded model; prints what it found and where."""

from __future__ import annotations

from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path

from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.volumes import named_sources
from connectomics.commands.evaluate import evaluate_outcomes, score_table
from connectomics.config.load import load_config
from connectomics.core.errors import ConnectomicsError
from connectomics.core.geometry import Box
from connectomics.evaluate.montage import montage
from connectomics.jobs.outcome import Observer
from connectomics.lightning.inference import VolumeProcessor
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Array

VOLUME = "phantom:6x512x512?seed=7"
TRUTH = f"{VOLUME}&what=label"
SHOWN_SECTION = 3
PROMISED_DICE = 0.9


def run_demo(folder: Path, observer: Observer) -> list[str]:
    """Label the phantom, measure it against its ground truth, draw a montage; the lines to print.

    A second run finds the work in ``folder`` done. ConnectomicsError where the volume could not be finished, or where
    its labels have a lower Dice than the model is known to reach.
    """
    words = ["experiment_name=demo", "inference.output.formats=[h5,png]", "inference.output.overwrite=true"]
    words += [f"test.data.test_image='{VOLUME}'", f"test.data.test_label='{TRUTH}'"]
    config = load_config(None, [f"inference.data.output_path={folder}", *words])
    with as_file(files("connectomics") / "example" / "phantom_mito_2d") as model:
        engine = build_engine(config, model)
    outcomes = VolumeProcessor(config, engine, observer).run(named_sources([VOLUME], engine.spec.channels))
    if outcomes[0].state == "failed":
        raise ConnectomicsError(outcomes[0].reason)
    scores = evaluate_outcomes(config.test, engine, outcomes)
    for name, row in scores.pooled["labels"].items():
        if (row["dice"] or 0.0) < PROMISED_DICE:
            raise ConnectomicsError(
                f"{VOLUME}: the Dice of {name} is {row['dice']}, the embedded model reaches {PROMISED_DICE} or more; "
                "run connectomics doctor, and install the versions of this package's dependencies again"
            )
    labels = outcomes[0].paths[0]
    picture = folder / "montage.png"
    montage(_section(VOLUME), _section(str(labels)), _section(TRUTH), picture)
    return [
        f"{outcomes[0].state}: {VOLUME} with the embedded model ({engine.spec.parameters / 1e6:.2f} M parameters)",
        score_table(scores),
        f"labels   {labels} (HDF5, dataset main) and {outcomes[0].paths[1]}",
        f"picture  {picture} (section {SHOWN_SECTION}: raw, prediction, truth)",
        f"scores   {scores.path}",
    ]


def _section(uri: str) -> Array:
    with closing(open_volume(uri)) as reader:
        _, height, width = reader.info.extent
        section: Array = reader.read(Box((SHOWN_SECTION, 0, 0), (SHOWN_SECTION + 1, height, width)))[0, 0]
    return section
