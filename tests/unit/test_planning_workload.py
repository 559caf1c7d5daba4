"""Blocks, windows and voxels read are counted from the volume's shape alone, and are those of the real work."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from connectomics.assembly.engine.make_engine import build_engine
from connectomics.assembly.volumes import segmenter_of
from connectomics.config.load import load_config
from connectomics.core.geometry import BlockGrid, Box, Vec3
from connectomics.models.backends.torch_eager import TorchBackend
from connectomics.planning.workload import (
    Partition,
    assumed_cases,
    batch_fill,
    count_read,
    count_sample_windows,
    count_windows,
)

from nnunet_models import make_model
from small_jobs import quick_folder

PLAN = ["inference.resample=plan", "inference.spacing=[1,0.7,1.4]"]
TWO, THREE, TURNED = "two", "three", "turned"
PLACES: list[tuple[str, Vec3, Vec3, list[str]]] = [
    (TWO, (3, 70, 41), (1, 32, 64), []),
    (TWO, (2, 12, 50), (2, 12, 20), ["inference.case=volume"]),
    (THREE, (20, 41, 33), (8, 16, 33), []),
    (THREE, (5, 30, 40), (2, 16, 40), ["inference.case=slice"]),
    (THREE, (5, 30, 70), (3, 16, 32), ["inference.sliding_window.overlap=0.25"]),
    (TURNED, (20, 26, 33), (8, 16, 16), []),
    (THREE, (9, 30, 30), (5, 16, 30), PLAN),
    (TWO, (2, 70, 41), (1, 32, 64), ["inference.sliding_window.engine=monai"]),
    (TWO, (30, 9, 41), (16, 4, 20), ["inference.planes=[xz]"]),
    (TWO, (30, 41, 16), (16, 20, 5), ["inference.planes=[yz]"]),
    (TWO, (30, 41, 16), (16, 20, 5), ["inference.planes=[yz]", "inference.case=volume"]),
]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Path]]:
    with quick_folder() as folder:
        small: dict[str, Any] = {"features": (2, 2), "reader": "Tiff3DIO"}
        yield {
            TWO: make_model(folder / TWO, dimensions=2, patch=(16, 24), features=(2, 2), mirror_axes=(0, 1)),
            THREE: make_model(folder / THREE, dimensions=3, patch=(6, 16, 16), mirror_axes=(), **small),
            TURNED: make_model(folder / TURNED, dimensions=3, patch=(8, 10, 12), axis_order=(2, 0, 1), **small),
        }


def made(model: Path, words: list[str]) -> Any:
    config = load_config(None, ["system.device=cpu", "system.num_cpus=1", *words])
    engine = build_engine(config, model)
    return engine, segmenter_of(engine, None).members[0]


ROWS = 7
ALL_BUT_TWO = [pytest.param(*place, marks=[pytest.mark.long] * (i not in (0, 2))) for i, place in enumerate(PLACES)]


def predicted(member: Any, cut: Partition) -> tuple[int, list[int]]:
    """Voxels read, and rows of each forward pass, where every block is really predicted by a network of no work."""
    image = np.random.default_rng(0).integers(1, 200, (1, *cut.extent), np.uint8)
    cases, read, rows, blocks = assumed_cases(member, cut.extent, 1), 0, list[int](), 0
    voxels = 0

    def reading(box: Box) -> Any:
        nonlocal read
        read += box.voxels
        return image[(slice(None), *box.slices)]

    def forward(self: TorchBackend, batch: torch.Tensor) -> torch.Tensor:
        rows.append(len(batch))
        return batch.repeat(1, 2, 1, 1, 1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TorchBackend, "forward", forward)
        for each in BlockGrid(cut.extent, cut.block_shape):
            core = each.core.intersect(cut.roi)
            if cut.wanted is not None and not cut.wanted[each.index]:
                continue
            blocks += core.voxels > 0
            voxels += core.voxels
            for _ in member.logits(reading, cases, core) if core.voxels else ():
                pass
    assert (cut.blocks, cut.voxels) == (blocks, voxels)
    return read, rows


def require_fill(member: Any, window: Any, cut: Partition, rows: list[int], words: list[str]) -> None:
    """The share of a batch that is filled is that of the passes."""
    whole = "engine=monai" in "".join(words)
    fill = batch_fill(member, window, cut, whole=whole)
    # resampled blocks touch a row more here and there; MONAI lays its windows otherwise
    expected = sum(rows) / (window.batch * len(rows))
    assert fill == pytest.approx(expected, rel=0.15 if words == PLAN or whole else 1e-9)
    assert batch_fill(member, replace(window, batch=1), cut, whole=whole) == 1


@pytest.mark.parametrize(("kind", "extent", "block", "words"), PLACES)
@pytest.mark.parametrize("part", ["", "a box", "blocks of a mask"])
def test_windows_reading_and_padding_are_those_of_the_blocks(
    models: dict[str, Path], kind: str, extent: Vec3, block: Vec3, words: list[str], part: str
) -> None:
    """Forward passes and their rows are counted where they happen, voxels where they are read."""
    engine, member = made(models[kind], [*words, f"inference.sliding_window.sw_batch_size={ROWS}"])
    roi = Box((1, 3, 5), (extent[0], extent[1] - 2, extent[2] - 7)) if part == "a box" else Box.of_shape(extent)
    cut, window = Partition(extent, block, roi), engine.models[0].window
    if part == "blocks of a mask":
        cut = replace(cut, wanted=np.random.default_rng(1).random(cut.counts) < 0.6)
    read, rows = predicted(member, cut)
    assert count_windows(member, cut, 1) * window.passes == sum(rows)
    if cut.wanted is not None:
        return
    counted = count_read(member, window, cut, whole="engine=monai" in "".join(words))
    if words == PLAN:  # the splines' surroundings are counted roughly
        assert 0.5 < counted / read < 2
    else:
        assert counted == read
    if not part:
        require_fill(member, window, cut, rows, words)


@pytest.mark.parametrize("rows", [64, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "extent", "block", "words"), ALL_BUT_TWO)
def test_the_padding_of_other_batches_is_that_of_the_blocks(
    models: dict[str, Path], kind: str, extent: Vec3, block: Vec3, words: list[str], rows: int
) -> None:
    engine, member = made(models[kind], [*words, f"inference.sliding_window.sw_batch_size={rows}"])
    cut, window = Partition(extent, block, Box.of_shape(extent)), engine.models[0].window
    passes = predicted(member, cut)[1]
    assert count_windows(member, cut, 1) * window.passes == sum(passes)
    require_fill(member, window, cut, passes, words)


def test_one_block_has_the_windows_that_nnunet_lays(models: dict[str, Path]) -> None:
    extent = (20, 41, 33)
    engine, member = made(models[THREE], [])
    steps = compute_steps_for_sliding_window(extent, engine.models[0].window.patch, 0.5)
    assert count_windows(member, Partition(extent, extent, Box.of_shape(extent)), 1) == np.prod([len(s) for s in steps])


@pytest.mark.parametrize(("kind", "extent"), [(TWO, (14_901, 8192, 8192)), (THREE, (10_000, 10_000, 10_000))])
def test_a_terabyte_is_counted_at_once_and_in_little_memory(models: dict[str, Path], kind: str, extent: Vec3) -> None:
    engine, member = made(models[kind], [])
    cut = Partition(extent, (1, 1024, 1024) if kind == TWO else (64, 512, 512), Box.of_shape(extent))
    assert cut.blocks == len(BlockGrid(extent, cut.block_shape)) > 60_000
    tracemalloc.start()
    began = time.perf_counter()
    windows = count_windows(member, cut, 1)
    read = count_read(member, engine.models[0].window, cut, whole=False)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    patch = np.array([max(p // 2, 1) for p in engine.models[0].window.patch])
    assert windows > np.prod(np.array(extent) / patch)
    assert 1 <= read / np.prod([float(n) for n in extent]) < 1.7
    assert seconds < 20 and peak < 4 << 20


def test_the_sample_of_fast_is_about_a_million_voxels(models: dict[str, Path]) -> None:
    _, member = made(models[TWO], [])
    cut = Partition((4, 2000, 2000), (4, 2000, 2000), Box.of_shape((4, 2000, 2000)))
    cases = assumed_cases(member, cut.extent, 1)
    piece = (1, 600, 800)
    one = member.windows(lambda box: np.zeros(0), cases, Box((2, 700, 600), (3, 1300, 1400)))
    assert count_sample_windows(member, cut, 1, piece) == 3 * one
