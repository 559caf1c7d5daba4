"""Several processes share the last stages too: whoever waits for the single writer does blocks of what it builds."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.stage import LABELS
from connectomics.execution.task import BlockRecord
from connectomics.runs.job import VolumeJob
from connectomics.stages.output import finish, pyramid
from connectomics.stages.output.finish import FinalOutput
from connectomics.stages.output.formats import chunk_files
from connectomics.stages.output.formats.level_array import LevelArray
from connectomics.stages.predict.filters import BinaryFilters
from connectomics.volumes.volume import VolumeInfo

from small_runs import Reader, changed, job_in, run

NONE = BinaryFilters()

EXTENT = (1, 420, 420)


class Large(Reader):
    """A section of several chunks."""

    info = VolumeInfo((1, *EXTENT), np.dtype(np.uint8), EXTENT)

    def __init__(self) -> None:
        super().__init__(np.random.default_rng(0).integers(1, 255, (1, *EXTENT), np.uint8))


def job(folder: Path, filters: BinaryFilters = NONE) -> VolumeJob:
    outputs = (FinalOutput(LABELS, "v_labels", "k", ("zarr2", "n5", "h5")),)
    plan = BlockPlan((1, 105, 420), (1, 105, 105))
    return changed(job_in(folder, outputs=outputs), filters=filters, reader=Large(), plan=plan)


def together(folder: Path, count: int, filters: BinaryFilters = NONE) -> None:
    threads = [threading.Thread(target=run, args=(folder, job(folder, filters))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.glob("v_labels*/**/*"))
        if path.is_file() and not path.relative_to(folder).as_posix().startswith("v_labels.run/")
    }


@pytest.mark.parametrize("filters", [NONE, BinaryFilters(3, fill_holes=True)])
def test_levels_are_filled_by_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: BinaryFilters
) -> None:
    """The builder stands still in its first block of a level until another has done one."""
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(LevelArray, "unit_shape", property(lambda level: level.chunk_shape))  # more than one block
    run(tmp_path / "one", job(tmp_path / "one", filters))
    done, both, real = Counter[int](), threading.Condition(), pyramid.LevelTask.process

    def process(task: pyramid.LevelTask, block: Any) -> BlockRecord:
        record = real(task, block)
        with both:
            done[threading.get_ident()] += 1
            both.notify_all()
            both.wait_for(lambda: len(done) > 1, timeout=30)
        return record

    monkeypatch.setattr(pyramid.LevelTask, "process", process)
    two = tmp_path / "two"
    together(two, 2, filters)
    assert len(done) == 2, "one waited while the other worked"
    assert content(two) == content(tmp_path / "one")
    assert not list(two.glob("v_labels.run/*/staging.*")) and not list(two.glob("v_labels.run/*/*.zarr"))


def test_a_helper_that_sleeps_in_a_file_leaves_nothing_in_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has no name any more when it wakes up."""
    real, left = finish.write_digests, []

    def write_digests(output: Path, record: Path, name: str = "") -> None:
        real(output, record, name)
        if output.name.endswith(".final.zarr"):
            left.append(output / "0" / "c" / "0.__lock")
            left[-1].write_bytes(b"half")

    monkeypatch.setattr(finish, "write_digests", write_digests)
    run(tmp_path, job_in(tmp_path, outputs=(FinalOutput(LABELS, "v_labels", "k", ("zarr",)),)))
    assert len(left) == 1 and not list(tmp_path.rglob("*.__lock"))


def test_what_goes_wrong_in_helping_is_left_to_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been replaced meanwhile, or it meets the same."""
    builder, real = list[int](), LevelArray.write

    def write(self: LevelArray, *arguments: Any) -> None:
        builder.append(threading.get_ident())
        if threading.get_ident() != builder[0]:
            raise OSError(20, "Not a directory")
        real(self, *arguments)

    monkeypatch.setattr(LevelArray, "write", write)
    together(tmp_path, 3)
    assert (tmp_path / "v_labels.n5").is_dir() and (tmp_path / "v_labels.h5").is_file()
