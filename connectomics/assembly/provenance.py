"""What a volume's results were made of and how."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.identity import versions
from connectomics.assembly.settings import InferenceSettings
from connectomics.stages.output.export import FORMATS, export_path, read_stamp
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.stages.survey.placement import Placement, placed
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import VolumeInfo, VolumeReader

CHOSEN = (
    "{} windows a forward pass, which connectomics tune measured to be faster; one label in 100,000 may differ from "
    "nnU-Net's"
)
BATCH_KEY = "inference.sliding_window.sw_batch_size"


def provenance_of(
    engine: Engine, reader: VolumeReader, segmenter: Segmenter, previous: VolumeReader | None
) -> dict[str, object]:
    """What the results of a volume are made of and how; ``previous`` are the labels of a cascade's previous stage."""
    described = [_described(model) for model in engine.models]
    call, deviations = engine.inference.call, engine.identity.deviations
    provenance: dict[str, object] = {
        "program": engine.settings.program,
        "versions": versions(),
        "experiment_name": call.experiment_name,
        "description": call.description,
        "input": reader.identity,
        "nnunet": "as nnU-Net" if not deviations else "not nnU-Net: " + "; ".join(deviations),
        "labels": dict(engine.spec.label_names),
        "regions": {name: list(values) for name, values in engine.spec.regions},
        "resample": resampling_facts(segmenter),
        "seed": call.seed,
    } | roi_facts(engine.inference, reader.info)
    return (
        provenance
        | (described[0] if len(described) == 1 else {"models": described})
        | dict(engine.identity.facts)
        | _previous_facts(engine, previous)
    )


def choices_of(engine: Engine) -> dict[str, object]:
    """Why it is computed as it is, where that was left to the machine; a command that states it tells nothing."""
    told = [*engine.identity.notes, *batch_note(engine)]
    return {"backend_choice": told} if told else {}


def _previous_facts(engine: Engine, previous: VolumeReader | None) -> dict[str, object]:
    if previous is None:
        return {}
    if engine.previous is None:
        return {"previous_stage": previous.identity}
    return {"previous_stage": _described(engine.previous.models[0]) | dict(engine.previous.identity.facts)}


def _described(model: EngineModel) -> dict[str, object]:
    return {
        "model_weights_sha256": model.spec.weights_sha256,
        "trainer": model.spec.trainer_name,
        "configuration": model.spec.configuration,
        "folds": list(model.spec.folds),
        "plan_spacing": list(model.spec.spacing),
        "axis_order": list(model.spec.axis_order),
    }


def batch_note(engine: Engine) -> list[str]:
    """What is told of a batch that nobody stated, if there is one; a rerun that goes on tells the same."""
    batch, stated = engine.models[0].window.batch, engine.inference.call.changed
    return [CHOSEN.format(batch)] if BATCH_KEY not in stated and batch > 1 else []


def resampling_facts(segmenter: Segmenter) -> object:
    """Spacing of the volume and of the network's grid, or off; of an ensemble one entry a model."""
    facts = [
        "off" if m.resampling is None else [list(m.resampling.spacing), list(m.resampling.target)]
        for m in segmenter.members
    ]
    return facts[0] if len(facts) == 1 else facts


def stamp_of(output: Path) -> tuple[Mapping[str, object], str] | None:
    """The stamp of an output, and its name without what its format adds; None where it carries none."""
    for form in FORMATS:
        ending = export_path(Path(), "", form).name
        if output.name.endswith(ending) and (stamp := read_stamp(output, form)) is not None:
            return stamp, output.name.removesuffix(ending)
    return None


def roi_facts(stated: InferenceSettings, info: VolumeInfo) -> dict[str, object]:
    """What restricts a volume, for result keys and provenance; nothing where nothing does.

    Where a mask lies is told if it is not simply spread over the volume, as it once always was.
    """
    box, mask = stated.region.box, stated.region.mask
    facts: dict[str, object] = {} if box is None else {"roi": [list(box.start), list(box.stop)]}
    if mask is not None:
        with closing(open_volume(mask)) as reader:
            facts["mask"] = reader.identity
            placement = mask_placement(stated, info, reader.info, f"inference.mask={mask}")
        if not all(axis.spread for axis in placement):
            facts["mask_placement"] = [[axis.begin, axis.factor] for axis in placement]
    return {"wanted": facts} if facts else {}


def mask_placement(stated: InferenceSettings, info: VolumeInfo, mask: VolumeInfo, name: str) -> Placement:
    """Where a mask lies in a volume; see ``placed``."""
    return placed(info, mask, name, stated_size=stated.volumes.voxel_size_nm is not None)
