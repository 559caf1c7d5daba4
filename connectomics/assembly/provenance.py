"""What a volume's results were made of and how, and the command that makes them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from connectomics.assembly.engine.backends import kind_of
from connectomics.assembly.engine.engine import Engine, EngineModel
from connectomics.assembly.engine.identity import versions
from connectomics.config.load import written
from connectomics.config.schema import Config
from connectomics.models.backends.choice import AUTO
from connectomics.stages.predict.segmenter import Segmenter
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import VolumeReader

CHOSEN = (
    "{} windows a forward pass, which connectomics tune measured to be faster; one label in 100,000 may differ from "
    "nnU-Net's"
)
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
    config: Config, engine: Engine, reader: VolumeReader, segmenter: Segmenter, previous: VolumeReader | None
) -> dict[str, object]:
    """What the results of a volume are made of and how.

    Parameters
    ----------
    segmenter
        Set up for the volume.
    previous
        The labels of the previous stage of a cascade.
    """
    described = [_described(model) for model in engine.models]
    told = [*engine.notes, *batch_note(config, engine)]
    provenance: dict[str, object] = {
        "program": engine.settings.program,
        "versions": versions(),
        "experiment_name": config.experiment_name,
        "description": config.description,
        "input": reader.identity,
        "nnunet": "as nnU-Net" if not engine.deviations else "not nnU-Net: " + "; ".join(engine.deviations),
        "labels": dict(engine.spec.label_names),
        "regions": {name: list(values) for name, values in engine.spec.regions},
        "resample": resampling_facts(segmenter),
        "seed": config.system.seed,
    } | roi_facts(config)
    return (
        provenance
        | (described[0] if len(described) == 1 else {"models": described})
        | dict(engine.facts)
        | ({"backend_choice": told} if told else {})
        | _previous_facts(engine, previous)
    )


def _previous_facts(engine: Engine, previous: VolumeReader | None) -> dict[str, object]:
    if previous is None:
        return {}
    if engine.previous is None:
        return {"previous_stage": previous.identity}
    return {"previous_stage": _described(engine.previous.models[0]) | dict(engine.previous.facts)}


def _described(model: EngineModel) -> dict[str, object]:
    return {
        "model_weights_sha256": model.spec.weights_sha256,
        "trainer": model.spec.trainer_name,
        "configuration": model.spec.configuration,
        "folds": list(model.spec.folds),
        "plan_spacing": list(model.spec.spacing),
        "axis_order": list(model.spec.axis_order),
    }


def command_of(config: Config, engine: Engine, source: VolumeSource) -> tuple[str, ...]:
    """Words of the command that makes this volume's results again, but for where they go."""
    stated, default = _leaves(dataclasses.asdict(config)), _leaves(dataclasses.asdict(Config()))
    changed = {k: v for k, v in stated.items() if v != default[k] and not k.startswith(ELSEWHERE)}
    changed["inference.volume_mode.file_list"] = list(source.uris)
    if config.system.backend == AUTO:
        changed["system.backend"] = kind_of(engine.settings.numeric_class)
    batch = engine.models[0].window.batch
    if batch != config.inference.sliding_window.sw_batch_size:  # chosen, or more did not fit
        changed["inference.sliding_window.sw_batch_size"] = batch
    if engine.exact is not None:  # the device's default elsewhere may be another
        changed["inference.precision"] = "fast"
    words = (f"{key}={written(value)}" for key, value in sorted(changed.items()))
    return ("infer-volume", "--checkpoint", str(engine.models[0].checkpoint), *words)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def batch_note(config: Config, engine: Engine) -> list[str]:
    """What is told of a batch that nobody stated, if there is one; a rerun that goes on tells the same."""
    batch, stated = engine.models[0].window.batch, config.inference.sliding_window.sw_batch_size
    return [CHOSEN.format(batch)] if stated is None and batch > 1 else []


def resampling_facts(segmenter: Segmenter) -> object:
    """Spacing of the volume and of the network's grid, or off; of an ensemble one entry a model."""
    facts = [
        "off" if m.resampling is None else [list(m.resampling.spacing), list(m.resampling.target)]
        for m in segmenter.members
    ]
    return facts[0] if len(facts) == 1 else facts


def roi_facts(config: Config) -> dict[str, object]:
    """What restricts a volume, for result keys and provenance; nothing where nothing does."""
    roi, mask = config.inference.roi, config.inference.mask
    facts: dict[str, object] = {} if roi is None else {"roi": roi}
    if mask is not None:
        reader = open_volume(mask)
        facts["mask"] = reader.identity
        reader.close()
    return {"wanted": facts} if facts else {}
