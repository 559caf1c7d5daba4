"""A box or a mask restricts the work and changes no wanted voxel: counted by brute force, and against the full run."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import BlockGrid, Box, Vec3, vec3
from connectomics.execution.stage import LABELS, PROBABILITIES
from connectomics.lightning.inference import InferenceManager
from connectomics.stages.predict.segmenter import Segmenter, Surveyed
from connectomics.stages.survey import region as module
from connectomics.stages.survey.region import RegionOfInterest
from connectomics.volumes.volume import Array, VolumeInfo

from nnunet_models import make_model
from parity_table import ArrayVolume, scene

WORDS = ["system.device=cpu", "system.num_cpus=1", "inference.output.save_probabilities=true"]
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
RESAMPLED = [*WORDS, "inference.case=volume", "inference.resample=plan", "inference.spacing=[1,1.2,0.9]"]


def boxes_in(extent: Vec3) -> st.SearchStrategy[Box]:
    """Boxes of one voxel or more."""
    edges = st.tuples(*(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True).map(sorted) for n in extent))
    return edges.map(lambda e: Box(vec3([a for a, _ in e]), vec3([b for _, b in e])))


@st.composite
def masks_of(draw: st.DrawFn, extent: Vec3) -> Array:
    """A mask of the volume's resolution or a lower one, its extent rounded up or down; seldom set, or often."""
    factors = [draw(st.integers(1, n)) for n in extent]
    shape = [draw(st.sampled_from([-(-n // f), n // f])) for n, f in zip(extent, factors, strict=True)]
    random = np.random.default_rng(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint64, np.float32]))
    return (random.random(shape) < draw(st.sampled_from([0.02, 0.2, 0.9]))).astype(dtype) * dtype(3)


def cell(voxel: int, cells: int, length: int) -> int:
    """The mask's voxel that decides: by a power of two where that gives its extent, rounded up, else spread."""
    halved = [1 << k for k in range(8) if math.ceil(length / (1 << k)) == cells]
    return voxel // halved[0] if halved else math.floor(voxel * cells / length)


def brute_force(extent: Vec3, box: Box, mask: Array | None) -> Array:
    """Which voxels are wanted, asked one by one."""
    result = np.zeros(extent, bool)
    for voxel in np.ndindex(*extent):
        inside = all(a <= v < b for v, a, b in zip(voxel, box.start, box.stop, strict=True))
        seen = True
        if mask is not None:
            seen = mask[tuple(cell(v, m, n) for v, m, n in zip(voxel, mask.shape, extent, strict=True))] != 0
        result[voxel] = inside and seen
    return result


def expected_box(part: Array) -> Box | None:
    where = np.argwhere(part)
    return Box(vec3(where.min(0).tolist()), vec3((where.max(0) + 1).tolist())) if len(where) else None


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_blocks_and_boxes_are_those_of_brute_force(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    extent = vec3(data.draw(st.tuples(*(st.integers(1, 11),) * 3)))
    shape = vec3(data.draw(st.tuples(*(st.integers(1, 12),) * 3)))
    box = data.draw(boxes_in(extent))
    mask = data.draw(st.none() | masks_of(extent))
    monkeypatch.setattr(module, "PIECE_BYTES", data.draw(st.sampled_from([8, 64, 1 << 20])))
    roi = RegionOfInterest(extent, box, None if mask is None else ArrayVolume(mask[None]), "the mask")
    truth, grid = brute_force(extent, box, mask), BlockGrid(extent, shape)
    flags = roi.blocks(grid)
    chosen = [b.key for b, flag in zip(grid, flags.flat, strict=True) if flag]
    assert chosen == [b.key for b in grid if truth[b.core.slices].any()]
    for block in grid:
        inner, part = roi.within(block.core)
        expected = expected_box(truth[block.core.slices])
        if expected is None:
            assert inner.voxels == 0
            continue
        assert inner == expected.shift(block.core.start)
        assert (truth[inner.slices] == (True if part is None else part)).all()
        assert part is None or not part.all()


@pytest.mark.parametrize(
    ("reduced", "fits"),
    [((7, 5, 3), True), ((4, 3, 2), True), ((3, 2, 1), True), ((1, 1, 1), True), ((2, 1, 3), True), ((5, 5, 3), False),
     ((8, 5, 3), False), ((6, 5, 3), False), ((7, 4, 3), False), ((3, 5, 7), False)],
)  # fmt: skip
def test_masks_are_of_the_volume_or_divided_by_whole_numbers(reduced: Vec3, fits: bool) -> None:
    extent = (7, 5, 3)
    mask = ArrayVolume(np.ones((1, *reduced), np.uint8))
    if fits:
        RegionOfInterest(extent, Box.of_shape(extent), mask, "m")
        return
    with pytest.raises(VolumeError, match=r"\(7, 5, 3\) or these divided"):
        RegionOfInterest(extent, Box.of_shape(extent), mask, "m")


def test_masks_of_colours_or_undefined_numbers_are_refused() -> None:
    extent = (2, 4, 4)
    with pytest.raises(VolumeError, match="3 channels, expected one"):
        RegionOfInterest(extent, Box.of_shape(extent), ArrayVolume(np.ones((3, *extent), np.uint8)), "m")
    values = np.ones((1, *extent), np.float32)
    values[0, 1, 2, 3] = np.nan
    roi = RegionOfInterest(extent, Box.of_shape(extent), ArrayVolume(values), "m")
    for ask in (lambda: roi.within(Box.of_shape(extent)), lambda: roi.blocks(BlockGrid(extent, (1, 4, 4)))):
        with pytest.raises(VolumeError, match="m: NaN or infinite values in voxels"):
            ask()


class Sparse:
    """A mask that is computed as it is read, about one voxel in a thousand wanted; keeps the sizes of what is read."""

    def __init__(self, extent: Vec3) -> None:
        self.info = VolumeInfo((1, *extent), np.dtype(np.uint8), (64, 64, 64))
        self.identity: dict[str, object] = {}
        self.sizes: list[int] = []

    def read(self, box: Box) -> Array:
        self.sizes.append(box.voxels)
        z, y, x = (np.arange(a, b, dtype=np.uint32) for a, b in zip(box.start, box.stop, strict=True))
        mixed = (z * 7919)[:, None, None] ^ (y * 104729)[:, None] ^ (x * 1299709)
        return (mixed % 1009 == 0).astype(np.uint8)[None]

    def close(self) -> None: ...


def test_a_million_blocks_are_decided_with_little_memory() -> None:
    extent, grid = (12800, 12800, 12800), BlockGrid((12800, 12800, 12800), (128, 128, 128))
    mask = Sparse((200, 200, 200))
    tracemalloc.start()
    flags = RegionOfInterest(extent, Box.of_shape(extent), mask, "m").blocks(grid)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert flags.size == len(grid) == 10**6
    assert len(mask.sizes) < 10
    assert peak < 200e6
    assert flags.any()
    expected = mask.read(Box.of_shape((200, 200, 200)))[0].reshape(100, 2, 100, 2, 100, 2).any((1, 3, 5))
    assert np.array_equal(flags, expected)


def test_a_large_block_of_a_fine_mask_is_read_piece_by_piece() -> None:
    extent = (1, 2048, 20_000)
    mask = Sparse(extent)
    roi = RegionOfInterest(extent, Box.of_shape(extent), mask, "m")
    box, flags = roi.within(Box.of_shape(extent))
    assert max(mask.sizes) <= module.PIECE_BYTES < Box.of_shape(extent).voxels
    assert flags is not None
    assert np.array_equal(flags, mask.read(box)[0] != 0)


@dataclass(frozen=True)
class Full:
    """A segmenter, an image, and what it gives where nothing restricts it."""

    segmenter: Segmenter
    reader: ArrayVolume
    surveyed: Surveyed
    whole: dict[str, Array]
    windows: Callable[[Box], int]

    @property
    def extent(self) -> Vec3:
        return self.reader.info.extent


def flat(folder: Path) -> tuple[Path, list[str], Vec3]:
    """Each section is a case; batches of two windows."""
    model = make_model(folder, dimensions=2, classes=3, patch=(16, 24), folds=("0", "1"), mirror_axes=(0,), seed=4)
    return model, [*WORDS, "inference.sliding_window.sw_batch_size=2"], (3, 50, 61)


def deep(folder: Path) -> tuple[Path, list[str], Vec3]:
    """Regions, in 3D, the axes transposed."""
    model = make_model(
        folder, dimensions=3, classes=3, patch=(8, 16, 8), mirror_axes=(0,), reader="SimpleITKIO", seed=5,
        axis_order=(2, 0, 1), labels=REGIONS, regions_class_order=[1, 2],
    )  # fmt: skip
    return model, WORDS, (21, 24, 29)


def resampled(folder: Path) -> tuple[Path, list[str], Vec3]:
    """On a network's grid that is not the image's."""
    model = make_model(
        folder, dimensions=3, classes=3, patch=(8, 16, 8), mirror_axes=(0,), reader="SimpleITKIO", seed=5,
        spacing=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return model, RESAMPLED, (15, 20, 23)


def ensemble(folder: Path) -> tuple[Path, list[str], Vec3]:
    """A flat model and a deep one."""
    model, _, _ = flat(folder / "flat")
    other = make_model(folder, dimensions=3, classes=3, patch=(8, 16, 8), mirror_axes=(), reader="SimpleITKIO", seed=6)
    return model, [*WORDS, f"model.ensemble=['{other}']", "model.folds=[0]"], (9, 24, 29)


def masked(folder: Path) -> tuple[Path, list[str], Vec3]:
    """Normalised inside the mask of nonzero voxels."""
    model = make_model(
        folder, dimensions=3, classes=3, patch=(8, 16, 8), mirror_axes=(), reader="SimpleITKIO", seed=5, masked=[True]
    )
    return model, WORDS, (11, 20, 23)


@pytest.fixture(scope="module", params=[flat, deep, resampled, ensemble, masked], ids=lambda make: make.__name__)
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Full:
    model, words, extent = request.param(tmp_path_factory.mktemp("model"))
    torch.set_num_threads(1)
    segmenter = InferenceManager.from_checkpoint(model, words).segmenter()
    image = (scene(1, extent, 6)[0] * 255).astype(np.uint8)
    image[:, :, :3] = 0
    image[:, :, :, -4:] = 0
    reader = ArrayVolume(image)
    surveyed = segmenter.survey(reader, "image")
    whole = segmenter.segment(reader.read, surveyed, Box.of_shape(extent))
    assert len(np.unique(whole[LABELS])) > 1
    return Full(segmenter, reader, surveyed, whole, lambda box: segmenter.windows(reader.read, surveyed, box))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_wanted_voxels_are_those_of_the_full_run_and_others_background(full: Full, data: st.DataObject) -> None:
    require_wanted_voxels(full, data)


@pytest.mark.long
@settings(max_examples=48, deadline=None, derandomize=True)
@given(data=st.data())
def test_many_choices_of_wanted_voxels_are_those_of_the_full_run(full: Full, data: st.DataObject) -> None:
    require_wanted_voxels(full, data)


def require_wanted_voxels(full: Full, data: st.DataObject) -> None:
    """A box, a mask and blocks of any kind give the voxels of the full run, and background elsewhere."""
    extent = full.extent
    box, mask = data.draw(boxes_in(extent)), data.draw(st.none() | masks_of(extent))
    shape = vec3(data.draw(st.tuples(*(st.integers(max(1, n // 3), n) for n in extent))))
    roi = RegionOfInterest(extent, box, None if mask is None else ArrayVolume(mask[None]), "the mask")
    truth, grid = brute_force(extent, box, mask), BlockGrid(extent, shape)
    result = {name: np.full_like(array, 77) for name, array in full.whole.items()}
    for block in grid:
        arrays, windows = full.segmenter.segment_roi(full.reader.read, full.surveyed, block.core, roi)
        hull = expected_box(truth[block.core.slices])
        assert windows == (0 if hull is None else full.windows(hull.shift(block.core.start)))
        for name, array in arrays.items():
            result[name][(slice(None), *block.core.slices)] = array
    background = [0.0, 0.0] if full.segmenter.labels.painted else [1.0, 0.0, 0.0]
    outside = {LABELS: np.zeros(1), PROBABILITIES: np.array(background)}
    for name, array in full.whole.items():
        expected = np.where(truth, array, outside[name].reshape(-1, 1, 1, 1)).astype(array.dtype)
        assert result[name].tobytes() == expected.tobytes()


def test_few_wanted_voxels_take_few_windows(full: Full) -> None:
    extent = full.extent
    corner = RegionOfInterest(extent, Box(vec3([n // 2 for n in extent]), vec3([n // 2 + 1 for n in extent])))
    voxels = []

    def read(box: Box) -> Array:
        voxels.append(box.voxels)
        return full.reader.read(box)

    _, windows = full.segmenter.segment_roi(read, full.surveyed, Box.of_shape(extent), corner)
    few = sum(voxels)
    voxels.clear()
    full.segmenter.segment(read, full.surveyed, Box.of_shape(extent))
    assert 0 < windows < full.windows(Box.of_shape(extent))
    resamples = full.segmenter.members[0].resampling is not None  # its reach of 24 voxels is all of this volume
    assert 0 < few < sum(voxels) or resamples
