"""What ``--mode test`` does once the labels are there: compare them with the truth piece by piece, keep the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.build.engine import Engine
from connectomics.build.volumes import wanted_of
from connectomics.config.schema import Config
from connectomics.errors import ConfigError, ConnectomicsError, VolumeError
from connectomics.evaluate.semantic import Confusion, scores
from connectomics.geometry import BlockGrid, Vec3, vec3
from connectomics.io.atomic import write_text
from connectomics.io.listing import VolumeSource
from connectomics.io.opening import open_volume
from connectomics.io.volume import VolumeInfo, VolumeReader
from connectomics.lightning.inference import VolumeOutcome
from connectomics.pipeline.wanted import Wanted

PIECE: Vec3 = (16, 1024, 1024)  # voxels compared at once
BINARY = 2


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics per volume and over all volumes pooled, where they are saved, and what could not be measured."""

    path: Path
    volumes: Mapping[str, Mapping[str, Any]]
    pooled: Mapping[str, Any]
    failures: Mapping[str, str]


def check_truths(sources: Sequence[VolumeSource], truths: Sequence[str]) -> None:
    """Refuse, before the work, a list of truths that does not match the volumes.

    Raises
    ------
    ConfigError
        If there is not one truth a volume.
    """
    if len(truths) != len(sources):
        raise ConfigError(
            f"test.data.test_label names {len(truths)} volumes, test.data.test_image {len(sources)}; state one label "
            "volume for each image, in the same order"
        )


def evaluate_outcomes(
    config: Config, engine: Engine, outcomes: Sequence[VolumeOutcome], truths: Sequence[str]
) -> Scores:
    """Compare finished labels with their truths; saves ``scores.json`` in the output folder.

    Parameters
    ----------
    outcomes
        Of the volumes, in the order of ``test.data.test_image``; those after a stop are not there.
    truths
        A volume of labels for each, same extent; with two classes everything above 0 is foreground. Voxels with the
        model's ignore label are not counted, nor are those outside ``inference.roi`` and ``inference.mask``.
    """
    classes, spec = engine.spec.class_labels, engine.spec
    count = 1 + max(*(v for values in classes.values() for v in values), *spec.class_values)
    metrics = config.test.evaluation.metrics
    pooled, volumes, failures = Confusion.zero(count), {}, {}
    for outcome, truth in zip(outcomes, truths, strict=False):
        if outcome.state == "failed":
            continue
        try:
            confusion = compare(outcome.paths[0], truth, count, spec.ignored_label, config)
        except ConnectomicsError as error:
            failures[outcome.name] = str(error)
            continue
        volumes[outcome.name] = scores(confusion, classes, metrics)
        pooled += confusion
    result = Scores(engine.settings.folder / "scores.json", volumes, scores(pooled, classes, metrics), failures)
    content = {"pooled": result.pooled, "volumes": volumes, "failed": failures}
    write_text(result.path, json.dumps(content, indent=1) + "\n")
    return result


def compare(
    prediction: Path, truth: str, labels: int, ignored: int | None = None, config: Config | None = None
) -> Confusion:
    """Confusion of two volumes of labels 0 to ``labels`` - 1, read piece by piece, without ``ignored`` voxels.

    With a configuration, only what its ``inference.roi`` and ``inference.mask`` want is counted.

    Raises
    ------
    VolumeError
        If one cannot be read, their extents differ, or a truth of several classes has unknown values.
    """
    given, true = open_volume(str(prediction)), open_volume(truth)
    try:
        _require_same_shape(given, true, truth)
        wanted = None if config is None else wanted_of(config, given.info.extent, truth)
        try:
            return _streamed(given, true, labels, ignored, wanted)
        finally:
            if wanted is not None:
                wanted.close()
    finally:
        given.close()
        true.close()


def _require_same_shape(given: VolumeReader, true: VolumeReader, name: str) -> None:
    if true.info.shape != given.info.shape:
        raise VolumeError(
            f"{name}: has shape (c, z, y, x) {true.info.shape}, the prediction {given.info.shape}; state the label "
            "volume of this image"
        )


def _streamed(
    given: VolumeReader, true: VolumeReader, labels: int, ignored: int | None, wanted: Wanted | None
) -> Confusion:
    total = Confusion.zero(labels)
    for block in BlockGrid(true.info.extent, _piece(true.info)):
        box, flags = (block.core, None) if wanted is None else wanted.within(block.core)
        found, expected = given.read(box), true.read(box)
        if flags is not None:
            found, expected = found[:, flags], expected[:, flags]
        if ignored is not None:
            found, expected = found[expected != ignored], expected[expected != ignored]
        if labels == BINARY:
            expected = (expected != 0).astype("u1")
        total += Confusion.from_arrays(found, expected, labels)
    return total


def _piece(info: VolumeInfo) -> Vec3:
    return vec3([min(n, p) for n, p in zip(info.extent, PIECE, strict=True)])


def score_table(result: Scores) -> str:
    """The scores as text: a line per volume and class, pooled last."""
    rows = [*result.volumes.items(), ("all volumes", result.pooled)]
    metrics = [m for m in next(iter(result.pooled["labels"].values())) if m not in ("tp", "fp", "fn")]
    lines = [f"{'volume':32} {'class':16} " + " ".join(f"{m:>10}" for m in metrics)]
    for name, entry in rows:
        for label, values in list(entry["labels"].items())[1:]:
            numbers = (f"{values[m]:>10.4f}" if values[m] is not None else f"{'undefined':>10}" for m in metrics)
            lines.append(f"{name[-32:]:32} {label:16} " + " ".join(numbers))
    lines += [f"not measured: {name}: {reason}" for name, reason in result.failures.items()]
    return "\n".join(lines)
