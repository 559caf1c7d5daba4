"""A run's memory stays within system.memory_budget_gb; one that is too small is refused with one that works."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from fork_server import ForkServer

from connectomics.core.errors import ResourceError
from connectomics.core.geometry import Box
from connectomics.lightning.inference import InferenceManager
from connectomics.planning.blocks import plan_blocks
from connectomics.planning.memory import Budget, NetworkWork, Work
from connectomics.volumes.opening import open_volume
from connectomics.volumes.stored import reading_bytes
from connectomics.volumes.volume import VolumeInfo

from nnunet_models import make_model
from small_jobs import em_like, infer_words, quick_folder, write_h5, write_png

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kibibytes there")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with quick_folder() as folder, ForkServer(folder) as server:
        yield server


@pytest.mark.parametrize(
    ("dimensions", "patch", "classes", "extent"),
    [(2, (256, 256), 40, (1, 500, 760)), (3, (32, 64, 64), 20, (64, 64, 128))],
    ids=["2D with many classes", "3D"],
)
@pytest.mark.parametrize("mirrored", ["one axis", pytest.param("all axes", marks=pytest.mark.long)])
def test_memory_stays_within_the_smallest_budget_that_a_refusal_names(
    server: ForkServer,
    dimensions: int,
    patch: tuple[int, ...],
    classes: int,
    extent: tuple[int, int, int],
    mirrored: str,
    tmp_path: Path,
) -> None:
    axes = (0,) if mirrored == "one axis" else tuple(range(dimensions))
    model = make_model(
        tmp_path / "model", dimensions=dimensions, classes=classes, patch=patch, mirror_axes=axes, seed=2
    )
    words = infer_words(
        model,
        tmp_path / "out",
        write_h5(tmp_path / "v.h5", em_like(extent)),
        "inference.sliding_window.overlap=0",
        "inference.output.save_probabilities=true",
        "inference.output.formats=[zarr]",
    )
    stays_within_the_named_budget(server, words)
    assert planned(tmp_path) > 1  # where memory does not matter, the volume is one block


def test_so_does_that_of_planes_and_the_labels_are_those_of_the_whole_volume(
    server: ForkServer, tmp_path: Path
) -> None:
    image = em_like((64, 64, 96))
    model = make_model(tmp_path / "model", dimensions=2, classes=40, patch=(64, 64), seed=2)
    settings = (
        "inference.planes=[xy,xz,yz]",
        "inference.sliding_window.overlap=0",
        "inference.test_time_augmentation.enabled=false",
        "inference.output.save_probabilities=true",
    )
    volume = write_h5(tmp_path / "v.h5", image)
    words = infer_words(model, tmp_path / "out", volume, *settings, "inference.output.formats=[zarr]")
    stays_within_the_named_budget(server, words)
    assert planned(tmp_path) > 1
    whole = InferenceManager.from_checkpoint(model, ["system.device=cpu", "system.num_cpus=1", *settings])
    found = zarr.open_group(tmp_path / "out" / "v_labels.zarr", mode="r")["0"]
    np.testing.assert_array_equal(found[:], whole.predict(image).labels)


def stays_within_the_named_budget(server: ForkServer, words: list[str]) -> None:
    """The command is refused at first; with the budget that is named it runs, and never has more memory."""
    refused = server.run([*words, "system.memory_budget_gb=0.01"])
    said = " ".join((refused.stdout + refused.stderr).split())
    found = re.search(r"raise system.memory_budget_gb to at least ([0-9.]+)", said)
    assert refused.code == 3 and found, said
    ended = server.run([*words, f"system.memory_budget_gb={found.group(1)}"])
    assert ended.code == 0, ended.stdout + ended.stderr
    assert 0 < ended.peak_bytes <= float(found.group(1)) * 1e9


def planned(folder: Path) -> int:
    count: int = json.loads((folder / "out" / "v_labels.run" / "report.json").read_text())["planned"]
    return count


def test_a_section_that_can_only_be_decoded_whole_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A PNG is one piece, and of 100,000 × 100,000 pixels that is more than the budget."""
    small = open_volume(str(write_png(tmp_path / "v.png"))).info
    assert small.chunk_shape == small.extent
    info = VolumeInfo((1, 1, 100_000, 100_000), small.dtype, (1, 100_000, 100_000))
    work, budget = Work(NetworkWork((1, 512, 512), 2, 1, 1), 1, 1), Budget(8 * 2**30, reading_bytes(info))
    with pytest.raises(ResourceError, match=r"need 4\d\.\d+ GB"):
        plan_blocks(info.extent, [work], budget)


@pytest.mark.parametrize("kind", ["zarr", "h5", "tiff tiles", "tiff strips"])
def test_formats_in_pieces_are_read_piece_by_piece(kind: str, tmp_path: Path) -> None:
    """A section of 16 megapixels, of which a read of some rows takes the memory of some pieces."""
    box = Box((0, 1000, 0), (1, 1064, 4096))
    with contextlib.closing(open_volume(str(written(kind, tmp_path)))) as volume:
        assert reading_bytes(volume.info) < 120e6
        volume.read(box)
        tracemalloc.start()
        try:
            found = volume.read(box)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 6 * found.nbytes + (4 << 20)
    np.testing.assert_array_equal(found[0, 0], section()[1000:1064])


@functools.cache
def section() -> np.ndarray:
    return em_like((4096, 4096))


def written(kind: str, folder: Path) -> Path:
    if kind == "h5":
        with h5py.File(folder / "v.h5", "w") as file:
            file.create_dataset("main", data=section()[None], chunks=(1, 256, 256))
        return folder / "v.h5"
    if kind == "zarr":
        zarr.create_array(folder / "v.zarr", data=section()[None], chunks=(1, 256, 256))
        return folder / "v.zarr"
    pieces = {"tile": (256, 256)} if kind == "tiff tiles" else {"rowsperstrip": 64}
    tifffile.imwrite(folder / "v.tif", section(), compression="zlib", **pieces)
    return folder / "v.tif"
