"""The words of the command that makes a result again, from any folder; ``connectomics reproduce`` prints them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from connectomics.assembly.engine.backends import kind_of
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.provenance import BATCH_KEY, stamp_of
from connectomics.config.load import written
from connectomics.core.errors import OutputError
from connectomics.execution.run_folder import PROVENANCE, checksums_of
from connectomics.models.backends.choice import AUTO
from connectomics.objects.table import CSV, TABLES, table_key
from connectomics.stages.decode.step_contract import DecodingStep
from connectomics.volumes.digests import digests, is_intact
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.source import absolute_uri

# keys that are stated in another way, or that only say where and which
ELSEWHERE = (
    "model.nnunet_checkpoint",
    "system.cache_dir",
    "inference.data.output_path",
    "inference.volume_mode.file_",
    "inference.volume_mode.st",
    "inference.output.overwrite",
    "test.",
)
PATHS = ("model.ensemble", "model.nnunet_plans", "model.nnunet_dataset", "model.previous_stage", "inference.mask")
DEVICES = ("system.device", "model.nnunet_device")
THREADS = ("system.num_cpus", "system.inference.num_cpus")


def command_of(engine: Engine, source: VolumeSource) -> tuple[str, ...]:
    """Words of the command that makes this volume's results again, but for where they go.

    All that decides bytes is stated, also what the configuration left to the machine: device, backend, precision, batch
    and threads. Paths are absolute.
    """
    stated, own = engine.inference.call.changed, engine.settings.numeric_class
    changed = {key: _absolute(key, value) for key, value in stated.items() if not key.startswith(ELSEWHERE)}
    changed["inference.volume_mode.file_list"] = [absolute_uri(uri) for uri in source.uris]
    if stated.get("system.backend") == AUTO:
        changed["system.backend"] = kind_of(own)
    if not any(key in stated for key in DEVICES):
        changed[DEVICES[0]] = str(own["device"]).partition(" ")[0]
    if not any(key in stated for key in THREADS):
        changed[THREADS[0]] = own["threads"]
    batch = engine.models[0].window.batch
    if batch != stated.get(BATCH_KEY):  # chosen, or more did not fit
        changed[BATCH_KEY] = batch
    if engine.reference is not None:  # the device's default elsewhere may be another
        changed["inference.precision"] = own["precision"]
    model = absolute_uri(str(engine.models[0].checkpoint))
    return ("infer-volume", "--checkpoint", model, *words_of(changed))


def words_of(stated: Mapping[str, object]) -> tuple[str, ...]:
    """Keys and values as words of a command line, in the keys' order."""
    return tuple(f"{key}={written(value)}" for key, value in sorted(stated.items()))


def steps_from_anywhere(steps: Sequence[DecodingStep]) -> list[dict[str, object]]:
    """Steps of decoding as the configuration states them, with absolute paths."""
    return [_step(dataclasses.asdict(step)) for step in steps]  # type: ignore[call-overload]


def named_steps(steps: Sequence[DecodingStep]) -> list[dict[str, object]]:
    """Steps of decoding for result keys and provenance: volumes by their names, wherever they lie."""

    def named(step: dict[str, Any]) -> dict[str, object]:
        return {key: _name(value) if key == PROBABILITIES_KEY and value else value for key, value in step.items()}

    return [named(dataclasses.asdict(step)) for step in steps]  # type: ignore[call-overload]


PROBABILITIES_KEY = "probabilities"


def _name(uri: str) -> str:
    """A volume's URI without the folder that it lies in."""
    if uri.startswith("phantom:"):
        return uri
    path, mark, inner = uri.partition("::")
    return Path(path).name + mark + inner


def _step(step: Mapping[str, Any]) -> dict[str, object]:
    uri = step.get(PROBABILITIES_KEY)
    return {**step, PROBABILITIES_KEY: absolute_uri(uri)} if isinstance(uri, str) else dict(step)


def _absolute(key: str, value: object) -> object:
    if key == "decoding":
        return [_step(step) for step in value]  # type: ignore[attr-defined]
    if key not in PATHS:
        return value
    return [absolute_uri(each) for each in value] if isinstance(value, list) else absolute_uri(str(value))


def reproduce(output: Path) -> str:
    """The command line that makes this output again from any folder, but for the folder it is written to.

    Parameters
    ----------
    output
        A final output (file or folder) or a table of objects, its RUN folder beside it.

    Raises
    ------
    OutputError
        If it carries no stamp, or its RUN folder is gone or tells of another result.
    """
    stem, key = _named(output)
    run = output.parent / f"{stem.removesuffix('_probabilities')}.run"
    record = run / PROVENANCE
    try:
        provenance = json.loads(record.read_text())
        command, keys = [str(word) for word in provenance["command"]], list(provenance["result_keys"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{record}: cannot be read ({type(error).__name__}), and it tells how {output} was made; restore the RUN "
            "folder beside the output"
        ) from error
    if key is None and not _is_sealed(run, output):
        raise OutputError(
            f"{output}: is not the table that {run} keeps the checksum of; it was changed, or is of another result"
        )
    if key is not None and key not in keys:
        raise OutputError(
            f"{record}: tells of another result than {output} (result key {key}); the output was exchanged, or made "
            "before the last run of other settings"
        )
    return shlex.join(["connectomics", *command])


def _named(output: Path) -> tuple[str, object]:
    """An output's name without what its format adds, and its result key; None of a CSV table, which has no place."""
    found = stamp_of(output)
    if found is not None:
        return found[1], found[0].get("result_key")
    if output.suffix in TABLES and output.is_file():
        key = table_key(output)
        if key is not None or output.suffix == CSV:
            return output.stem, key
    raise OutputError(
        f"{output}: carries no stamp of this program; give a result of connectomics infer-volume or decode"
    )


def _is_sealed(run: Path, output: Path) -> bool:
    """Whether RUN has the checksum of this very file."""
    try:
        return all(is_intact(output.parent, *line) for line in digests(checksums_of(run, output)))
    except OSError:
        return False
