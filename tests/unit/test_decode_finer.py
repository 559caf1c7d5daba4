"""Few blocks are cut smaller for several processes; nothing that is left tells so, and what was begun goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.cli import main
from connectomics.core.errors import OutputError
from connectomics.core.geometry import BlockGrid
from connectomics.execution.block_plan import BlockPlan, plan_of
from connectomics.stages.decode import context as contexts
from connectomics.stages.decode.context import finer_plan

from decoding import whole_components
from small_jobs import finals, read_h5, write_h5

SHAPE = (32, 64, 64)
STEPS = "decoding=[{name: slice_linking}, {name: filters, min_voxels: 3, fill_holes: 3d}]"


@pytest.fixture
def values() -> np.ndarray:
    return (np.random.default_rng(2).random(SHAPE) > 0.6).astype(np.uint8)


def test_final_files_are_those_of_uncut_blocks(
    values: np.ndarray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, found = write_h5(folder / "v.h5", values), []
    for fine in (values.size, 1 << 12):
        monkeypatch.setattr(contexts, "FINE_VOXELS", fine)
        words = ["inference.output.formats=[h5,zarr,n5]", "inference.block_shape=[32,64,32]"]
        output = folder / str(fine)
        assert main(["decode", str(volume), f"inference.data.output_path='{output}'", STEPS, *words]) == 0
        (ledger,) = output.glob("v_instances.run/*/ledger_1_slice_linking.cut")
        plan = plan_of(ledger)
        assert plan is not None and (len(BlockGrid(SHAPE, plan.block_shape)) == 2) == (fine == values.size)
        found.append(finals(output))
    assert found[0] == found[1] and any("c/" in path for path in found[0])


def test_what_was_begun_with_whole_blocks_goes_on_with_them(
    values: np.ndarray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = write_h5(folder / "v.h5", values)
    words = [
        "decode",
        str(volume),
        f"inference.data.output_path='{folder / 'out'}'",
        "inference.block_shape=[32,64,64]",
    ]
    words.append("decoding=[{name: connected_components}]")

    def refuse(*arguments: object, **named: object) -> None:
        raise OutputError("no room")

    with monkeypatch.context() as before:
        before.setattr(contexts.StepContext, "objects", refuse)
        assert main(words) == 3
    monkeypatch.setattr(contexts, "FINE_VOXELS", 1 << 12)
    assert main(words) == 0
    (ledger,) = (folder / "out").glob("v_instances.run/*/ledger_1_connected_components.cut")
    plan = plan_of(ledger)
    assert plan is not None and plan.block_shape == SHAPE
    assert np.array_equal(read_h5(folder / "out" / "v_instances.h5"), whole_components(values, 26))


@pytest.mark.parametrize(
    ("volume", "block", "chunk", "read"),
    [
        ((256, 512, 512), (256, 256, 256), (64, 64, 64), (64, 64, 64)),
        ((50, 1000, 1000), (16, 1000, 1000), (16, 125, 125), (1, 1000, 1000)),
        ((100, 4096, 4096), (64, 512, 512), (64, 64, 64), (1, 512, 512)),
        ((100, 700, 900), (100, 350, 450), (50, 175, 225), (100, 700, 900)),
        ((1, 8192, 8192), (1, 4096, 4096), (1, 64, 64), (1, 4096, 4096)),
    ],
)
def test_finer_blocks_are_parts_of_blocks_in_whole_chunks(
    volume: tuple, block: tuple, chunk: tuple, read: tuple
) -> None:
    plan = finer_plan(BlockPlan(block, chunk), volume, read)
    for axis in range(3):
        assert block[axis] % plan.block_shape[axis] == 0 and plan.block_shape[axis] % plan.chunk_shape[axis] == 0
        assert plan.block_shape[axis] == block[axis] or plan.block_shape[axis] % read[axis] == 0
    assert plan.block_shape == block or np.prod(plan.block_shape) >= contexts.FINE_VOXELS
    assert len(BlockGrid(volume, plan.block_shape)) < 2 * contexts.MANY_BLOCKS or plan.block_shape == block
