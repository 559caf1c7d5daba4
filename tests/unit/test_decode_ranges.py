"""Objects that are numbered in many ranges are those that one process finds in one, however many do so together."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from connectomics.execution.executors.serial import SerialExecutor
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import COORDINATION, SINGLE_WRITER
from connectomics.execution.runner import BlocksDone, run_blocks
from connectomics.execution.task import Task
from connectomics.execution.worker import Worker
from connectomics.objects import links
from connectomics.objects.numbering import ranges
from connectomics.stages.decode import context as contexts
from connectomics.stages.decode.connected_components import ConnectedComponents
from connectomics.stages.decode.object_filters import Filters
from connectomics.stages.decode.slice_linking import SliceLinking
from connectomics.stages.decode.step_contract import DecodingStep
from connectomics.stages.decode.watershed.seeded_watershed import Watershed

from decoding import Decoded, decode_array, table_of

Array = npt.NDArray[Any]
BLOCK = (4, 12, 9)
STEPS: dict[str, Sequence[DecodingStep]] = {
    "components": [ConnectedComponents(connectivity=6)],
    "components of sections, the largest": [ConnectedComponents(connectivity=8), Filters(keep_largest=7)],
    "filters of ids": [Filters(min_voxels=5, fill_holes="3d")],
    "linked labels": [SliceLinking(), Filters(min_voxels=4)],
    "linked ids, one to one": [SliceLinking(ids=True, one_to_one=True, max_gap=1)],
    "watershed": [Watershed(seed_distance_nm=13.0)],
}


def blobs() -> Array:
    """Small objects of three labels."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(5).random((10, 24, 26)), 0.7)
    labels = (smooth > np.quantile(smooth, 0.6)).astype(np.uint8)
    labels[:, :, 9:] *= 2
    labels[:, 13:] += labels[:, 13:] > 0
    return labels


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Array, dict[str, list[Any]]]]:
    """Ids and table of all steps, of one range each."""
    folder = tmp_path_factory.mktemp("undivided")
    found = {}
    for name, steps in STEPS.items():
        decoded = decode_array(blobs(), list(steps), BLOCK, folder / name, fused=True)
        assert not list((folder / name).glob("*.parts"))
        found[name] = decoded.ids, table_of(decoded, folder / name)
    return found


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of a few pieces, spans of a few objects."""
    monkeypatch.setattr(ranges, "RANGE_PIECES", (9, 9))
    monkeypatch.setattr(links, "SPAN_OBJECTS", (11, 11))


@pytest.mark.parametrize("name", STEPS)
def test_many_ranges_find_what_one_does(
    name: str, undivided: dict[str, tuple[Array, dict[str, list[Any]]]], small_ranges: None, folder: Path
) -> None:
    decoded = decode_array(blobs(), list(STEPS[name]), BLOCK, folder, fused=True)
    parts = list(folder.glob("0.*.parts/*"))
    assert len(parts) > 5 or name.startswith("watershed"), "ids of a volume, or its components, are in several ranges"
    ids, table = undivided[name]
    assert np.array_equal(decoded.ids, ids) and decoded.ids.dtype == ids.dtype and ids.max() > 2
    assert table_of(decoded, folder) == table


def together(folder: Path, steps: Sequence[DecodingStep], count: int) -> list[Decoded]:
    """What several workers come to that begin at the same time."""
    found: list[Decoded] = []
    gate = threading.Barrier(count)

    def work() -> None:
        with Worker.of(folder / COORDINATION) as worker:

            def run(task: Task, ledger: Ledger) -> BlocksDone:
                return run_blocks(task, ledger, SerialExecutor(), worker, lambda done, planned: None)

            gate.wait()
            alone = functools.partial(worker.alone, SINGLE_WRITER)
            found.append(decode_array(blobs(), list(steps), BLOCK, folder, fused=True, run=run, alone=alone))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("name", ["components", pytest.param("linked ids, one to one", marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.long)])
def test_workers_share_the_ranges(
    name: str,
    count: int,
    undivided: dict[str, tuple[Array, dict[str, list[Any]]]],
    small_ranges: None,
    folder: Path,
) -> None:
    found = together(folder, STEPS[name], count)
    assert len(found) == count, "all came to an end"
    assert all(np.array_equal(each.ids, undivided[name][0]) for each in found)
    assert table_of(found[0], folder) == undivided[name][1]
    (ledger,) = folder.glob("ledger_*tables.parts")
    blocks = [json.loads(line)["block"] for path in ledger.glob("*.jsonl") for line in _records(path)]
    assert len(blocks) == len(set(blocks)) > 2, "each range is numbered once"


def _records(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if '"block"' in line]


@pytest.mark.parametrize("name", ["components", "linked labels"])
def test_ranges_that_are_finished_are_kept(
    name: str,
    undivided: dict[str, tuple[Array, dict[str, list[Any]]]],
    small_ranges: None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends in the middle of a stage of ranges, and again before the tables are put in place."""
    kind = contexts.BlockNumbers
    calls: list[int] = []

    class Ending(kind):  # type: ignore[valid-type, misc]
        def __call__(self, grid: Any, block: Any) -> Any:
            calls.append(grid.number(block.index))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(grid, block)

    monkeypatch.setattr(contexts, "BlockNumbers", Ending)
    with pytest.raises(KeyboardInterrupt):
        decode_array(blobs(), list(STEPS[name]), BLOCK, folder, fused=True)
    with monkeypatch.context() as inner:
        inner.setattr(contexts.Numbering, "write", _ended)
        with pytest.raises(KeyboardInterrupt):
            decode_array(blobs(), list(STEPS[name]), BLOCK, folder, fused=True)
    decoded = decode_array(blobs(), list(STEPS[name]), BLOCK, folder, fused=True)
    assert np.array_equal(decoded.ids, undivided[name][0]) and table_of(decoded, folder) == undivided[name][1]
    stage = "tables" if name == "components" else "sections"
    ranges_there = len(list(folder.glob(f"0.{stage}.parts/*")))
    assert sorted(calls[: ranges_there + 1]) == sorted([*range(ranges_there), calls[3]]), (
        "only the fourth is done twice"
    )


def _ended(*arguments: Any) -> Any:
    raise KeyboardInterrupt
