"""Lists of small volumes in real processes: killed anywhere, shared, asleep; a kill in a block counts."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from sleep_storm import Job, Moment, Steps, require_ended, require_same, side_by_side, wait

from connectomics.execution.block_shards import Shards
from connectomics.execution.coordination import DiskStore
from connectomics.execution.lease import HELD, lease_of

from nnunet_models import make_model
from small_jobs import finals, infer_words, quick_folder, write_png

COUNT = 4
SHORT = 8  # kills of the short form
PUBLISHING = "connectomics.execution.publishing:"
SMALL = "connectomics.runs.small_volume:"
MOMENTS = (
    Moment("in the block", SMALL + "_InMemory.process"),
    Moment("before it publishes", SMALL + "_published"),
    Moment("as what is told is put in place", PUBLISHING + "rename", text="provenance.json'"),
    Moment("between check and rename", PUBLISHING + "rename", text="v0_labels.h5'"),
    Moment("when all is published", PUBLISHING + "Staging.__exit__"),
)


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """A list of a few images."""
    with quick_folder() as folder, ForkServer(folder) as server:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        for number in range(COUNT):
            write_png(folder / "data" / f"v{number}.png", (16, 24), seed=number)

        def words(output: Path) -> list[str]:
            given = infer_words(model, output, folder / "data" / "v*.png")
            return [*given, "inference.test_time_augmentation.enabled=false"]

        made = Job(server, folder, words)
        with made.ending():
            made.run_undisturbed()
            assert len(made.reference) == COUNT
            yield made


@pytest.fixture(scope="module")
def touched(job: Job) -> tuple[str, ...]:
    """Paths of the file operations of an undisturbed run."""
    output = job.folder / "touched"
    ended = job.server.run(job.words(output), watched=output)
    assert ended.code == 0 and finals(output) == job.reference
    assert not list(output.glob("*.run/*/ledger")), "not the way of larger volumes"
    return ended.touched


def require_resumed(job: Job, output: Path, when: str) -> None:
    """The same command ends with the undisturbed bytes; nothing that is finished is done again, nothing is left."""
    before = finals(output)
    assert all(job.reference[name] == content for name, content in before.items()), when
    ended = job.server.run(job.words(output))
    assert ended.code == 0, f"{when}: {ended.stderr}"
    assert f"Skipped {len(before)}/{COUNT} finished" in ended.stderr, when
    require_same(job, output, when)
    assert not list(output.glob("*.run/*/coordination")) and not list(output.glob("*.run/*/staging.*")), when
    assert not (output / ".claims").exists(), when


def kill_before(job: Job, number: int) -> None:
    """Kill before the n-th file operation, then run again."""
    output = job.folder / f"killed_{number}"
    ended = job.server.run(job.words(output), watched=output, kill_at=("", number))
    assert ended.code == -signal.SIGKILL, ended.stderr
    require_resumed(job, output, f"killed before operation {number}")


def test_killed_anywhere(job: Job, touched: tuple[str, ...]) -> None:
    """In the second volume; its operations are those of all others."""
    begins = [
        i for i, path in enumerate(touched, 1) if path.endswith(("v1_labels.run/run.log", "v2_labels.run/run.log"))
    ]
    first, end = begins[0], begins[-1]
    for number in sorted({first + i * (end - first) // SHORT for i in range(SHORT)}):
        kill_before(job, number)


@pytest.mark.long
def test_killed_everywhere(job: Job, touched: tuple[str, ...]) -> None:
    for number in range(1, len(touched) + 1):
        kill_before(job, number)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_share_a_list(job: Job, count: int) -> None:
    output = job.folder / f"shared_{count}"
    for ended in job.server.run_together(job.words(output), count, watched=output):
        assert ended.code == 0, ended.stdout + ended.stderr
        assert sum(map(int, re.findall(r"(?m)^(?:done|skipped) +(\d+)$", ended.stdout))) == COUNT
        assert "Traceback" not in ended.stderr
    require_same(job, output, "when all had ended")
    assert not list(output.glob("*.run/*/coordination")) and not (output / ".claims").exists()


def overtaken(job: Job, moment: Moment) -> Steps:
    """One process stops; another makes what it had in hand and ends; the first goes on and changes nothing."""
    output = job.folder / moment.name.replace(" ", "_")
    sleeper = job.start(output, prepared={"stops": [moment.stop]})
    yield from wait(sleeper, "stopped")
    other = job.start(output)
    yield from wait(other)
    require_ended(other, who="the other process")
    require_same(job, output, "when the other process had ended")
    made = {path: path.stat().st_ino for path in output.glob("*.h5")}
    sleeper.send(signal.SIGCONT)
    yield from wait(sleeper)
    require_ended(sleeper, who="the sleeper")
    require_same(job, output, "when all had ended")
    assert {path: path.stat().st_ino for path in output.glob("*.h5")} == made, "the sleeper put its own in place"


def test_a_sleeper_never_overwrites(job: Job) -> None:
    assert side_by_side([(moment.name, overtaken(job, moment)) for moment in MOMENTS], at_once=len(MOMENTS)) == []


def test_a_kill_in_a_block_counts(job: Job) -> None:
    """Its lease stays in hand, so that the next holder inherits a death; the block of an orderly stop is given back."""
    states = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        output = job.folder / f"in_the_block_{number}"
        child = job.start(output, prepared={"stops": [MOMENTS[0].stop]})
        assert side_by_side([("the child", wait(child, "stopped"))]) == []
        (records,) = output.glob("*.run/*/coordination")
        child.send(number)
        child.send(signal.SIGCONT)
        assert side_by_side([("the child", wait(child))]) == []
        seen = DiskStore(records).read(Shards.of(records.parent / "ledger", 1).lease(0))
        lease = None if seen is None else lease_of(seen)
        in_hand = lease is not None and lease.state == HELD and lease.blocks is not None
        states.append(in_hand and lease.blocks.after_death().deaths == {0: 1})
        require_resumed(job, output, f"after signal {number}")
    assert states == [True, False]
