"""What a volume's results were made of and how, and the command that makes them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from connectomics.assembly.engine.backends import kind_of
from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.identity import versions
from connectomics.assembly.settings import RegionSettings
from connectomics.config.load import written
from connectomics.core.errors import OutputError
from connectomics.execution.run_folder import PROVENANCE
from connectomics.models.backends.choice import AUTO
from connectomics.stages.output.export import FORMATS, export_path, read_stamp
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import VolumeReader

CHOSEN = (
    "{} windows a forward pass, which connectomics tune measured to be faster; one label in 100,000 may differ from "
    "nnU-Net's"
)
BATCH_KEY = "inference.sliding_window.sw_batch_size"
# keys that a reproducing command states in another way, or that only say where and which
ELSEWHERE = (
    "model.nnunet_checkpoint",
    "system.cache_dir",
    "inference.data.output_path",
    "inference.volume_mode.file_",
    "inference.volume_mode.st",
    "inference.output.overwrite",
    "test.",
)


def provenance_of(
    engine: Engine, reader: VolumeReader, segmenter: Segmenter, previous: VolumeReader | None
) -> dict[str, object]:
    """What the results of a volume are made of and how; ``previous`` are the labels of a cascade's previous stage."""
    described = [_described(model) for model in engine.models]
    told = [*engine.identity.notes, *batch_note(engine)]
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
    } | roi_facts(engine.inference.region)
    return (
        provenance
        | (described[0] if len(described) == 1 else {"models": described})
        | dict(engine.identity.facts)
        | ({"backend_choice": told} if told else {})
        | _previous_facts(engine, previous)
    )


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


def command_of(engine: Engine, source: VolumeSource) -> tuple[str, ...]:
    """Words of the command that makes this volume's results again, but for where they go."""
    stated = engine.inference.call.changed
    changed = {key: value for key, value in stated.items() if not key.startswith(ELSEWHERE)}
    changed["inference.volume_mode.file_list"] = list(source.uris)
    if stated.get("system.backend") == AUTO:
        changed["system.backend"] = kind_of(engine.settings.numeric_class)
    batch = engine.models[0].window.batch
    if batch != stated.get(BATCH_KEY):  # chosen, or more did not fit
        changed[BATCH_KEY] = batch
    if engine.reference is not None:  # the device's default elsewhere may be another
        changed["inference.precision"] = engine.settings.numeric_class["precision"]
    words = (f"{key}={written(value)}" for key, value in sorted(changed.items()))
    return ("infer-volume", "--checkpoint", str(engine.models[0].checkpoint), *words)


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


def roi_facts(region: RegionSettings) -> dict[str, object]:
    """What restricts a volume, for result keys and provenance; nothing where nothing does."""
    box = region.box
    facts: dict[str, object] = {} if box is None else {"roi": [list(box.start), list(box.stop)]}
    if region.mask is not None:
        reader = open_volume(region.mask)
        facts["mask"] = reader.identity
        reader.close()
    return {"wanted": facts} if facts else {}


def stamp_of(output: Path) -> tuple[Mapping[str, object], str] | None:
    """The stamp of an output, and its name without what its format adds; None where it carries none."""
    for form in FORMATS:
        ending = export_path(Path(), "", form).name
        if output.name.endswith(ending) and (stamp := read_stamp(output, form)) is not None:
            return stamp, output.name.removesuffix(ending)
    return None


def reproduce(output: Path) -> str:
    """The command line that makes a final output again, but for the folder; its RUN folder lies beside it.

    Raises
    ------
    OutputError
        If it carries no stamp, or its RUN folder is gone or tells of another result.
    """
    found = stamp_of(output)
    if found is None:
        raise OutputError(f"{output}: carries no stamp of this program; give a result of connectomics infer-volume")
    stamp, stem = found
    record = output.parent / f"{stem.removesuffix('_probabilities')}.run" / PROVENANCE
    try:
        provenance = json.loads(record.read_text())
        command, keys = [str(word) for word in provenance["command"]], provenance["result_keys"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{record}: cannot be read ({type(error).__name__}), and it tells how {output} was made; restore the RUN "
            "folder beside the output"
        ) from error
    if stamp.get("result_key") not in keys:
        raise OutputError(
            f"{record}: tells of another result than {output} (result key {stamp.get('result_key')}); the output was "
            "exchanged, or made before the last run of other settings"
        )
    return shlex.join(["connectomics", *command])
