"""Blocks that fail: moments are waited out, others are quarantined while the run goes on, and a rerun mends them."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from connectomics.core.errors import DeviceMemoryError, QuarantineError, StorageError, VolumeError
from connectomics.core.geometry import Box, Vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.inference.case import CaseInput
from connectomics.runs.job import VolumeJob
from connectomics.runs.volume import run_volume
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array

from small_jobs import quick_folder
from small_runs import BLOCKS, EXPECTED, EXTENT, Bright, Reader, changed, cores, job_in, labels, run, settings_in

QUICK = (0.0, 0.0, 0.0)
BAD = Box((2, 0, 10), (3, 6, 20))  # block 2-0-1


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: a run flushes each block to the disk."""
    with quick_folder() as folder:
        yield folder


class Faulty(Reader):
    """A volume on a disk that fails at times: every n-th read for a moment, or always in one box.

    The survey, which reads the volume whole, is spared where a box is bad.
    """

    def __init__(self, *, every: int = 0, bad: Box | None = None, error: Exception | None = None, slow_s: float = 0.0):
        super().__init__()
        self.every, self.bad, self.slow_s, self.reads = every, bad, slow_s, 0
        self.error = error or OSError(errno.EIO, "Input/output error")

    def read(self, box: Box) -> Array:
        self.reads += 1
        time.sleep(self.slow_s)
        if self.every and self.reads % self.every == 0:
            raise self.error
        if self.bad is not None and box.intersect(self.bad).voxels and box.shape != EXTENT:
            raise self.error
        return super().read(box)


def try_run(folder: Path, job: VolumeJob, pauses_s: tuple[float, ...] = QUICK) -> None:
    run(folder, job, pauses_s=pauses_s)


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_fails_at_times_is_waited_for(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Faulty(every=3, error=OSError(number, "for a moment"), slow_s=0.001)
    report = run(tmp_path, job_in(tmp_path, reader=reader), pauses_s=QUICK)
    assert (report.done, report.failed) == (BLOCKS, 0)
    assert (labels(tmp_path) == EXPECTED).all()
    assert caplog.text.count("attempt 2 follows") > 3
    assert "attempt 3 follows" not in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (VolumeError("the section is torn"), "the section is torn"),
        (OSError(errno.EIO, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (ZeroDivisionError("of ours"), "ZeroDivisionError: of ours"),
        (MemoryError(), "MemoryError: out of memory"),
    ],
)
def test_a_block_that_keeps_failing_is_quarantined_and_mended_by_a_rerun(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    job = job_in(tmp_path, reader=Faulty(bad=BAD, error=error))
    with pytest.raises(QuarantineError) as told:
        try_run(tmp_path, job)
    quarantine = next(tmp_path.glob("v_labels.run/*/ledger")) / "quarantine"
    assert str(told.value) == (
        f"1 of {BLOCKS} blocks failed and are quarantined (2-0-1, voxels (2, 0, 10) to (3, 6, 20): {reason}); their "
        f"tracebacks are in {quarantine}, all other blocks are finished, and running again tries these once more"
    )
    assert told.value.exit_code == 3
    (trace,) = quarantine.iterdir()
    assert trace.name == "2-0-1.txt"
    text = trace.read_text()
    assert text.startswith(f"block 2-0-1, voxels (z, y, x) (2, 0, 10) to (3, 6, 20)\n{reason}\n\nTraceback")
    assert type(error).__name__ in text
    assert not (tmp_path / "v_labels.h5").exists()
    report = json.loads((tmp_path / "v_labels.run" / "report.json").read_text())
    assert (report["done"], report["failed"]) == (BLOCKS - 1, 1)

    with pytest.raises(QuarantineError):
        try_run(tmp_path, job)
    assert list(quarantine.iterdir()) == [trace]

    mended = job_in(tmp_path)
    report_again = run(tmp_path, mended)
    assert (report_again.skipped, report_again.done) == (BLOCKS - 1, 1)
    assert len(cores(mended)) == 1
    assert not list(quarantine.iterdir())
    assert (labels(tmp_path) == EXPECTED).all()


def test_a_block_that_fails_once_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = Faulty(every=7, error=ZeroDivisionError("by chance"))
    report = run(tmp_path, job_in(tmp_path, reader=reader))
    assert (report.done, report.failed) == (BLOCKS, 0)
    assert "failed, attempt 1 of 2: ZeroDivisionError: by chance" in caplog.text
    assert (labels(tmp_path) == EXPECTED).all()


def test_many_failed_blocks_are_counted_and_some_are_named(tmp_path: Path) -> None:
    reader = Faulty(bad=Box((0, 0, 0), (4, 6, 20)), error=VolumeError("torn"))
    with pytest.raises(QuarantineError) as told:
        try_run(tmp_path, job_in(tmp_path, reader=reader))
    assert str(told.value).startswith(f"8 of {BLOCKS} blocks failed and are quarantined (0-0-0, voxels")
    assert "; and 3 more); their" in str(told.value)


def test_when_every_block_fails_the_run_ends(tmp_path: Path) -> None:
    job = job_in(tmp_path, reader=Faulty(bad=Box((0, 0, 0), (4, 12, 20)), error=VolumeError("the device is lost")))
    job = replace(job, plan=replace(job.plan, block_shape=(1, 4, 5), chunk_shape=(1, 4, 5)))
    with pytest.raises(QuarantineError, match="16 blocks in a row failed, the last with: the device is lost"):
        try_run(tmp_path, job)
    assert len(list(tmp_path.glob("v_labels.run/*/ledger/quarantine/*"))) == 16


def test_an_input_that_may_not_be_read_ends_its_volume_at_once(tmp_path: Path) -> None:
    denied = VolumeError("cannot read the section")
    denied.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    reader = Faulty(bad=BAD, error=denied)
    with pytest.raises(VolumeError, match="cannot read the section"):
        try_run(tmp_path, job_in(tmp_path, reader=reader))
    assert not list(tmp_path.glob("v_labels.run/*/ledger/quarantine"))
    job = job_in(tmp_path)
    run(tmp_path, job)
    assert len(cores(job)) == BLOCKS - 9, "the blocks before it are kept"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTCONN])
def test_a_disk_that_refuses_ends_the_run_at_once_and_blocks_are_kept(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = Store.write, []

    def write(self: Store, box: Box, array: Array) -> None:
        if len(written) == 5:
            raise OSError(number, "the disk refuses")
        written.append(box)
        real(self, box, array)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(StorageError, match=r"the disk refuses Stopped; mend that and run again"):
        try_run(tmp_path, job_in(tmp_path))
    monkeypatch.undo()
    assert not list(tmp_path.glob("v_labels.run/*/ledger/quarantine"))
    job = job_in(tmp_path)
    assert run(tmp_path, job).skipped == 5
    assert (labels(tmp_path) == EXPECTED).all()


class Crowded(Bright):
    """On a device whose memory others take after some blocks."""

    def __init__(self, most_voxels: int = 10**6, after: int = BLOCKS) -> None:
        super().__init__()
        self.most_voxels, self.after = most_voxels, after

    def predict(self, parts: Iterable[tuple[CaseInput, Box]]) -> Iterator[tuple[Box, torch.Tensor]]:
        if len(self.cores) == self.after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield from super().predict(parts)

    def try_memory(self, shape: Vec3, channels: int) -> None:
        if math.prod(shape) > self.most_voxels:
            raise DeviceMemoryError(f"blocks of {shape} voxels do not fit")


def crowded(folder: Path, predictor: Crowded, **changes: object) -> VolumeJob:
    job = job_in(folder, on_device=True, **changes)
    (member,) = job.labeller.segmenter.members
    return changed(job, segmenter=replace(job.labeller.segmenter, members=(replace(member, predictor=predictor),)))


def test_memory_of_a_device_that_runs_out_ends_the_run_at_once_and_blocks_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DeviceMemoryError, match=r"ran out amid a run.*2\.00 GiB.*finished blocks are kept"):
        try_run(tmp_path, crowded(tmp_path, Crowded(after=5)))
    assert not list(tmp_path.glob("v_labels.run/*/ledger/quarantine"))
    assert run(tmp_path, crowded(tmp_path, Crowded())).skipped == 5
    assert (labels(tmp_path) == EXPECTED).all()


def test_blocks_a_run_was_begun_with_are_tried_before_it_goes_on(tmp_path: Path) -> None:
    """Their shape stands in the ledger, so a device with less memory cannot have others."""
    with pytest.raises(DeviceMemoryError):
        try_run(tmp_path, crowded(tmp_path, Crowded(after=5)))
    smaller, small = BlockPlan((1, 6, 5), (1, 6, 5)), Crowded(most_voxels=30)
    with pytest.raises(DeviceMemoryError, match=r"blocks of \(1, 6, 10\) voxels do not fit"):
        try_run(tmp_path, crowded(tmp_path, small, plan=smaller))
    assert small.cores == []
    assert run(tmp_path, crowded(tmp_path, Crowded(), plan=smaller)).skipped == 5
    assert (labels(tmp_path) == EXPECTED).all()


def test_a_run_folder_that_vanishes_ends_the_run(tmp_path: Path) -> None:
    moved = tmp_path / "moved"

    def vanish(finished: int, planned: int) -> None:
        if finished == 3:
            (tmp_path / "v_labels.run").rename(moved)

    with pytest.raises((StorageError, OSError), match=r"it was removed or unmounted|No such file or directory"):
        run_volume(job_in(tmp_path), settings_in(tmp_path), SerialExecutor(), vanish)
    left = tmp_path / "v_labels.run"
    if left.exists():
        shutil.rmtree(left)
    moved.rename(left)
    job = job_in(tmp_path)
    assert run(tmp_path, job, stale_s=0.1).skipped == 3, "this process is alive, and could not say it ended"
    assert (labels(tmp_path) == EXPECTED).all()
