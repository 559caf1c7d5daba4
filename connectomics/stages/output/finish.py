"""The last stage of a run: filters of whole objects, pyramids and exports under final names, stamps, checksums."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.core.files import discard, put_in_place, require_short, write_text
from connectomics.core.fingerprint import key_of
from connectomics.execution.lease import tidy
from connectomics.execution.run_folder import LEDGER, WORKERS, checksums_of
from connectomics.execution.runner import RunStage
from connectomics.execution.stage import PROBABILITIES
from connectomics.stages.output.export import (
    export_file,
    export_path,
    multiscale_of,
    output_format,
    read_stamp,
    require_exportable,
)
from connectomics.stages.output.formats.contract import ChunkedFormat
from connectomics.stages.output.pyramid import Pyramid, discard_ledgers, fill_pyramid
from connectomics.volumes.digests import SUFFIX as DIGESTS
from connectomics.volumes.digests import write_digests
from connectomics.volumes.source import reason
from connectomics.volumes.store import Store
from connectomics.volumes.volume import VolumeInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinalOutput:
    """One final result of a volume.

    Parameters
    ----------
    name
        Of the working store: ``labels``, ``probabilities`` or ``objects``.
    stem
        Final file name without its suffix.
    result_key
        sha256 of all that decides its content.
    formats
        In which it is wanted.
    pyramid
        Whether chunked formats get coarser levels, too.
    """

    name: str
    stem: str
    result_key: str
    formats: tuple[str, ...]
    pyramid: bool = True

    def paths(self, folder: Path) -> dict[str, Path]:
        """Final path of each format."""
        return {f: export_path(folder, self.stem, f) for f in self.formats}

    def missing(self, folder: Path) -> tuple[str, ...]:
        """Formats that are not there with this result key."""
        return tuple(f for f, path in self.paths(folder).items() if _key_at(path, f) != self.result_key)

    def taken(self, folder: Path) -> list[Path]:
        """Final names that exist with another result key, or none that can be read."""
        return [p for f, p in self.paths(folder).items() if p.exists() and _key_at(p, f) != self.result_key]


def _key_at(path: Path, form: str) -> object:
    stamp = read_stamp(path, form)
    return None if stamp is None else stamp.get("result_key")


def check_names(outputs: Sequence[FinalOutput], folder: Path, *, overwrite: bool) -> None:
    """Refuse, by an OutputError, to replace what another model, setting or input made unless ``overwrite`` is set."""
    taken = [path for output in outputs for path in output.taken(folder)]
    if taken and not overwrite:
        raise OutputError(
            f"{taken[0]}: exists, but was made by another model, setting or input (or another program); choose another "
            "inference.volume_mode.output_suffix or output_path, or state inference.output.overwrite=true"
        )


def check_exportable(output: FinalOutput, info: VolumeInfo, folder: Path, budget_bytes: int) -> None:
    """Refuse formats that cannot hold an output, and names too long for the disk, before any work is done.

    The OutputError says which formats can, or how much shorter the name must be.
    """
    for form, path in output.paths(folder).items():
        require_short(path.name + DIGESTS)
        require_exportable(info, path, form, budget_bytes)


def export_output(
    store: Store, output: FinalOutput, folder: Path, stamp: dict[str, object], work: Path, run: RunStage
) -> None:
    """Write what is missing of an output from its complete working store; chunked ones are built in ``work``.

    Each carries ``stamp``, beside its result key. Raises OutputError if the disk refuses or what is written does not
    read back equal.
    """
    paths = output.paths(folder)
    for form in output.missing(folder):
        full = stamp | {"result_key": output.result_key}
        if isinstance(output_format(form), ChunkedFormat):
            _export_pyramid(store, output, form, paths[form], stamp=full, work=work, run=run)
        else:
            export_file(store, paths[form], form, full)
        log.info("wrote %s", paths[form])


def _export_pyramid(
    store: Store, output: FinalOutput, form: str, path: Path, stamp: dict[str, object], work: Path, run: RunStage
) -> None:
    """Build a chunked output in the work folder, stamp it and move it to its final name."""
    labels, most = output.name != PROBABILITIES, None if output.pyramid else 1
    image = multiscale_of(form, store.info, store.shard_shape, path, labels=labels, levels=most)
    place = work / f"{output.name}.final.{form}"
    pyramid = Pyramid(f"{output.name}.{form}", image, place, labels)
    fill_pyramid(pyramid, store, work, run, key=output.result_key)
    try:
        file, text = image.stamped(stamp, output.stem)
        write_text(place / file, text)
        put_in_place(place, path)
        discard_ledgers(pyramid, work)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}. Free disk space or mend the permission, then run again; the "
            f"computed blocks are kept in {place}."
        ) from error


def work_folder(run_folder: Path, outputs: Sequence[FinalOutput], program: str) -> Path:
    """Where the unfinished work on these results lies."""
    facts: dict[str, object] = {o.name: o.result_key for o in outputs}
    return run_folder / key_of(facts | {"program": program})[:16]


def unseal(run_folder: Path, path: Path) -> None:
    """Forget the checksums of a final output that is about to be replaced."""
    checksums_of(run_folder, path).unlink(missing_ok=True)


def seal(run_folder: Path, paths: Iterable[Path]) -> None:
    """Keep the checksums of final outputs that have none yet."""
    for path in paths:
        if path.exists() and not checksums_of(run_folder, path).exists():
            write_digests(path, checksums_of(run_folder, path))


def discard_stores(work: Path) -> None:
    """Remove all that lies in a work folder but ledgers and leases."""
    for path in list(work.iterdir()):
        if path.is_dir() and not path.name.startswith((LEDGER, WORKERS)):
            discard(path)


def settle(run_folder: Path, work: Path, paths: Iterable[Path]) -> None:
    """Do for finished outputs what a kill after the last export left undone: checksums, tidying."""
    if not work.is_dir() or not tidy(work / WORKERS):
        return
    seal(run_folder, paths)
    discard_stores(work)
