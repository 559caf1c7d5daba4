"""Processes that survey one volume together: killed between bands, refused, late; the bytes of one that is alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import ForkServer, Running

from connectomics.commands.status import status_of
from connectomics.commands.verify_run import verify_run
from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Block
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.task import BlockFailure, BlockRecord, RunReport, Task
from connectomics.models.spec import ChannelNormalisation
from connectomics.runs.job import VolumeJob
from connectomics.stages.predict.segmenter import EnsembleMember
from connectomics.stages.survey.bands import Bands

import small_bands
from nnunet_models import make_model
from small_jobs import em_like, finals, infer_words, ledger_lines, quick_folder, write_h5
from small_runs import Failing, NotNegative, Reader, changed, job_in, labels, run

BANDS = 8  # of the volume below: one for each section
CUT = {"tile_voxels": 1024, "least_bytes": 64 * 48 * 4, "most_bytes": 64 * 48 * 4}
AT_ONCE = CUT | {"least_bytes": 1 << 20, "most_bytes": 1 << 20}  # in the same tiles, which decide the last bits
SETTINGS = (
    "inference.block_shape=[2,48,64]",
    "inference.test_time_augmentation.enabled=false",
    "system.stale_after_s=2",
)


@dataclass(frozen=True)
class Bench:
    """A server, a job and its result where one process surveys the volume at once."""

    server: ForkServer
    folder: Path
    model: Path
    volume: Path
    reference: dict[str, bytes]

    def begin(
        self, output: Path, name: str, volume: Path | None = None, cut: dict[str, int] = CUT, **how: Any
    ) -> Running:
        words = infer_words(self.model, output, volume or self.volume, *SETTINGS)
        return self.server.start(words, name, prepared=("small_bands", cut), watched=output, **how)

    def ended(self, *children: Running) -> list[int]:
        """The exit codes of children, when all have ended."""
        until = time.monotonic() + 120
        while any(isinstance(state, str) for state in self.server.states(children)):
            assert time.monotonic() < until, [child.printed() for child in children]
            time.sleep(0.05)
        return [int(state) for state in self.server.states(children)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with quick_folder() as folder:
        model = make_model(folder / "model", dimensions=2, patch=(16, 16), features=(4, 8))
        volume = write_h5(folder / "v.h5", em_like((BANDS, 48, 64)).astype(np.float32) / 7)
        with ForkServer(folder) as server:
            made = Bench(server, folder, model, volume, {})
            assert made.ended(made.begin(folder / "one", "one", cut=AT_ONCE)) == [0]
            assert not list((folder / "one").glob("*.run/*/ledger_survey")), "a single band is no stage"
            yield replace(made, reference=finals(folder / "one"))


def bands_done(output: Path) -> Counter[str]:
    return Counter(line["block"] for line in ledger_lines(output / "v_labels.run", "ledger_survey"))


def test_a_run_goes_on_with_the_bands_that_are_done(bench: Bench) -> None:
    output = bench.folder / "alone"
    (code,) = bench.ended(bench.begin(output, "killed", signal_at=(signal.SIGKILL, "/survey/", 7)))
    assert code == -signal.SIGKILL
    before = bands_done(output)
    assert 0 < before.total() < BANDS
    (stage,) = status_of(output / "v_labels.run").stages
    assert (stage.stage, stage.done, stage.planned) == ("survey", before.total(), BANDS)
    again = bench.begin(output, "again")
    assert bench.ended(again) == [0], again.printed()
    assert bands_done(output).total() == BANDS == len(bands_done(output))
    assert finals(output) == bench.reference
    logged = (output / "v_labels.run" / "run.log").read_text()
    assert len(re.findall(": survey, block", logged)) == BANDS
    assert not list((output / "v_labels.run").glob("*/survey")), "the files of the bands are tidied"


@pytest.mark.parametrize(
    "moment", [3, pytest.param(9, marks=pytest.mark.long), pytest.param(17, marks=pytest.mark.long)]
)
def test_others_take_over_the_band_of_one_that_is_killed(bench: Bench, moment: int) -> None:
    output = bench.folder / f"together_{moment}"
    children = [bench.begin(output, "first", signal_at=(signal.SIGKILL, "/survey/", moment))]
    children += [bench.begin(output, f"other_{i}") for i in range(2)]
    first, *others = bench.ended(*children)
    assert first in (-signal.SIGKILL, 0), "the others may have been quicker"
    assert others == [0, 0], [child.printed() for child in children]
    assert finals(output) == bench.reference
    assert len(bands_done(output)) == BANDS
    assert bands_done(output).total() <= BANDS + 1


@pytest.mark.long
@pytest.mark.parametrize("moment", [2, 5, 8])
def test_one_that_slept_in_a_band_wakes_when_all_is_done(bench: Bench, moment: int) -> None:
    output = bench.folder / f"slept_{moment}"
    sleeper = bench.begin(output, "sleeper", signal_at=(signal.SIGSTOP, "/survey/", moment))
    while sleeper.state == "running":
        time.sleep(0.05)
    assert sleeper.state == "stopped"
    other = bench.begin(output, "other")
    assert bench.ended(other) == [0], other.printed()
    assert finals(output) == bench.reference
    sleeper.send(signal.SIGCONT)
    assert bench.ended(sleeper) == [0], sleeper.printed()
    assert finals(output) == bench.reference
    assert len(bands_done(output)) == BANDS


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_no_number_stops_every_process_with_its_place(bench: Bench, count: int) -> None:
    folder = bench.folder / f"refused_{count}"
    image = em_like((BANDS, 48, 64)).astype(np.float32)
    image[5, 30, 40] = np.nan
    volume = write_h5(folder / "v.h5", image)
    alone = bench.begin(folder / "at_once", "at_once", volume, cut=AT_ONCE)
    children = [bench.begin(folder / "out", f"refused_{i}", volume) for i in range(count)]
    assert bench.ended(alone, *children) == [3] * (count + 1)
    (expected,) = re.findall("v.h5: NaN or infinite values.*", alone.printed("stdout"))
    for child in children:
        assert expected in child.printed("stdout")
    assert "(5, 30, 40) to (6, 31, 41)" in expected
    assert not list((folder / "out").glob("*.run/*/ledger_survey/quarantine"))


class Stopping:
    """An executor that stops at the fourth block of a stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def run(self, task: Task, blocks: Iterable[Block | None]) -> Iterator[BlockRecord | BlockFailure]:
        return (Failing(3) if task.name == self._stage else SerialExecutor()).run(task, blocks)


def masked_job(folder: Path) -> VolumeJob:
    """A job whose volume has a mask, to be surveyed in bands."""
    image = np.random.default_rng(1).integers(1, 255, (1, 4, 12, 20), np.uint8)
    image[:, :, :4] = image[..., -3:] = image[:, 1:3, 6:8, 5:9] = 0
    job = job_in(folder, reader=Reader(image))
    scheme = ChannelNormalisation("ZScoreNormalization", masked=True)
    members = (EnsembleMember(NotNegative(), (scheme,)), EnsembleMember(NotNegative(), (scheme,), section_axis=1))
    return changed(job, segmenter=replace(job.labeller.segmenter, members=members))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Labels and statistics of ``masked_job`` where it is surveyed at once."""
    return told(tmp_path_factory.mktemp("at_once"), lambda folder: run(folder, masked_job(folder)))


def told(folder: Path, go: Any) -> dict[str, Any]:
    go(folder)
    provenance = json.loads((folder / "v_labels.run" / "provenance.json").read_text())
    (survey,) = (folder / "v_labels.run").glob("*/survey.json")
    return {"labels": labels(folder).tobytes(), "of": provenance["statistics"], "survey": survey.read_bytes()}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    small_bands.prepare(100, 200, 200, monkeypatch)


def test_threads_with_members_that_see_a_volume_otherwise(tmp_path: Path, cut: None, at_once: dict[str, Any]) -> None:
    """Two passes, each with a ledger of its own, in three processes of this one."""
    reports: list[RunReport] = []

    def together(folder: Path) -> None:
        jobs = [masked_job(folder) for _ in range(3)]
        threads = [threading.Thread(target=lambda job=job: reports.append(run(folder, job))) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert told(tmp_path, together) == at_once
    assert len(reports) == 3
    for name in ("ledger_survey", "ledger_survey_2"):
        lines = ledger_lines(tmp_path / "v_labels.run", name)
        assert len(lines) == len({line["block"] for line in lines}) > 4


def test_one_who_comes_later_reads_only_the_result(
    tmp_path: Path, cut: None, at_once: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VolumeError, match="the disk is gone"):
        run(tmp_path, masked_job(tmp_path), Stopping("predict"))
    (work,) = (tmp_path / "v_labels.run").glob("*/survey.json")
    for name in ("survey", "ledger_survey", "survey_2", "ledger_survey_2"):
        shutil.rmtree(work.parent / name)
    monkeypatch.setattr(Bands, "do", lambda self: pytest.fail("it looked for bands"))
    assert told(tmp_path, lambda folder: run(folder, masked_job(folder))) == at_once


@pytest.mark.parametrize(("stage", "skipped"), [("survey", 0), ("predict", 3)])
def test_verifying_a_run_reads_bands_too(
    tmp_path: Path, cut: None, at_once: dict[str, Any], stage: str, skipped: int
) -> None:
    with pytest.raises(VolumeError, match="the disk is gone"):
        run(tmp_path, masked_job(tmp_path), Stopping(stage))
    path = sorted((tmp_path / "v_labels.run").glob("*/survey/*.members"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    report = next(report for report in verify_run(tmp_path / "v_labels.run") if "survey" in report.subject)
    assert report.damaged == (path.stem,)
    reports: list[RunReport] = []
    assert told(tmp_path, lambda folder: reports.append(run(folder, masked_job(folder)))) == at_once
    assert reports[0].skipped == skipped, "blocks rest on the survey, which was made of what was whole"
