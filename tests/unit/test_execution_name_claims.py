"""Claims on final names: one run at a time makes an output, others are refused by name or take over from the dead."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectomics.core.errors import OutputError
from connectomics.execution import lease as leases
from connectomics.execution import name_claims
from connectomics.execution.coordination import DiskStore
from connectomics.execution.lease import Session
from connectomics.execution.name_claims import CLAIMS, NameClaims, retire
from connectomics.execution.publishing import STAGING
from connectomics.execution.worker import Worker

FOREIGN = "0123abcd-77-5-aaaaaaaa"  # a process of another machine
LIMIT_S = 0.2


@contextlib.contextmanager
def run(folder: Path, key: str, stem: str = "v_labels") -> Iterator[NameClaims]:
    """A process of the run that makes the output of this key."""
    work = folder / f"{stem}.run" / key
    with (
        Worker.of(work / "coordination", limit_s=LIMIT_S) as worker,
        NameClaims(folder, [(stem, key)], work, worker) as claims,
    ):
        yield claims


def foreign_run(folder: Path, key: str) -> Session:
    """A run of one process on another machine, which is about to publish."""
    with run(folder, key):
        pass
    work = folder / "v_labels.run" / key
    (work / f"{STAGING}0.{FOREIGN}").mkdir()
    return Session(DiskStore(work / "coordination"), LIMIT_S, FOREIGN)


def test_processes_of_one_run_share_a_name_and_another_run_is_refused_by_it(tmp_path: Path) -> None:
    with run(tmp_path, "a") as one, run(tmp_path, "a") as two:
        for claims in (one, two, one):
            claims.renew()
            claims.confirm()
        with pytest.raises(OutputError, match=r"v_labels: is being made now by process \d+ on .*wait until"):
            run(tmp_path, "b").__enter__()
        with run(tmp_path, "b", "w_labels"):
            pass
    with run(tmp_path, "b"):
        pass


def test_a_run_that_was_killed_gives_way_at_once(tmp_path: Path) -> None:
    code = "from connectomics.core.process import new_mark; print(new_mark())"
    mark = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    with run(tmp_path, "a"):
        pass
    Session(DiskStore(tmp_path / "v_labels.run" / "a" / "coordination"), 1000.0, mark)
    began = time.monotonic()
    with run(tmp_path, "b"):
        assert time.monotonic() - began < 5


def test_a_silent_run_elsewhere_gives_way_after_the_limit_and_publishes_nothing_then(tmp_path: Path) -> None:
    session = foreign_run(tmp_path, "a")
    (staging,) = tmp_path.glob(f"v_labels.run/a/{STAGING}*")
    began = time.monotonic()
    with run(tmp_path, "b") as claims:
        assert time.monotonic() - began > LIMIT_S
        assert staging.is_file(), "what it would publish from is revoked"
        assert not session.renew()
        claims.confirm()
        with pytest.raises(OutputError, match="is being made now"):
            run(tmp_path, "a").__enter__()


def test_a_run_elsewhere_that_shows_a_sign_of_life_is_not_robbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = foreign_run(tmp_path, "a")
    real = leases.Witness.is_gone

    def looked(self: leases.Witness, mark: str) -> bool:
        gone = real(self, mark)
        assert session.renew()
        return gone

    monkeypatch.setattr(leases.Witness, "is_gone", looked)
    with pytest.raises(OutputError, match="is being made now"):
        run(tmp_path, "b").__enter__()


def test_whoever_shares_a_name_revokes_the_run_that_had_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that took it over may fall asleep before it does so."""
    foreign_run(tmp_path, "a")
    (staging,) = tmp_path.glob(f"v_labels.run/a/{STAGING}*")
    with monkeypatch.context() as patch:
        patch.setattr(name_claims, "revoke_all", lambda work: None)
        with run(tmp_path, "b"):
            assert staging.is_dir()
    with run(tmp_path, "b"):
        assert staging.is_file()


def test_who_lost_its_name_is_told(tmp_path: Path) -> None:
    with run(tmp_path, "a") as claims:
        store = DiskStore(tmp_path / CLAIMS)
        seen = store.read("v_labels")
        assert seen is not None
        theirs = json.loads(seen.content) | {"result_key": "b", "work": "v_labels.run/b", "counter": 99}
        assert store.replace("v_labels", seen, json.dumps(theirs).encode()) is not None
        claims.renew()
        with pytest.raises(OutputError, match="another run has taken this name while this process stood still"):
            claims.confirm()


def test_nothing_is_left_of_claims_that_are_retired(tmp_path: Path) -> None:
    for key in ("a", "b"):
        with run(tmp_path, key):
            pass
    retire(tmp_path, ["v_labels"], tmp_path / "v_labels.run" / "a")
    assert (tmp_path / CLAIMS).is_dir(), "it is another's by now"
    retire(tmp_path, ["v_labels"], tmp_path / "v_labels.run" / "b")
    retire(tmp_path, ["v_labels"], tmp_path / "v_labels.run" / "b")
    assert not (tmp_path / CLAIMS).exists()


def test_other_rules_are_refused(tmp_path: Path) -> None:
    (tmp_path / CLAIMS).mkdir()
    claim = {"result_key": "x", "work": "v_labels.run/x", "holder": FOREIGN, "protocol": 2}
    DiskStore(tmp_path / CLAIMS).create("v_labels", json.dumps(claim).encode())
    with pytest.raises(OutputError, match="claimed by another version of this program"):
        run(tmp_path, "a").__enter__()


def test_a_living_process_of_an_older_program_is_refused(tmp_path: Path) -> None:
    workers = tmp_path / "v_labels.run" / "0123" / "workers"
    workers.mkdir(parents=True)
    heartbeat = workers / f"{FOREIGN}.worker"
    heartbeat.touch()
    with pytest.raises(OutputError, match=f"a process of an older version of this program works here .{FOREIGN}"):
        run(tmp_path, "a").__enter__()
    heartbeat.unlink()
    with run(tmp_path, "a"):
        pass


def test_a_claim_that_is_not_whole_expires(tmp_path: Path) -> None:
    (tmp_path / CLAIMS).mkdir()
    (tmp_path / CLAIMS / "v_labels.0").touch()
    began = time.monotonic()
    with run(tmp_path, "a") as claims:
        assert time.monotonic() - began > LIMIT_S
        claims.confirm()


def test_names_may_be_long(tmp_path: Path) -> None:
    stem = "n" * 245
    work = tmp_path / "long.run" / "a"
    with Worker.of(work / "coordination") as worker, NameClaims(tmp_path, [(stem, "a")], work, worker) as claims:
        claims.confirm()
    retire(tmp_path, [stem], work)
    assert not (tmp_path / CLAIMS).exists()
