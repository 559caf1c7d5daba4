"""The last stage of a run: filters of whole objects, pyramids and exports under final names, stamps, checksums."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from connectomics.core.errors import ConnectomicsError, OutputError
from connectomics.core.files import TAKEN, TEMPORARY, discard, fsync_path, make_folder, require_short, write_text
from connectomics.core.fingerprint import key_of
from connectomics.execution.block_plan import HEADER
from connectomics.execution.lease import HELD, LeaseLostError
from connectomics.execution.ledger import Ledger
from connectomics.execution.name_claims import retire
from connectomics.execution.publishing import STAGING, Staging, staging_folder
from connectomics.execution.run_folder import COORDINATION, LEDGER, PROVENANCE, SINGLE_WRITER, checksums_of
from connectomics.execution.runner import RunStage
from connectomics.execution.stage import PROBABILITIES
from connectomics.execution.worker import Worker, is_deserted
from connectomics.stages.output.export import (
    export_file,
    export_path,
    multiscale_of,
    output_format,
    read_stamp,
    require_exportable,
)
from connectomics.stages.output.formats.contract import ChunkedFormat
from connectomics.stages.output.pyramid import LevelTask, Pyramid, discard_unwritten, fill_pyramid, level_tasks
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
    overwrite
        Whether it may replace what another model, setting or input made.
    """

    name: str
    stem: str
    result_key: str
    formats: tuple[str, ...]
    pyramid: bool = True
    overwrite: bool = True

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


def check_names(outputs: Sequence[FinalOutput], folder: Path) -> None:
    """Refuse, by an OutputError, to replace what another model, setting or input made where that was not allowed."""
    taken = [path for output in outputs if not output.overwrite for path in output.taken(folder)]
    if taken:
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


@dataclass(frozen=True, slots=True)
class Publisher:
    """What finished outputs of a volume go through: built in ``staging``, they appear in ``folder`` with checksums."""

    staging: Staging
    folder: Path
    run_folder: Path

    def publish(self, name: str, path: Path) -> None:
        """Give what is complete in the staging folder its final name; checksums of what stood there go first.

        A helper that sleeps in the middle of a file finds no name of it left when it wakes up.
        """
        place, record = self.staging.place(name), checksums_of(self.run_folder, path)
        discard_unwritten(place)
        write_digests(place, self.staging.place(record.name), path.name)
        self.staging.take_away(record)
        make_folder(record.parent)
        fsync_path(record.parent)  # else a loss of power brings back the checksums of what stood there
        discard_unwritten(place)
        self.staging.publish(name, path)
        discard_unwritten(path)
        self.staging.publish(record.name, record)
        log.info("wrote %s", path)

    def keep_ledgers(self) -> None:
        """Move the ledgers of what was built into the work folder, so that it stays known who did what."""
        for path in sorted(self.staging.folder.glob(f"{LEDGER}*")):
            self.staging.publish(path.name, self.staging.folder.parent / path.name)

    def tell(self, provenance: str) -> None:
        """Put what the outputs are made of into RUN."""
        write_text(self.staging.place(PROVENANCE), provenance)
        self.staging.publish(PROVENANCE, self.run_folder / PROVENANCE)


def export_output(
    store: Store, output: FinalOutput, publisher: Publisher, stamp: dict[str, object], run: RunStage
) -> None:
    """Write what is missing of an output from its complete working store.

    Each carries ``stamp``, beside its result key. Raises OutputError if the disk refuses or what is written does not
    read back equal.
    """
    paths = output.paths(publisher.folder)
    chunked_first = sorted(
        output.missing(publisher.folder), key=lambda f: not isinstance(output_format(f), ChunkedFormat)
    )
    for form in chunked_first:  # others take part in these
        full = stamp | {"result_key": output.result_key}
        name = _staged(output, form)
        place = publisher.staging.place(name)
        try:
            if isinstance(output_format(form), ChunkedFormat):
                _fill_pyramid(store, output, form, paths[form], stamp=full, place=place, run=run)
            else:
                export_file(store, place, form, full, path=paths[form])
            publisher.publish(name, paths[form])
        except OSError as error:
            raise OutputError(
                f"cannot write {paths[form]}: {reason(error)}. Free disk space or mend the permission, then run again; "
                f"the computed blocks are kept in {store.path}."
            ) from error


def _fill_pyramid(
    store: Store,
    output: FinalOutput,
    form: str,
    path: Path,
    stamp: dict[str, object],
    place: Path,
    run: RunStage,
) -> None:
    """Build a chunked output and stamp it."""
    pyramid = _pyramid_of(store, output, form, path=path, place=place)
    fill_pyramid(pyramid, store, run, key=output.result_key)
    file, text = pyramid.image.stamped(stamp, output.stem)
    write_text(place / file, text)
    fsync_path(place)


def _pyramid_of(store: Store, output: FinalOutput, form: str, *, path: Path, place: Path) -> Pyramid:
    labels, most = output.name != PROBABILITIES, None if output.pyramid else 1
    image = multiscale_of(form, store.info, store.shard_shape, path, labels=labels, levels=most)
    return Pyramid(f"{output.name}.{form}", image, place, labels)


def begun_levels(store: Store, output: FinalOutput, staging: Path, folder: Path) -> Mapping[Path, LevelTask]:
    """The tasks of all chunked outputs that were begun in a staging folder, by the folder of their ledger.

    ``store`` is the complete working store, ``folder`` that of the final outputs.
    """
    found: dict[Path, LevelTask] = {}
    for form, path in output.paths(folder).items():
        place = staging / _staged(output, form)
        if isinstance(output_format(form), ChunkedFormat) and place.is_dir():
            found |= level_tasks(_pyramid_of(store, output, form, path=path, place=place), store)
    return found


@dataclass(frozen=True, slots=True)
class LevelsOfAnother:
    """Does blocks of the chunked outputs that another process builds now and will publish.

    Parameters
    ----------
    worker, work
        This process, and the work folder.
    folder
        That of the final outputs.
    run
        Does the blocks of a level.
    done
        Ledgers of levels that need nobody any more.
    """

    worker: Worker
    work: Path
    folder: Path
    run: RunStage
    done: set[Path] = field(default_factory=set)

    def fill(self, store: Store, output: FinalOutput) -> None:
        """Do blocks of what is begun of an output, until that is done; ``store`` is its complete working store.

        What goes wrong here the other process meets as well, or it was replaced meanwhile.
        """
        lease = self.worker.look(SINGLE_WRITER)
        if lease is None or lease.state != HELD:
            return
        staging = staging_folder(self.work, lease)
        begun = {path.parent for path in staging.glob(f"{LEDGER}_{output.name}.*/{HEADER}")} - self.done
        if not begun:
            return
        try:
            tasks = begun_levels(store, output, staging, self.folder)
            for place in (place for place in tasks if place in begun):
                with contextlib.closing(Ledger.existing(place)) as ledger:
                    if ledger.finished < ledger.planned:
                        self.run(tasks[place], ledger)
                self.done.add(place)
        except (ConnectomicsError, LeaseLostError, OSError) as error:
            log.info("no longer helping with %s: %s", output.stem, error)
            self.done.update(begun)


def _staged(output: FinalOutput, form: str) -> str:
    """What an output is called while it is built."""
    return f"{output.name}.final.{form}"


def work_folder(run_folder: Path, outputs: Sequence[FinalOutput], program: str) -> Path:
    """Where the unfinished work on these results lies."""
    facts: dict[str, object] = {o.name: o.result_key for o in outputs}
    return run_folder / key_of(facts | {"program": program})[:16]


def seal(run_folder: Path, paths: Iterable[Path]) -> None:
    """Keep the checksums of final outputs that have none yet."""
    for path in paths:
        if path.exists() and not checksums_of(run_folder, path).exists():
            write_digests(path, checksums_of(run_folder, path))


def discard_stores(work: Path) -> None:
    """Remove all that lies in a work folder but ledgers and what the processes agree on."""
    for path in list(work.iterdir()):
        if path.is_dir() and not path.name.startswith((LEDGER, COORDINATION)):
            discard(path)
    for pattern in (f".*{TEMPORARY}", f"{LEDGER}*/.*{TEMPORARY}"):
        for left_behind in work.glob(pattern):
            left_behind.unlink(missing_ok=True)  # by a process that was killed as it wrote a header or a plan


def settle(run_folder: Path, work: Path, outputs: Sequence[FinalOutput], paths: Iterable[Path]) -> None:
    """Do for finished outputs what is left when nobody works here any more: checksums of their paths, tidying."""
    if not work.is_dir() or not is_deserted(work / COORDINATION):
        return
    seal(run_folder, paths)
    discard_stores(work)
    try:
        discard(work / COORDINATION)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return  # somebody has just come, and will tidy
    for path in work.glob(f"{STAGING}*"):
        discard(path)
    retire(run_folder.parent, [output.stem for output in outputs], work)
    with contextlib.suppress(OSError):  # it holds the ledgers, but of what was made in memory
        work.rmdir()


@contextlib.contextmanager
def withdrawing(run_folder: Path, work: Path, outputs: Sequence[FinalOutput]) -> Iterator[None]:
    """Where a run ends early, give back the names that it claimed, unless a result may still be about to appear."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ConnectomicsError, OSError):  # what went wrong is told
            if is_deserted(work / COORDINATION) and not any(work.glob(f"{STAGING}*")):
                retire(run_folder.parent, [output.stem for output in outputs], work)
        raise
