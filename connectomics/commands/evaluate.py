"""``evaluate``, and what ``test`` does once the labels are there: compare volumes with their truth, keep the scores."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from connectomics.commands.decode import objects_of
from connectomics.commands.object_masks import ids_message, most_pairs, refuse_masks
from connectomics.config.schema import INSTANCE_METRICS, SEMANTIC_METRICS, EvaluationConfig, TestConfig, TestDataConfig
from connectomics.core.errors import ConfigError, ConnectomicsError
from connectomics.core.files import write_text
from connectomics.evaluate.comparison import Comparison, Within, compare
from connectomics.evaluate.contingency import Contingency, side_by_side
from connectomics.evaluate.instances import instance_scores
from connectomics.evaluate.masks import foregrounds, ids_against_mask, values_of
from connectomics.evaluate.pairs import ObjectPairs, match_table, write_matches
from connectomics.evaluate.semantic import Confusion, labels_found, scores
from connectomics.volumes.listing import VolumeSource, refuse_collisions, stem_of
from connectomics.volumes.opening import open_volume

POOLED = "all volumes"
_NAME, _ROWS = 32, 32  # of the table that is printed: letters of a name, classes of a volume
_COLUMNS = {
    "AP50": ("ap50",),
    "AP75": ("ap75",),
    "AP": ("ap",),
    "F1@50": ("matched", "50", "f1"),
    "F1@75": ("matched", "75", "f1"),
    "PQ": ("pq",),
    "SQ": ("sq",),
    "RQ": ("rq",),
    "VOI split": ("voi", "split"),
    "VOI merge": ("voi", "merge"),
    "ARE": ("arand", "error"),
}

if TYPE_CHECKING:
    from connectomics.assembly.engine.engine import Engine
    from connectomics.jobs.outcome import VolumeOutcome

BINARY = 2
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics per volume and over all volumes pooled, where they are saved, and what could not be measured."""

    path: Path
    volumes: Mapping[str, Mapping[str, Any]]
    pooled: Mapping[str, Any]
    failures: Mapping[str, str]
    matches: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """What ``scores.json`` holds."""
        told = {"notes": list(self.notes)} if self.notes else {}
        return {"pooled": self.pooled, "volumes": self.volumes, "failed": self.failures, **told}


@dataclass(frozen=True, slots=True)
class Labelling:
    """What the labels of both sides mean.

    Parameters
    ----------
    classes
        Name and labels of each class, the background first.
    count
        Labels are 0 to ``count`` - 1; of two, everything above 0 is the second.
    ignored
        Voxels with this label in the truth are not counted.
    """

    classes: Mapping[str, Sequence[int]]
    count: int
    ignored: int | None = None


def check_known_answers(test: TestConfig, sources: Sequence[VolumeSource], *, decodes: bool) -> None:
    """Refuse, before the work, truths that do not match the volumes, and scores of objects that there are not.

    Raises
    ------
    ConfigError
        If there is not one truth (and mask) a volume, or metrics of objects are asked for without objects.
    """
    _require_as_many(test.data, "test_image", len(sources))
    metrics = _of_kind(test.evaluation.metrics, INSTANCE_METRICS)
    if metrics and not (decodes and test.data.test_instances):
        raise ConfigError(
            f"test.evaluation.metrics names {', '.join(metrics)}, which are for ids of objects; state how objects are "
            "made, such as decoding=[{name: connected_components}], and the true ones, test.data.test_instances"
        )


def _require_as_many(data: TestDataConfig, images: str, count: int) -> None:
    wanted = {
        "test_label": data.test_label or (),
        "test_instances": data.test_instances,
        "test_ignore": data.test_ignore,
    }
    for key, found in wanted.items():
        if found is not None and len(found) != count:
            raise ConfigError(
                f"test.data.{key} names {len(found)} volumes, test.data.{images} {count}; state one "
                "volume for each image, in the same order"
            )


def stated_comparisons(data: TestDataConfig) -> list[Comparison]:
    """Those of ``test.data``: predictions, truths and masks.

    Raises
    ------
    ConfigError
        If no prediction is named, there is not one truth (and mask) for each, or names collide.
    """
    if not data.test_prediction:
        raise ConfigError("test.data.test_prediction names no volume; set it to a path or a list of paths")
    _require_as_many(data, "test_prediction", len(data.test_prediction))
    refuse_collisions([VolumeSource(uri, stem_of(uri), (uri,)) for uri in data.test_prediction])
    masks = _masks(data)
    return [Comparison(p, p, t, m) for p, t, m in zip(data.test_prediction, data.test_label or (), masks, strict=True)]


def _masks(data: TestDataConfig) -> Sequence[str | None]:
    """One for each truth."""
    return data.test_ignore or [None for _ in data.test_label or ()]


def evaluate_outcomes(test: TestConfig, engine: Engine, outcomes: Sequence[VolumeOutcome]) -> Scores:
    """Compare finished labels with their truths; saves ``scores.json`` in the output folder.

    Parameters
    ----------
    outcomes
        Of the volumes, in the order of ``test.data.test_image``; those after a stop are not there. Their truths are
        ``test.data.test_label``: with two classes everything above 0 is foreground. Voxels with the model's ignore
        label are not counted, nor are those outside ``inference.roi`` and ``inference.mask``. Where metrics of objects
        are asked for, the objects that were decoded are compared with ``test.data.test_instances``.
    """
    spec, data = engine.spec, test.data
    masks = _masks(data)
    count = 1 + max(*(v for values in spec.class_labels.values() for v in values), *spec.class_values)
    with ExitStack() as opened:
        jobs, objects = list[Comparison](), list[Comparison]()
        for i, (outcome, truth, mask) in enumerate(zip(outcomes, data.test_label or (), masks, strict=False)):
            if outcome.state == "failed":
                continue
            job = Comparison(outcome.name, str(outcome.paths[0]), truth, mask, within=_within(engine, outcome, opened))
            jobs.append(job)
            if data.test_instances is not None and _of_kind(test.evaluation.metrics, INSTANCE_METRICS):
                objects.append(replace(job, prediction=str(objects_of(outcome)), truth=data.test_instances[i]))
        labelling = Labelling(spec.class_labels, count, spec.ignored_label)
        return evaluate_volumes(engine.settings.folder, test.evaluation, jobs, labelling, objects=objects)


def _within(engine: Engine, outcome: VolumeOutcome, opened: ExitStack) -> Within | None:
    """Gives the voxels of a box that were wanted, or None where all were."""
    from connectomics.assembly.volumes import roi_of

    stated, region = engine.inference.volumes, engine.inference.region
    if region.box is None and region.mask is None:
        return None
    with closing(open_volume(outcome.name, axes=stated.axes, voxel_size_nm=stated.voxel_size_nm)) as volume:
        wanted = roi_of(engine.inference, volume.info, outcome.name)
    return None if wanted is None else opened.enter_context(closing(wanted)).within


def evaluate_volumes(
    folder: Path,
    wanted: EvaluationConfig,
    jobs: Sequence[Comparison],
    labelling: Labelling | None = None,
    objects: Sequence[Comparison] | None = None,
    *,
    budget_bytes: int | None = None,
) -> Scores:
    """Compare predictions with truths; saves ``scores.json`` and tables of matches in the output folder.

    Parameters
    ----------
    folder, wanted
        Where that is, and what is measured.
    jobs
        The volumes, named differently; what cannot be measured is named in the result, and the rest is.
    labelling
        What labels mean; None: each label that is found is a class.
    objects
        The objects of the same volumes, in their order; None: the volumes themselves are ids.
    budget_bytes
        Host memory, where it is bounded.
    """
    failures, notes, most = dict[str, str](), list[str](), most_pairs(budget_bytes)
    ignored = (wanted.ignore_label, labelling.ignored if labelling else None)
    tables = _compared(jobs, ignored, failures, most)
    labelled = tables
    if labelling is None and not wanted.foreground and _of_kind(wanted.metrics, SEMANTIC_METRICS):
        labelled = _with_masks(folder, jobs, tables, failures, notes=notes)
    semantic, pooled_semantic = _semantic(labelled, wanted, labelling, failures)
    if objects is not None:
        tables = _compared(objects, (wanted.ignore_label,), failures, most)
    if _of_kind(wanted.metrics, INSTANCE_METRICS):
        refuse_masks(folder, jobs if objects is None else objects, tables, failures)
    tables = {name: table for name, table in tables.items() if name not in failures}
    instances, pooled_instances = _instances(tables, wanted)
    names = [job.name for job in jobs if job.name not in failures]
    volumes = {name: semantic.get(name, {}) | instances.get(name, {}) for name in names}
    paths = []
    for job in (jobs if objects is None else objects) if instances else ():
        if job.name in tables:
            columns = match_table(ObjectPairs.of(tables[job.name]))
            paths.append(write_matches(columns, folder, stem_of(job.prediction)))
    pooled = pooled_semantic | pooled_instances
    result = Scores(folder / "scores.json", volumes, pooled, failures, matches=tuple(paths), notes=tuple(notes))
    write_text(result.path, json.dumps(result.content, indent=1) + "\n")
    return result


def _compared(
    jobs: Sequence[Comparison], ignored: Sequence[int | None], failures: dict[str, str], most: int | None
) -> dict[str, Contingency]:
    """What falls on what, by name; what cannot be compared is added to ``failures``."""
    tables: dict[str, Contingency] = {}
    for job in jobs:
        try:
            table = compare(job, most_pairs=most)
        except ConnectomicsError as error:
            failures[job.name] = str(error)
            continue
        for label in ignored:
            table = table if label is None else table.without_truth(label)
        tables[job.name] = table
    return tables


def _of_kind(metrics: Sequence[str], kind: Sequence[str]) -> list[str]:
    return [metric for metric in metrics if metric in kind]


def _with_masks(
    folder: Path,
    jobs: Sequence[Comparison],
    tables: Mapping[str, Contingency],
    failures: dict[str, str],
    notes: list[str],
) -> dict[str, Contingency]:
    """The tables with masks as foreground, which is noted; ids against a mask are added to ``failures``."""
    for job in jobs:
        side = ids_against_mask(tables[job.name]) if job.name in tables else ""
        if side:
            ids, mask = (job.prediction, job.truth) if side == "prediction" else (job.truth, job.prediction)
            failures[job.name] = ids_message(folder, ids, mask)
    left = {name: table for name, table in tables.items() if name not in failures}
    masks = foregrounds(left)
    for job in jobs:
        if job.name in masks:
            values = ", ".join(map(str, np.unique(left[job.name].truth)))
            notes.append(f"{job.truth}: is a mask of the values {values}; everything above the lowest is foreground")
    return left | masks


def _semantic(
    tables: Mapping[str, Contingency], wanted: EvaluationConfig, labelling: Labelling | None, failures: dict[str, str]
) -> tuple[Entries, dict[str, Any]]:
    """Entries of each volume and of all pooled; volumes with unknown labels are added to ``failures``."""
    metrics = _of_kind(wanted.metrics, SEMANTIC_METRICS)
    if not metrics:
        return {}, {}
    if wanted.foreground:
        labelling = Labelling({"background": (0,), "foreground": (1,)}, BINARY)
    if labelling is None:
        count = labels_found(list(tables.values()))
        found = sorted(frozenset[int]().union(*(side for t in tables.values() for side in values_of(t))) | {1})
        names = {"background": (0,)} | {f"label_{n}": (n,) for n in found if n}
        labelling = Labelling(names, count)
    elif labelling.count == BINARY:
        tables = {name: table.as_foreground() for name, table in tables.items()}
    entries, pooled = {}, Confusion.zero(labelling.count)
    for name, table in tables.items():
        try:
            confusion = Confusion.of(table, labelling.count)
        except ConnectomicsError as error:
            failures[name] = str(error)
            continue
        entries[name] = scores(confusion, labelling.classes, metrics)
        pooled += confusion
    return entries, scores(pooled, labelling.classes, metrics)


def _instances(tables: Mapping[str, Contingency], wanted: EvaluationConfig) -> tuple[Entries, dict[str, Any]]:
    """Entries of each volume and of all beside each other, as if they were one."""
    metrics = _of_kind(wanted.metrics, INSTANCE_METRICS)
    if not metrics:
        return {}, {}

    def entry(table: Contingency) -> dict[str, Any]:
        found = instance_scores(table, metrics, size_bounds=wanted.size_bounds or ())
        return {"instances": found, "voxels": table.voxels}

    entries = {name: entry(table) for name, table in tables.items()}
    if len(entries) == 1:
        return entries, next(iter(entries.values()))
    return entries, entry(side_by_side(list(tables.values())))


def score_table(result: Scores) -> str:
    """The scores as text: classes, then objects, then what was not measured."""
    entries = {**result.volumes, POOLED: result.pooled}
    lines = [f"note: {note}" for note in result.notes]
    lines += _semantic_lines(entries) if "labels" in result.pooled else []
    lines += _instance_lines(entries) if "instances" in result.pooled else []
    lines += [f"not measured: {name}: {reason}" for name, reason in result.failures.items()]
    return "\n".join(lines)


def _semantic_lines(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    metrics = list(entries[POOLED]["mean_foreground"])
    lines = [f"{'volume':{_NAME}} {'class':16} " + " ".join(f"{m:>10}" for m in metrics)]
    for name, entry in entries.items():
        rows = list(entry["labels"].items())[1:]
        for label, values in rows[:_ROWS]:
            lines.append(f"{name[-_NAME:]:{_NAME}} {label:16} " + " ".join(_shown(values[m]) for m in metrics))
        if len(rows) > _ROWS:
            lines.append(f"{name[-_NAME:]:{_NAME}} and {len(rows) - _ROWS} more classes, see scores.json")
    return lines


def _instance_lines(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = {title: path for title, path in _COLUMNS.items() if path[0] in entries[POOLED]["instances"]}
    lines = [f"{'volume':{_NAME}} {'predicted':>10} {'true':>10} " + " ".join(f"{title:>10}" for title in known)]
    for name, entry in entries.items():
        found = entry["instances"]
        objects = f"{found['prediction_objects']:>10} {found['truth_objects']:>10}"
        numbers = " ".join(_shown(functools.reduce(operator.getitem, path, found)) for path in known.values())
        lines.append(f"{name[-_NAME:]:{_NAME}} {objects} {numbers}")
    return lines


def _shown(value: float | None) -> str:
    return f"{'undefined':>10}" if value is None else f"{value:>10.4f}"
