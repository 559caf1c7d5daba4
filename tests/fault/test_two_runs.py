"""Two commands with different settings and one final name: one is refused by name, the other's result stands."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sleep_storm import LIMIT_S, Job, Moment, Steps, left_in, pause, require_ended, require_same, side_by_side, wait
from storm_jobs import decoding

from small_jobs import finals

COMPUTING = Moment("computing", "connectomics.execution.ledger:Ledger.append", number=2)
PUBLISHING = (
    Moment("before the check", "connectomics.execution.name_claims:NameClaims.confirm", number=3),
    Moment("between check and rename", "connectomics.execution.publishing:rename", text="objects.final.h5"),
    Moment("before the checksums", "connectomics.execution.publishing:rename", text="instances.h5.sha256"),
    Moment("in the table", "connectomics.objects.table:write_table"),
    Moment("while it exports", "connectomics.stages.output.export:_compare"),
)
ELSEWHERE = "0123abcd"


@pytest.fixture(scope="module")
def low() -> Iterator[Job]:
    with decoding("h5") as job:
        yield job


@pytest.fixture(scope="module")
def high(low: Job) -> Job:
    """The same command with another threshold."""

    def words(output: Path) -> list[str]:
        return [word.replace("threshold: 0.5", "threshold: 0.52") for word in low.words(output)]

    job = replace(low, words=words, folder=low.folder / "high")
    job.folder.mkdir()
    job.run_undisturbed()
    assert job.reference.keys() == low.reference.keys() and job.reference != low.reference
    return job


def refused(first: Job, second: Job, name: str, *, stopped_s: float) -> Steps:
    """The first has begun, and may have been stopped for long; the second is refused before it computes anything."""
    output = first.folder / name
    begun = first.start(output, prepared={"stops": [COMPUTING.stop]})
    yield from wait(begun, "stopped")
    yield from pause(stopped_s)
    before = left_in(output)
    late = second.start(output)
    yield from wait(late)
    require_ended(late, 3, "the second command")
    told = f"by process {begun.pid} on {re.escape(socket.gethostname())} since .*another model, setting, input"
    assert re.search(told, late.printed()), late.printed()
    assert not finals(output)
    computed = {path for path in left_in(output) - before if "coordination" not in path}
    assert not [path for path in computed if path.endswith((".jsonl", ".zarr"))], computed
    begun.send(signal.SIGCONT)
    yield from wait(begun)
    require_ended(begun, 0, "the first command")
    require_same(first, output, "when the first had ended")
    assert not (output / ".claims").exists()
    again = second.start(output)
    yield from wait(again)
    require_ended(again, 3, "the second command, called again")
    assert "was made by another model, setting or input" in again.printed()
    require_same(first, output, "after the second command was called again")


def taken_over(first: Job, second: Job, moment: Moment, name: str) -> Steps:
    """The first is of another machine and stands still: the second has the name after the limit, and keeps it."""
    output = first.folder / name
    sleeper = first.start(output, prepared={"stops": [moment.stop], "host": ELSEWHERE})
    yield from wait(sleeper, "stopped")
    assert sleeper.state == "stopped", sleeper.printed()
    late = second.start(output)
    yield from wait(late)
    require_ended(late, 0, "the second command")
    require_same(second, output, "when the second had ended")
    sleeper.send(signal.SIGCONT)
    yield from wait(sleeper)
    require_ended(sleeper, 3, "the sleeper")
    assert "another run has taken this name" in sleeper.printed(), sleeper.printed()
    require_same(second, output, "when the sleeper had ended")
    assert not (output / ".claims").exists()
    assert not list(output.glob("*.run/*/staging.*/*"))


def test_the_second_command_is_refused_by_name(low: Job, high: Job) -> None:
    """However long the first stood still: on the same machine it is known to live."""
    trials = [
        ("at once", refused(low, high, "at_once", stopped_s=0.0)),
        ("after a sleep", refused(low, high, "slept", stopped_s=1.5 * LIMIT_S)),
        ("taken over", taken_over(low, high, PUBLISHING[1], "taken")),
    ]
    assert side_by_side(trials) == []


@pytest.mark.long
def test_a_name_is_taken_over_at_every_step(low: Job, high: Job) -> None:
    trials = [
        (moment.name, taken_over(low, high, moment, f"taken_{number}"))
        for number, moment in enumerate((COMPUTING, *PUBLISHING))
    ]
    assert side_by_side(trials) == []


@pytest.mark.long
def test_one_of_another_machine_that_lives_is_not_robbed(low: Job, high: Job) -> None:
    """Its records change, so the second command is refused."""

    def trial() -> Steps:
        output = low.folder / "lives"
        begun = low.start(output, prepared={"stops": [COMPUTING.stop], "host": ELSEWHERE})
        yield from wait(begun, "stopped")
        late = high.start(output)
        while late.state == "running":
            with contextlib.suppress(StopIteration):
                begun.send(signal.SIGCONT)
                yield from pause(0.3 * LIMIT_S)
            yield
        require_ended(late, 3, "the second command")
        yield from wait(begun, "stopped")
        require_ended(begun, 0, "the first command")
        require_same(low, output, "at the end")

    assert side_by_side([("lives", trial())]) == []
