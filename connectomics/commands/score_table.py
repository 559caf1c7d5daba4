"""The scores as text, a line per volume (and class), pooled last; printed by ``test``, ``evaluate`` and ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from connectomics.commands.evaluate import Scores

POOLED = "all volumes"
_NAME = 32
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


def score_table(result: Scores) -> str:
    """The scores as text: classes, then objects, then what was not measured."""
    entries = {**result.volumes, POOLED: result.pooled}
    lines = _semantic(entries) if "labels" in result.pooled else []
    lines += _instances(entries) if "instances" in result.pooled else []
    lines += [f"not measured: {name}: {reason}" for name, reason in result.failures.items()]
    return "\n".join(lines)


def _semantic(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    metrics = list(entries[POOLED]["mean_foreground"])
    lines = [f"{'volume':{_NAME}} {'class':16} " + " ".join(f"{m:>10}" for m in metrics)]
    for name, entry in entries.items():
        for label, values in list(entry["labels"].items())[1:]:
            lines.append(f"{name[-_NAME:]:{_NAME}} {label:16} " + " ".join(_shown(values[m]) for m in metrics))
    return lines


def _instances(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = {title: path for title, path in _COLUMNS.items() if path[0] in entries[POOLED]["instances"]}
    lines = [f"{'volume':{_NAME}} {'predicted':>10} {'true':>10} " + " ".join(f"{title:>10}" for title in known)]
    for name, entry in entries.items():
        found = entry["instances"]
        objects = f"{found['prediction_objects']:>10} {found['truth_objects']:>10}"
        numbers = " ".join(_shown(_at(found, path)) for path in known.values())
        lines.append(f"{name[-_NAME:]:{_NAME}} {objects} {numbers}")
    return lines


def _at(entry: Any, path: tuple[str, ...]) -> float | None:
    for part in path:
        entry = entry[part]
    value: float | None = entry
    return value


def _shown(value: float | None) -> str:
    return f"{'undefined':>10}" if value is None else f"{value:>10.4f}"
