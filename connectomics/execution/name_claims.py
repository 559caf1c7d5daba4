"""Claims on final names: two runs of different settings never make the same output at once.

A claim lies beside the outputs and tells which run makes them. All processes of that run share it and renew it; another
run may have the name when they are gone, and revokes what they were about to publish.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from connectomics.core.errors import OutputError, StorageError
from connectomics.core.process import is_alive, is_dead, new_mark
from connectomics.execution.coordination import DiskStore, Version
from connectomics.execution.lease import Witness, unpacked
from connectomics.execution.publishing import revoke_all
from connectomics.execution.run_folder import COORDINATION, OLD_WORKERS
from connectomics.execution.worker import Worker

log = logging.getLogger(__name__)
CLAIMS = ".claims"
PROTOCOL = 1
LONG_NAME = 180
OLD_HEARTBEAT = ".worker"
OLD_STALE_S = 60.0


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim's record says.

    Parameters
    ----------
    result_key
        Of the output of this name.
    work
        The run's work folder, from the folder of the outputs on; its name is made of result keys and program.
    holder
        Session that wrote it.
    before
        Work folders of runs that had the name before: what they are about to publish is revoked.
    protocol
        Version of the rules.
    """

    result_key: str
    work: str
    holder: str
    counter: int = 0
    before: tuple[str, ...] = ()
    protocol: int = PROTOCOL


class NameClaims:
    """The claims of a run on its final names; a context manager.

    Parameters
    ----------
    folder
        Of the outputs.
    names
        Stems of the final names, each with its result key.
    work
        Work folder of the run, below ``folder``.
    worker
        This process among those of the run.

    Raises
    ------
    OutputError
        On entering, if another run, or a program of before, makes an output of one of the names now.
    """

    def __init__(self, folder: Path, names: Sequence[tuple[str, str]], work: Path, worker: Worker) -> None:
        self._folder = folder
        self._names = names
        self._work = work
        self._worker = worker
        self._store = DiskStore(folder / CLAIMS)
        self._seen: dict[str, Version] = {}

    def __enter__(self) -> NameClaims:
        _require_no_old_worker(self._work.parent)
        for stem, key in self._names:
            self._claim(stem, key)
        self._worker.renewals.append(self.renew)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._worker.renewals.remove(self.renew)

    def renew(self) -> None:
        """Show that the run still wants its names, unless another process of it has done so."""
        for stem, key in self._names:
            seen = self._store.read(_name(stem))
            if seen is not None and seen.number == self._seen[stem].number:
                seen = self._store.replace(_name(stem), seen, _packed(self._renewed(seen)))
            if seen is not None and self._is_ours(_claim_of(seen), key):
                self._seen[stem] = seen

    def confirm(self) -> None:
        """Make sure that the names are this run's at this moment.

        Raises
        ------
        OutputError
            If another run has taken one while this process stood still.
        """
        for stem, key in self._names:
            while True:
                seen = self._store.read(_name(stem))
                if seen is None or not self._is_ours(_claim_of(seen), key):
                    raise OutputError(
                        f"{self._folder / stem}: another run has taken this name while this process stood still; run "
                        "again with another inference.volume_mode.output_suffix or output_path"
                    )
                if self._store.replace(_name(stem), seen, _packed(self._renewed(seen))) is not None:
                    break

    def _renewed(self, seen: Version) -> Claim:
        claim = _claim_of(seen)
        assert claim is not None
        return dataclasses.replace(claim, holder=self._worker.mark, counter=claim.counter + 1)

    def _is_ours(self, claim: Claim | None, key: str) -> bool:
        return claim is not None and (claim.result_key, claim.work) == (key, self._relative)

    @property
    def _relative(self) -> str:
        return os.path.relpath(self._work, self._folder)

    def _claim(self, stem: str, key: str) -> None:
        name, own, first = _name(stem), Claim(key, self._relative, self._worker.mark), True
        observers: dict[str, Witness] = {}
        for pause in self._worker.pauses():
            seen = self._store.read(name)
            other = None if seen is None else _claim_of(seen)
            if seen is None:
                made = self._made_first(name, own)
            elif self._is_ours(other, key):
                made = self._store.replace(name, seen, _packed(self._renewed(seen)))
                if made is None and not first:
                    made = seen  # another process of this run has renewed it since this one began to look
            elif self._is_over(stem, other, seen, observers):
                made = self._take_over(name, own, other, seen)
            else:
                made = None
            if made is not None:
                self._revoke_before(made)
                self._seen[stem] = made
                return
            first = False
            self._worker.sleep(pause)

    def _made_first(self, name: str, own: Claim) -> Version | None:
        """Make a claim where there is none; a run that ends may remove their folder meanwhile, while it is empty.

        The folder need not outlast a loss of power, since no process that has a claim does.
        """
        while True:
            (self._folder / CLAIMS).mkdir(exist_ok=True)
            try:
                return self._store.create(name, _packed(own))
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise

    def _take_over(self, name: str, own: Claim, other: Claim | None, seen: Version) -> Version | None:
        """Take a name from a run that is over."""
        counter = seen.number + 1
        if other is not None:
            own = dataclasses.replace(own, before=tuple(sorted({*other.before, other.work} - {own.work})))
        return self._store.replace(name, seen, _packed(dataclasses.replace(own, counter=counter)))

    def _revoke_before(self, made: Version) -> None:
        """Let runs that had the name before publish nothing any more; whoever took it from them may sleep meanwhile."""
        claim = _claim_of(made)
        for work in () if claim is None else claim.before:
            revoke_all(self._folder / work)

    def _is_over(self, stem: str, other: Claim | None, seen: Version, observers: dict[str, Witness]) -> bool:
        """Whether the run that has a name is gone, or not known to be yet; an OutputError if it surely lives."""
        if other is None:
            observer = observers.setdefault("", self._worker.witness_of(self._folder / CLAIMS))
            return observer.watch.is_stale(stem, seen.number, self._worker.limit_s)
        if other.protocol != PROTOCOL:
            raise OutputError(
                f"{self._folder / stem}: is claimed by another version of this program; let that run end, or choose "
                "another output_path"
            )
        where = self._folder / other.work / COORDINATION
        if not where.is_dir():
            return True
        if other.work not in observers:
            observers[other.work] = self._worker.witness_of(where)
            log.info("%s was made by another run; looking whether that is over", stem)
        observer = observers[other.work]
        for mark in observer.sessions():
            if observer.is_gone(mark):
                continue
            if observer.is_surely_alive(mark):
                raise OutputError(self._refusal(stem, observer, mark))
            return False
        return True

    def _refusal(self, stem: str, observer: Witness, mark: str) -> str:
        who = observer.presence(mark)
        by = "" if who is None else f" by process {who.pid} on {who.host} since {_date(who.since)}"
        return (
            f"{self._folder / stem}: is being made now{by}, with another model, setting, input or program; wait until "
            "that has ended, or choose another inference.volume_mode.output_suffix or output_path"
        )


def retire(folder: Path, names: Sequence[str], work: Path) -> None:
    """Remove the claims of a run that has ended and published all, so that nothing of them is left."""
    store = DiskStore(folder / CLAIMS)
    for stem in names if (folder / CLAIMS).is_dir() else ():
        seen = store.read(_name(stem))
        claim = None if seen is None else _claim_of(seen)
        if seen is None or claim is None or claim.work != os.path.relpath(work, folder):
            continue
        over = dataclasses.replace(claim, holder=new_mark(), counter=claim.counter + 1)
        if store.replace(_name(stem), seen, _packed(over)) is not None:
            store.remove(_name(stem))
    with contextlib.suppress(OSError):  # others have claims there
        (folder / CLAIMS).rmdir()


def _name(stem: str) -> str:
    """Name of a claim's record."""
    return stem if len(os.fsencode(stem)) <= LONG_NAME else hashlib.sha256(os.fsencode(stem)).hexdigest()


def _packed(claim: Claim) -> bytes:
    return json.dumps(asdict(claim), sort_keys=True).encode()


def _claim_of(version: Version) -> Claim | None:
    fields = unpacked(version.content)
    try:
        return Claim(**fields | {"before": tuple(fields.get("before", ()))})
    except TypeError:
        return None


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _require_no_old_worker(run_folder: Path) -> None:
    """Refuse to work beside a living process of a program that knows no claims; an OutputError names it."""
    for heartbeat in run_folder.glob(f"*/{OLD_WORKERS}/*{OLD_HEARTBEAT}"):
        age = 0.0
        with contextlib.suppress(FileNotFoundError):
            age = time.time() - heartbeat.stat().st_mtime
        if is_alive(heartbeat.stem) or (not is_dead(heartbeat.stem) and age < OLD_STALE_S):
            raise OutputError(
                f"{run_folder}: a process of an older version of this program works here ({heartbeat.stem}); let it "
                "end, or choose another output_path"
            )
