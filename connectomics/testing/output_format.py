"""What every output format keeps: ``OutputFormatContract``, a suite for pytest, and ``export_array``, its means.

A package that adds a format subclasses the suite, states the format and some volumes, and lets pytest collect it.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from connectomics.core.errors import ConnectomicsError, OutputError
from connectomics.core.features import OUTPUT_FORMATS
from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.publishing import Staging
from connectomics.execution.run_folder import COORDINATION, SINGLE_WRITER
from connectomics.execution.runner import run_blocks
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.execution.task import Executor
from connectomics.execution.worker import Worker
from connectomics.stages.output.export import export_path, largest_size, read_stamp, require_exportable
from connectomics.stages.output.finish import FinalOutput, Publisher, export_output
from connectomics.volumes.opening import open_volume
from connectomics.volumes.store import Store, create_store
from connectomics.volumes.volume import Array, VolumeInfo

CHUNK: Vec3 = (2, 16, 16)
SHARD: Vec3 = (4, 32, 32)
VOXEL_SIZE_NM = (40.0, 4.0, 5.0)
STEM = "cell_labels"
KEY = "ab" * 32
STAMP: dict[str, object] = {"facts": {"unit µ": [1, 2.5, None]}}


@dataclass(frozen=True)
class OutputSample:
    """A volume to be written: voxels (c, z, y, x), and whether it is a segmentation."""

    voxels: Array
    labels: bool = True

    @property
    def output(self) -> str:
        """Return which of a run's outputs it is."""
        return LABELS if self.labels else PROBABILITIES


def filled_store(folder: Path, sample: OutputSample) -> Store:
    """Make the working store of a volume."""
    c, z, y, x = sample.voxels.shape
    info = VolumeInfo((c, z, y, x), sample.voxels.dtype, CHUNK, VOXEL_SIZE_NM)
    folder.mkdir(parents=True, exist_ok=True)
    store = create_store(folder / f"{sample.output}.zarr", info, shard_shape=SHARD, attributes={})
    for block in BlockGrid(info.extent, SHARD):
        store.write(block.core, sample.voxels[(slice(None), *block.core.slices)])
    return store


def export_array(store: Store, sample: OutputSample, form: str, folder: Path) -> Path:
    """Write a store in a format as a run does, beside which it works; return the final path."""
    folder.mkdir(parents=True, exist_ok=True)
    export_store(store, FinalOutput(sample.output, STEM, KEY, (form,)), folder)
    return export_path(folder, STEM, form)


def export_store(
    store: Store,
    output: FinalOutput,
    folder: Path,
    stamp: dict[str, object] = STAMP,
    executor: Executor | None = None,
) -> None:
    """Write a store as an output to a folder as a run does, with whoever runs its blocks."""
    work = store.path.parent
    with Worker.of(work / COORDINATION) as worker:
        run = functools.partial(
            run_blocks, executor=executor or SerialExecutor(), worker=worker, on_block=lambda done, planned: None
        )
        with worker.alone(SINGLE_WRITER), Staging(work, worker, SINGLE_WRITER) as staging:
            export_output(store, output, Publisher(staging, folder, work), stamp, run=run)


class OutputFormatContract:
    """What every output format keeps. Subclass it as ``TestMyFormat``, and state what it is about.

    Examples
    --------
    >>> class TestHdf5(OutputFormatContract):
    ...     form = "h5"
    ...     samples = [OutputSample(np.ones((1, 4, 5, 6), np.uint8))]
    """

    form: ClassVar[str]
    """Its name in ``inference.output.formats``."""
    samples: ClassVar[Sequence[OutputSample]]
    """Volumes that it holds, of several shapes and types."""
    refused: ClassVar[Sequence[VolumeInfo]] = ()
    """Volumes that it cannot hold."""

    def read(self, path: Path) -> Array:
        """Return the voxels (c, z, y, x) of an output, best by a library that had no part in writing it."""
        reader = open_volume(str(path))
        try:
            return reader.read(Box.of_shape(reader.info.extent))
        finally:
            reader.close()

    def test_its_final_name_is_its_own(self) -> None:
        assert self.form in OUTPUT_FORMATS
        names = [export_path(Path("out"), STEM, form).name for form in OUTPUT_FORMATS.names()]
        own = export_path(Path("out"), STEM, self.form).name
        assert own.startswith(STEM) and len(own) > len(STEM) and names.count(own) == 1

    def test_its_voxels_and_its_stamp_are_those_of_the_store(self, tmp_path: Path) -> None:
        for number, sample in enumerate(self.samples):
            store = filled_store(tmp_path / f"work {number}", sample)
            path = export_array(store, sample, self.form, tmp_path / f"out {number}")
            assert [found.name for found in path.parent.iterdir()] == [path.name], "something was left beside it"
            read = self.read(path)
            assert read.shape == sample.voxels.shape
            assert np.can_cast(sample.voxels.dtype, read.dtype)
            np.testing.assert_array_equal(read, sample.voxels)
            assert read_stamp(path, self.form) == {**STAMP, "result_key": KEY}

    def test_it_repeats_byte_for_byte_and_is_no_larger_than_it_says(self, tmp_path: Path) -> None:
        for number, sample in enumerate(self.samples):
            store = filled_store(tmp_path / f"work {number}", sample)
            one, two = (
                files_of(export_array(store, sample, self.form, tmp_path / f"{number} {time}"))
                for time in ("first", "second")
            )
            assert one == two
            bound = largest_size(store.info, self.form, SHARD, labels=sample.labels)
            assert sum(map(len, one.values())) <= bound.nbytes and len(one) <= bound.files

    def test_an_interrupted_export_leaves_no_final_name_and_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sample, read, reads = self.samples[0], Store.read, [0]
        store, out = filled_store(tmp_path / "work", sample), tmp_path / "out"

        def counting(self: Store, box: Box) -> Array:
            reads[0] += 1
            return read(self, box)

        def failing(self: Store, box: Box) -> Array:
            reads[0] -= 1
            if reads[0] <= 0:
                raise OutputError("interrupted")
            return read(self, box)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "read", counting)
            undisturbed = filled_store(tmp_path / "undisturbed work", sample)
            expected = files_of(export_array(undisturbed, sample, self.form, tmp_path / "undisturbed"))
            patch.setattr(Store, "read", failing)  # at the last
            with pytest.raises(ConnectomicsError):
                export_array(store, sample, self.form, out)
        assert list(out.iterdir()) == []
        assert read_stamp(export_path(out, STEM, self.form), self.form) is None
        assert files_of(export_array(store, sample, self.form, out)) == expected

    def test_the_entries_of_its_folders_outlast_a_loss_of_power(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed, flush = dict[int, set[str]](), os.fsync

        def told(descriptor: int) -> None:
            flush(descriptor)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                flushed.setdefault(os.fstat(descriptor).st_ino, set()).update(os.listdir(descriptor))

        monkeypatch.setattr(os, "fsync", told)
        for number, sample in enumerate(self.samples):
            flushed.clear()
            store = filled_store(tmp_path / f"work {number}", sample)
            path = export_array(store, sample, self.form, tmp_path / f"out {number}")
            for top in (store.path, path):
                folders = (found for found in top.rglob("*") if found.is_dir())
                lost = [f for f in (top, *folders) if f.name not in flushed.get(f.parent.stat().st_ino, ())]
                assert not lost, "the storage, or this program, made these folders and nobody flushed their entries"

    def test_it_refuses_what_it_cannot_hold_with_a_sentence(self, tmp_path: Path) -> None:
        path = export_path(tmp_path, STEM, self.form)
        for info in self.refused:
            with pytest.raises(OutputError) as refused:
                require_exportable(info, path, self.form)
            assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
        for number, sample in enumerate(self.samples):
            require_exportable(filled_store(tmp_path / f"work {number}", sample).info, path, self.form)


def files_of(path: Path) -> dict[str, bytes]:
    """Return the content of a file, or of all files below a folder, by name."""
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
