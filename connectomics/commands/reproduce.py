"""``connectomics reproduce``: the command that made an output, from the provenance beside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.execution.run_folder import PROVENANCE, checksums_of
from connectomics.objects.table import CSV, TABLES, table_key
from connectomics.stages.output.export import FORMATS, export_path, read_stamp
from connectomics.volumes.digests import digests, is_intact


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
    for form in FORMATS:
        ending = export_path(Path(), "", form).name
        if output.name.endswith(ending):
            stamp = read_stamp(output, form)
            if stamp is not None:
                return output.name.removesuffix(ending), stamp.get("result_key")
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
