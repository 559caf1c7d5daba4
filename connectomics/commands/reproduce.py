"""``connectomics reproduce``: the command that made an output, from the provenance beside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.execution.run_folder import PROVENANCE
from connectomics.stages.output.export import FORMATS, export_path, read_stamp


def reproduce(output: Path) -> str:
    """The command line that makes this output again, but for the folder it is written to.

    Parameters
    ----------
    output
        A final output (file or folder), its RUN folder beside it.

    Raises
    ------
    OutputError
        If it carries no stamp, or its RUN folder is gone or tells of another result.
    """
    stamp, stem = _stamp_of(output)
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


def _stamp_of(output: Path) -> tuple[dict[str, object], str]:
    """The stamp of an output, and its name without what its format adds."""
    for form in FORMATS:
        ending = export_path(Path(), "", form).name
        if output.name.endswith(ending):
            stamp = read_stamp(output, form)
            if stamp is not None:
                return stamp, output.name.removesuffix(ending)
    raise OutputError(f"{output}: carries no stamp of this program; give a result of connectomics infer-volume")
