"""A process that sleeps for longer than the limit and wakes up: another has finished, and nothing is lost or left.

The long form tries every moment of ``sleep_moments``, whole machines that sleep, clocks that are stepped, and a mix of
all with kills and full disks.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from preloads import compiled
from sleep_mix import Mix
from sleep_moments import AT_PUBLISHING, BY_NAME, ELSEWHERE, IN_THE_C_LIBRARY, PAIRS
from sleep_storm import (
    Job,
    Moment,
    Steps,
    asleep_together,
    overtaking,
    require_ended,
    require_finished,
    side_by_side,
    sleeping,
)
from storm_jobs import EVERYTHING, decoding, labelling

FEW = tuple(
    BY_NAME[name]
    for name in (
        "between check and rename of labels h5",
        "in a block of a level",
        "before the working store is removed",
    )
)
HOUR_S = 3600


@pytest.fixture(scope="module")
def one_of_each() -> Iterator[Job]:
    """Labels by a model, in one format of each kind."""
    with labelling(("inference.block_shape=[1,48,64]", "inference.output.formats=[n5,h5]")) as job:
        yield job


@pytest.fixture(scope="module")
def objects() -> Iterator[Job]:
    with decoding("h5") as job:
        yield job


@pytest.fixture(scope="module")
def everything() -> Iterator[Job]:
    with labelling(EVERYTHING, masked=True) as job:
        yield job


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The same with the library of ``shims`` in its processes."""
    with labelling(EVERYTHING, masked=True, preloaded=compiled("storm", tmp_path_factory.mktemp("shims"))) as job:
        yield job


def test_a_process_that_sleeps_and_wakes_harms_nothing(one_of_each: Job, objects: Job) -> None:
    trials = [(moment.name, sleeping(one_of_each, moment)) for moment in FEW]
    export = Moment("objects between check and rename", FEW[0].at, text="objects.final.h5'")
    assert side_by_side([*trials, (export.name, sleeping(objects, export))]) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("early", [False, True])
def test_asleep_at_every_publishing_step(everything: Job, early: bool) -> None:
    assert len(AT_PUBLISHING) >= 50
    assert side_by_side(trial(everything, moment, early=early) for moment in AT_PUBLISHING) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("early", [False, True])
def test_asleep_in_every_other_stage(everything: Job, early: bool) -> None:
    assert side_by_side(trial(everything, moment, early=early) for moment in ELSEWHERE) == []


def trial(job: Job, moment: Moment, *, early: bool) -> tuple[str, Steps]:
    named = replace(moment, name=f"{'early' if early else 'late'} {moment.name}")
    return named.name, sleeping(job, named, early=early)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_asleep_within_the_libraries_that_write(preloaded: Job) -> None:
    def within(number: int, call: tuple[str, str, int]) -> tuple[str, Steps]:
        moment = Moment(f"call {number}", "")
        return f"{call}", sleeping(preloaded, moment, prepared={"call": call})

    assert side_by_side(within(number, call) for number, call in enumerate(IN_THE_C_LIBRARY)) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_awake_while_the_next_one_works(everything: Job) -> None:
    """The first goes on while the second is in the middle of it, for longer or shorter than the limit."""
    trials = [
        (
            f"{names}, {hold_s} s",
            overtaking(everything, (BY_NAME[names[0]], BY_NAME[names[1]]), f"pair_{number}_{hold_s}", hold_s),
        )
        for (number, names), hold_s in itertools.product(enumerate(PAIRS), (0.3, 3.0))
    ]
    assert side_by_side(trials) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, 3])
def test_the_machine_sleeps(everything: Job, count: int) -> None:
    moments = [
        *(BY_NAME[name] for name in ("in a block", "in a block of a level", "in tables of objects")),
        *(BY_NAME[name] for name in ("between check and rename of labels n5", "before tidying", "before it joins")),
    ]
    trials = [
        (moment.name, asleep_together(everything, moment, f"machine_{count}_{number}", count))
        for number, moment in enumerate(moments)
    ]
    assert side_by_side(trials, at_once=2) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, 3])
def test_clocks_are_stepped_by_an_hour(preloaded: Job, count: int) -> None:
    """Those of the processes, each by itself, and the times of files; nobody counts as gone."""

    def stepped() -> Steps:
        output = preloaded.folder / f"clocks_{count}"
        clocks = [preloaded.folder / f"clock_{count}_{number}" for number in range(count)]
        for clock in clocks:
            clock.write_bytes(struct.pack("q", 0))
        children = [preloaded.start(output, prepared={"clock": str(clock)}) for clock in clocks]
        for number in itertools.count():
            if not any(isinstance(state, str) for state in preloaded.server.states(children)):
                break
            step = (HOUR_S, -HOUR_S, 0)[number % 3]
            clock = clocks[number % count]
            with clock.open("r+b") as stream:
                stream.write(struct.pack("q", step))
            _step_files(output, step)
            yield
        for child in children:
            require_ended(child)
            assert "gone" not in child.printed(), child.printed()
        log = (output / "v_labels.run" / "run.log").read_text()
        assert len(set(re.findall(r"^\S+ (\d\d):\d\d:", log, re.MULTILINE))) > 1, "no clock was stepped"
        yield from require_finished(preloaded, output)

    assert side_by_side([("clocks", stepped())]) == []


def _step_files(output: Path, step: int) -> None:
    for path in output.glob("*.run/*/*"):
        try:
            now = path.stat().st_mtime
            os.utime(path, (now + step, now + step))
        except OSError:
            continue


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_mix_of_kills_stops_and_full_disks(everything: Job) -> None:
    """250 events on runs through every stage, 250 on decodings; ``python tests/sleep_mix.py 500 1`` does as much."""
    with decoding("h5,zarr,tiff,zarr2,n5,precomputed") as objects_in_all:
        mixes = [Mix(everything, 1, 250), Mix(objects_in_all, 2, 250)]
        assert side_by_side([(f"seed {mix.seed}", mix.trial()) for mix in mixes], at_once=2) == []
    assert sum(mix.done.total() for mix in mixes) >= 500
