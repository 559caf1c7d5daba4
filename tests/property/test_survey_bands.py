"""A survey that processes share in bands is the one that a single pass makes, bit for bit, however it was cut."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.core.errors import LedgerError, QuarantineError, VolumeError
from connectomics.core.geometry import Block, BlockGrid, Box, Vec3
from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.stage import Workspace
from connectomics.execution.task import Task
from connectomics.execution.worker import Worker
from connectomics.inference.case import Case
from connectomics.inference.normalise import IntensityStats
from connectomics.models.spec import ChannelNormalisation
from connectomics.stages.survey import bands as bands_module
from connectomics.stages.survey.bands import Bands, band_bytes, band_shape, bands_of, part_shape
from connectomics.stages.survey.survey import load_survey, save_survey, survey
from connectomics.stages.survey.tiles import survey_pass, tile_shape
from connectomics.volumes.volume import Array, VolumeInfo

import small_bands
from parity_table import ArrayVolume

SHAPE = (7, 23, 31)
SCHEMES = (ChannelNormalisation("ZScoreNormalization"), ChannelNormalisation("NoNormalization"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few hundred voxels, and bands of a few tiles."""
    small_bands.prepare(300, 900, 5000, monkeypatch)


def image_of(dtype: str, seed: int, shape: Vec3 = SHAPE, channels: int = 2) -> Array:
    """Voxels whose float moments depend on the order in which they are added, with empty sections and borders."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = (random.normal(3, 20, (channels, *shape)) * 10.0 ** random.integers(-3, 4)).astype(kind)
    else:
        limits = np.iinfo(kind)
        values = random.integers(limits.min, limits.max, (channels, *shape), kind, endpoint=True)
    values[random.random(values.shape) < 0.2] = 0
    values[:, : random.integers(0, 3)] = values[..., -random.integers(1, 9) :] = 0
    values[:, random.integers(0, shape[0])] = 0
    return values


@dataclass
class Counted(ArrayVolume):
    """A volume that counts the voxels that are read."""

    voxels: int = 0

    def __init__(self, image: Array, chunk: Vec3 | None = None) -> None:
        super().__init__(image, chunk)
        self.voxels = 0

    def read(self, box: Box) -> Array:
        self.voxels += box.voxels
        return super().read(box)


@dataclass
class Here:
    """Runs the bands of a stage in this process, all of them or so many before it stops."""

    stop_after: int | None = None
    blocks: list[str] = field(default_factory=list)

    def __call__(self, task: Task, ledger: Ledger) -> BlocksDone:
        for block in [ledger.grid.numbered(number) for number in ledger.unfinished()]:
            if len(self.blocks) == self.stop_after:
                raise KeyboardInterrupt
            ledger.append(task.process(block))
            self.blocks.append(block.key)
        return BlocksDone(ledger.planned, 0, ledger.finished, 0, failures=())


def plain(cases: Any) -> Any:
    return [replace(case, mask=None) for case in cases]


def shared(folder: Path, reader: ArrayVolume, count: int, **options: Any) -> list[Any]:
    """What so many processes find that survey a volume together as a run does; each is a thread with its own worker."""
    found: list[Any] = [None] * count
    together = threading.Barrier(count)

    def take_part(number: int) -> None:
        with Worker.of(folder / "coordination") as worker:
            together.wait()
            run = functools.partial(run_blocks, executor=SerialExecutor(), worker=worker, on_block=lambda *_: None)
            workspace = Workspace(folder, run, 1 << 30)
            look = survey_pass(
                reader,
                "image",
                options["schemes"],
                section_axis=options.get("section_axis", 0) if options["by_slice"] else None,
                plane_axis=options.get("plane_axis", 0),
            )
            bands = bands_of(look, workspace, "survey")
            assert bands is not None
            bands.do()
            with worker.alone("single_writer"):
                found[number] = survey(reader, "image", workspace=workspace, **options)

    threads = [threading.Thread(target=take_part, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def done_by_each(folder: Path) -> list[int]:
    return [path.read_bytes().count(b"\n") - 1 for path in (folder / "ledger_survey").glob("*.jsonl")]


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "float32", "float64"]),
    seed=st.integers(0, 99),
    chunk=st.tuples(st.integers(1, 7), st.integers(1, 23), st.integers(1, 31)),
    tile=st.integers(200, 2000),
    sizes=st.tuples(st.integers(1000, 5000), st.integers(5000, 40000)),
    kind=st.sampled_from([(True, 0), (True, 1), (True, 2), (False, 0), (False, 1), (False, 2), (False, None)]),
)
def test_what_bands_leave_is_what_one_pass_finds(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    seed: int,
    chunk: Vec3,
    tile: int,
    sizes: tuple[int, int],
    kind: tuple[bool, int | None],
) -> None:
    folder, (by_slice, axis) = tmp_path_factory.mktemp("work"), kind
    options: dict[str, Any] = {"by_slice": by_slice, ("section_axis" if by_slice else "plane_axis"): axis}
    volume = ArrayVolume(image_of(dtype, seed), chunk)
    with pytest.MonkeyPatch.context() as patch:
        small_bands.prepare(tile, *sizes, patch)
        expected = survey(volume, "image", SCHEMES, **options)
        found = survey(volume, "image", SCHEMES, workers=2, workspace=Workspace(folder, Here(), 1 << 30), **options)
    assert found == expected
    for name, cases in (("found", found), ("expected", expected)):
        save_survey([cases], folder / name)
    assert (folder / "found").read_bytes() == (folder / "expected").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("by_slice", [True, False])
def test_moments_are_added_tile_by_tile_and_section_by_section(tmp_path: Path, dtype: str, by_slice: bool) -> None:
    image = image_of(dtype, 5)
    volume = ArrayVolume(image, (3, 8, 9))
    cases = survey(volume, "image", SCHEMES, by_slice=by_slice, workspace=Workspace(tmp_path, Here(), 1 << 30))
    tiles = [block.core for block in BlockGrid(SHAPE, tile_shape(volume.info))]
    for c in range(2):
        sections = []
        for z in range(SHAPE[0]):
            sections.append(IntensityStats(0, dtype == "uint16", 0, 0))
            for tile in tiles:
                if tile.start[0] <= z < tile.stop[0]:
                    sections[-1] += IntensityStats.of(image[(c, slice(z, z + 1), *tile.slices[1:])])
        if not by_slice:
            sections = [functools.reduce(IntensityStats.__add__, sections)]
        assert [case.channels[c] for case in cases] == [
            stats.summary(case.box.voxels) for stats, case in zip(sections, cases, strict=True)
        ]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "kind", [(True, 0), (True, 2), pytest.param((True, 1), marks=pytest.mark.long), (False, 0), (False, 2)], ids=str
)
def test_processes_share_the_bands(tmp_path: Path, count: int, kind: tuple[bool, int]) -> None:
    by_slice, axis = kind
    options: dict[str, Any] = {"schemes": SCHEMES, "by_slice": by_slice}
    options["section_axis" if by_slice else "plane_axis"] = axis
    volume = Counted(image_of("float32", 8), (2, 8, 31))
    expected = survey(volume, "image", **options)
    once, volume.voxels = volume.voxels, 0
    found = shared(tmp_path, volume, count, **options)
    assert all(each == expected for each in found)
    assert volume.voxels == once, "each band was read once"
    assert sum(done_by_each(tmp_path)) == len(list((tmp_path / "survey").glob("*.members"))) > 4
    assert len(done_by_each(tmp_path)) > 1, "one did it all"


@pytest.mark.parametrize("count", [1, 3])
def test_a_shared_survey_makes_the_same_mask(tmp_path: Path, count: int) -> None:
    image = image_of("uint8", 3, channels=1)
    image[:, 2:4, 5:9, 4:9], image[:, 3, 6:8, 5:8] = 7, 0  # with a hole
    volume = ArrayVolume(image, (2, 8, 31))
    scheme = ChannelNormalisation("ZScoreNormalization", masked=True)
    options: dict[str, Any] = {"schemes": (scheme,), "by_slice": False, "previous": lambda box: box_of_ones(box)}
    (expected,) = survey(volume, "image", **options)
    whole = Box.of_shape(SHAPE)
    for (case,) in shared(tmp_path, volume, count, **options):
        assert plain([case]) == plain([expected])
        np.testing.assert_array_equal(case.mask(whole), expected.mask(whole))


def box_of_ones(box: Box) -> Array:
    """Labels of a previous stage: one voxel that lies inside."""
    labels = np.zeros((1, *box.shape), np.uint8)
    inside = Box((5, 10, 12), (6, 12, 14)).intersect(box)
    labels[(slice(None), *inside.relative_to(box).slices)] = 1
    return labels


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_what_was_done_before_an_end_is_not_read_again(tmp_path: Path, stop_after: int) -> None:
    volume = Counted(image_of("float32", 9), (2, 8, 31))
    expected = survey(volume, "image", SCHEMES, by_slice=True)
    first, then = Here(stop_after), Here()
    with pytest.raises(KeyboardInterrupt):
        survey(volume, "image", SCHEMES, by_slice=True, workspace=Workspace(tmp_path, first, 1 << 30))
    volume.voxels = 0
    assert survey(volume, "image", SCHEMES, by_slice=True, workspace=Workspace(tmp_path, then, 1 << 30)) == expected
    assert len(first.blocks) == stop_after
    assert not set(first.blocks) & set(then.blocks)
    assert (volume.voxels < np.prod(SHAPE)) == (stop_after > 0)
    again = Here()
    assert survey(volume, "image", SCHEMES, by_slice=True, workspace=Workspace(tmp_path, again, 1 << 30)) == expected
    assert again.blocks == []


@pytest.mark.parametrize("damage", ["gone", "flipped", "short"])
def test_a_band_that_is_damaged_is_read_again(tmp_path: Path, damage: str) -> None:
    volume = ArrayVolume(image_of("float32", 9), (2, 8, 31))
    expected = survey(volume, "image", SCHEMES, by_slice=False, workspace=Workspace(tmp_path, Here(), 1 << 30))
    path = sorted((tmp_path / "survey").glob("*.members"))[2]
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content if damage == "flipped" else content[:-9])
    mended = Here()
    found = survey(volume, "image", SCHEMES, by_slice=False, workspace=Workspace(tmp_path, mended, 1 << 30))
    assert found == expected
    assert mended.blocks == [path.stem]


def test_bands_of_another_pass_are_refused(tmp_path: Path) -> None:
    volume = ArrayVolume(image_of("uint8", 9), (2, 8, 31))
    workspace = Workspace(tmp_path, Here(), 1 << 30)
    survey(volume, "image", SCHEMES, by_slice=False, workspace=workspace)
    with pytest.raises(LedgerError, match="records the run"):
        survey(volume, "image", SCHEMES, by_slice=False, plane_axis=1, workspace=workspace)
    survey(volume, "image", SCHEMES, by_slice=False, plane_axis=1, workspace=workspace, stage="survey_2")


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("by_slice", [True, False])
def test_what_is_no_number_is_refused_as_by_one_pass(tmp_path: Path, by_slice: bool, axis: int) -> None:
    image = image_of("float32", 4)
    image[1, 4, 17, 20] = image[0, 5, 3, 21] = np.nan
    volume = ArrayVolume(image, (2, 8, 31))
    options: dict[str, Any] = {"by_slice": by_slice, ("section_axis" if by_slice else "plane_axis"): axis}
    with pytest.raises(VolumeError) as expected:
        survey(volume, "v.h5", SCHEMES, **options)
    with Worker.of(tmp_path / "coordination") as worker:
        run = functools.partial(run_blocks, executor=SerialExecutor(), worker=worker, on_block=lambda *_: None)
        with pytest.raises(VolumeError) as found:
            survey(volume, "v.h5", SCHEMES, workspace=Workspace(tmp_path, run, 1 << 30), **options)
        assert type(found.value) is VolumeError
        assert str(found.value) == str(expected.value)
        assert not (tmp_path / "ledger_survey" / "quarantine").exists()
        image[~np.isfinite(image)] = 0  # as the message says
        cases = survey(volume, "v.h5", SCHEMES, workspace=Workspace(tmp_path, run, 1 << 30), **options)
    assert cases == survey(volume, "v.h5", SCHEMES, **options)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_of_several_values_the_first_is_named_whichever_was_met(tmp_path: Path, axis: int) -> None:
    image = image_of("float32", 4)
    image[1, 4, 17, 20] = image[0, 5, 3, 21] = image[0, 6, 2, 9] = np.nan
    volume = ArrayVolume(image, (1, 8, 31))

    def backwards(task: Task, ledger: Ledger) -> BlocksDone:
        for number in reversed(list(ledger.unfinished())):
            ledger.append(task.process(ledger.grid.numbered(number)))
        raise AssertionError

    options: dict[str, Any] = {"by_slice": True, "section_axis": axis}
    with pytest.raises(VolumeError) as expected:
        survey(volume, "v.h5", SCHEMES, **options)
    with pytest.raises(VolumeError) as found:
        survey(volume, "v.h5", SCHEMES, workspace=Workspace(tmp_path, backwards, 1 << 30), **options)
    assert str(found.value) == str(expected.value)


def test_infinities_that_are_clipped_are_taken(tmp_path: Path) -> None:
    image = image_of("float32", 4)
    image[0, 3, 4:9, 5], image[0, 3, 4:9, 7] = np.inf, -np.inf
    clip = ChannelNormalisation("CTNormalization", 40.0, 13.0, 5.0, 120.0)
    schemes, volume = (clip, SCHEMES[1]), ArrayVolume(image, (2, 8, 31))
    (case,) = survey(volume, "image", schemes, by_slice=False, workspace=Workspace(tmp_path, Here(), 1 << 30))
    assert (case,) == survey(volume, "image", schemes, by_slice=False)
    assert case.channels[0].maximum == np.finfo(np.float32).max


def test_a_band_that_fails_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Bands.__call__

    def failing(self: Bands, grid: BlockGrid, block: Block) -> Any:
        if block.index == (1, 1, 0):
            raise MemoryError
        return look(self, grid, block)

    monkeypatch.setattr(Bands, "__call__", failing)
    volume = ArrayVolume(image_of("uint8", 4), (2, 23, 31))
    with Worker.of(tmp_path / "coordination") as worker:
        run = functools.partial(run_blocks, executor=SerialExecutor(), worker=worker, on_block=lambda *_: None)
        with pytest.raises(QuarantineError, match=r"1 of \d+ blocks failed and are quarantined \(1-1-0, voxels"):
            survey(volume, "image", SCHEMES, by_slice=True, workspace=Workspace(tmp_path, run, 1 << 30))


def test_sums_of_squares_may_exceed_64_bits() -> None:
    stats = IntensityStats(3, True, -(2**40), 2**71 + 2**62 + 5, minimum=-9.0, maximum=65535.0)
    tally = bands_module.CaseTally([stats], Box((0, 2, 3), (1, 5, 9)), 3)
    arrays = bands_module._packed([tally])
    (found,) = bands_module._unpacked([arrays[name] for name in bands_module.TALLIES], exact=True)
    assert (found.stats, found.box, found.inside) == (tally.stats, tally.box, tally.inside)


@settings(max_examples=60, deadline=None)
@given(
    extent=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60)),
    chunk=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60)),
    tile=st.integers(1, 3000),
    sizes=st.tuples(st.integers(1, 4000), st.integers(4000, 90000)),
)
def test_bands_are_whole_tiles_whose_order_is_that_of_the_tiles(
    extent: Vec3, chunk: Vec3, tile: int, sizes: tuple[int, int]
) -> None:
    info = VolumeInfo((1, *extent), np.dtype(np.float32), chunk)
    with pytest.MonkeyPatch.context() as patch:
        small_bands.prepare(tile, *sizes, patch)
        bands, shape = BlockGrid(extent, band_shape(info)), tile_shape(info)
        assert part_shape(info) == shape, "floats are added tile by tile"
        found = [
            part.core.shift(band.core.start) for band in bands for part in BlockGrid(band.core.shape, part_shape(info))
        ]
        assert found == [block.core for block in BlockGrid(extent, shape)]
        largest = max(band.core.voxels for band in bands) * 4
        one_tile = 4 * shape[0] * shape[1] * shape[2]
        assert largest <= max(sizes[1], one_tile, 4 * np.prod(extent) / bands_module.MANY)
        assert (band_bytes(info) > 0) == (len(bands) > 1)


def test_small_volumes_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bands.prepare(300, 2 * int(np.prod(SHAPE)), 1 << 30, monkeypatch)
    run = Here()
    image = image_of("uint8", 6)
    cases = survey(ArrayVolume(image), "v", SCHEMES, by_slice=True, workspace=Workspace(tmp_path, run, 1 << 30))
    assert run.blocks == [] and not list(tmp_path.iterdir())
    save_survey([cases], tmp_path / "survey.json")
    kept = load_survey(tmp_path / "survey.json")
    assert kept is not None and isinstance(kept[0][0], Case)


def test_a_band_of_a_large_volume_is_worth_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    petabyte = VolumeInfo((1, 100_000, 100_000, 100_000), np.dtype(np.uint8), (64, 64, 64))
    assert len(BlockGrid(petabyte.extent, band_shape(petabyte))) <= 2 * bands_module.MANY
    gigabyte = VolumeInfo((1, 1000, 1000, 1000), np.dtype(np.uint8), (1, 1000, 1000))
    assert 4 <= len(BlockGrid(gigabyte.extent, band_shape(gigabyte))) <= 8
    megabytes = VolumeInfo((1, 250, 1000, 1000), np.dtype(np.uint8), (1, 1000, 1000))
    assert band_shape(megabytes) == megabytes.extent
