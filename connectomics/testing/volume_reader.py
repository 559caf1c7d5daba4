"""What every reader of volumes keeps: ``VolumeReaderContract``, a suite for pytest.

A package that adds a reader subclasses the suite, gives it volumes that another program wrote, and lets pytest
collect it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, vec3
from connectomics.volumes.opening import open_volume
from connectomics.volumes.volume import Array, Nanometres, VolumeReader


@dataclass
class WrittenVolume:
    """A volume on disk, the (c, z, y, x) it must read as, and what its metadata say.

    Parameters
    ----------
    uri
        As for ``open_volume``.
    expected
        The voxels (c, z, y, x) that were written.
    options
        More words for ``open_volume``.
    voxel_size_nm, origin_nm
        (z, y, x), as the file states them.
    """

    uri: str
    expected: Array
    options: dict[str, Any] = field(default_factory=dict)
    voxel_size_nm: Nanometres | None = None
    origin_nm: Nanometres = (0.0, 0.0, 0.0)

    def open(self) -> VolumeReader:
        """Open the volume."""
        return open_volume(self.uri, **self.options)

    def at(self, box: Box) -> Array:
        """Return the voxels that a box must read as."""
        return self.expected[(slice(None), *box.slices)]


class VolumeReaderContract:
    """What every reader keeps. Subclass it as ``TestMyReader``, and give a fixture ``written``.

    Examples
    --------
    >>> class TestNpy(VolumeReaderContract):
    ...     @pytest.fixture
    ...     def written(self, tmp_path: Path) -> WrittenVolume:
    ...         np.save(tmp_path / "a.npy", np.arange(24).reshape(2, 3, 4))
    ...         return WrittenVolume(str(tmp_path / "a.npy"), np.arange(24).reshape(1, 2, 3, 4))
    """

    @pytest.fixture
    def reader(self, written: WrittenVolume) -> Iterator[VolumeReader]:
        """Open the volume, and close it afterwards."""
        with contextlib.closing(written.open()) as opened:
            yield opened

    def test_info_is_what_was_written(self, written: WrittenVolume, reader: VolumeReader) -> None:
        info, stored = reader.info, written.expected.dtype
        assert info.shape == written.expected.shape
        assert info.dtype == (np.uint8 if stored.kind == "b" else stored.newbyteorder("=")) and info.dtype.isnative
        assert info.voxel_size_nm == (None if written.voxel_size_nm is None else pytest.approx(written.voxel_size_nm))
        assert info.origin_nm == pytest.approx(written.origin_nm)
        assert all(1 <= chunk <= size for chunk, size in zip(info.chunk_shape, info.extent, strict=True))

    def test_any_box_equals_the_slice(self, written: WrittenVolume, reader: VolumeReader) -> None:
        for box in boxes_in(reader.info.extent):
            block = reader.read(box)
            assert block.dtype == reader.info.dtype and block.flags.c_contiguous
            np.testing.assert_array_equal(block, written.at(box))

    def test_blocks_belong_to_the_caller(self, written: WrittenVolume, reader: VolumeReader) -> None:
        whole = Box.of_shape(reader.info.extent)
        reader.read(whole)[:] = 1
        np.testing.assert_array_equal(reader.read(whole), written.expected)

    def test_four_threads_read_the_same(self, written: WrittenVolume, reader: VolumeReader) -> None:
        z, y, x = reader.info.extent
        boxes = [Box((i % z, i % y, 0), (z, y, x)) for i in range(24)]
        with ThreadPoolExecutor(4) as pool:
            for box, block in zip(boxes, pool.map(reader.read, boxes), strict=True):
                np.testing.assert_array_equal(block, written.at(box))

    def test_closing_twice_is_harmless_and_reading_after_is_an_error(self, written: WrittenVolume) -> None:
        reader = written.open()
        reader.close()
        reader.close()
        with pytest.raises(VolumeError, match="closed"):
            reader.read(Box((0, 0, 0), (1, 1, 1)))

    def test_a_box_outside_is_an_error(self, reader: VolumeReader) -> None:
        z, y, x = reader.info.extent
        with pytest.raises(VolumeError, match="outside"):
            reader.read(Box((0, 0, 0), (z + 1, y, x)))

    def test_identity_is_stable_json_without_folders_and_follows_the_files(self, written: WrittenVolume) -> None:
        before, path = self._identity(written), Path(written.uri.partition("::")[0])
        assert self._identity(written) == before
        assert str(path.parent) not in json.dumps(before)
        inner = path / written.uri.partition("::")[2]
        for file in [path] if path.is_file() else inner.rglob("*"):
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000_000))
        assert self._identity(written) != before

    def _identity(self, written: WrittenVolume) -> dict[str, object]:
        with contextlib.closing(written.open()) as reader:
            return reader.identity


def boxes_in(extent: tuple[int, int, int]) -> Iterator[Box]:
    """Yield the whole, an empty box at each end, and boxes anywhere."""
    yield Box.of_shape(extent)
    yield Box((0, 0, 0), (0, 0, 0))
    yield Box(extent, extent)
    generator = np.random.default_rng(4)
    for _ in range(16):
        ends = [sorted(int(end) for end in generator.integers(0, n + 1, 2)) for n in extent]
        yield Box(vec3([a for a, _ in ends]), vec3([b for _, b in ends]))
