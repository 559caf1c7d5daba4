"""What is told of a volume's results: in each of them, and in ``provenance.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from connectomics.core.fingerprint import key_of
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.stage import PROBABILITIES
from connectomics.runs.job import RunSettings, VolumeJob, command_with_blocks
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.predict.precision_check import Agreement
from connectomics.stages.predict.segmenter import Surveyed


def result_keys(job: VolumeJob) -> dict[str, object]:
    """The result key of each output, by its name."""
    return {o.name: o.result_key for o in job.outputs}


def stamp_of(job: VolumeJob, surveyed: Surveyed, agreement: Agreement | None, run_key: str) -> dict[str, object]:
    """What each output of a volume carries; whoever knows it adds the numeric class, and what is of one output."""
    stamp = dict(job.record.provenance) | {
        "numeric_class": None,
        "run_key": run_key,
        "filtered": job.labeller.filters.active,
        "cases": len(surveyed[0]),
        "statistics": [asdict(c) for c in surveyed[0][0].channels],
    }
    if agreement is not None:
        stamp |= {"agreement": asdict(agreement) | {"share": agreement.share}}
    return stamp


def unit_of(job: VolumeJob, output: FinalOutput) -> dict[str, object]:
    """What the values of an output mean, where that is not plain."""
    rule = job.labeller.segmenter.probabilities
    return {PROBABILITIES: rule.facts} if rule is not None and output.name == PROBABILITIES else {}


def record_of(job: VolumeJob, settings: RunSettings, stamp: Mapping[str, object], plan: BlockPlan) -> str:
    """The text of ``provenance.json``."""
    command = command_with_blocks(job.record.command, plan)
    record = dict(stamp) | dict(job.record.told) | {"result_keys": result_keys(job), "command": command}
    record |= {"outputs": [path.name for o in job.outputs for path in o.paths(settings.folder).values()]}
    return json.dumps(record, indent=1) + "\n"


def run_key_of(job: VolumeJob, plan: BlockPlan, program: str) -> str:
    """Key of the work on a volume: what decides the results, how it is cut, the program."""
    return key_of(result_keys(job) | {"grid": list(plan.block_shape), "program": program})
