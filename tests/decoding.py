"""Decoding for the tests: a volume in memory cut into blocks, with the real tasks and tables, and references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from connectomics.core.geometry import BlockGrid, Vec3
from connectomics.objects.components import Connectivity
from connectomics.objects.merge import AT_ONCE, FIRST_ID
from connectomics.objects.numbering.cuts import BlockFiles
from connectomics.objects.numbering.tables import merge
from connectomics.objects.table import COLUMNS, write_table
from connectomics.stages.decode.tasks import BlockJoins, BlockPieces, BlockTask, block_file, painted_block
from connectomics.testing.decoding_step import VOXEL_SIZE_NM, Decoded, decode_array, in_order

__all__ = ["VOXEL_SIZE_NM", "Decoded", "decode_array", "in_order"]
Array = npt.NDArray[Any]


def canonical(numbered: Array) -> Array:
    """Numbers 1, 2, … by the first voxel in raster order, by numpy alone; 0 stays."""
    found, first, inverse = np.unique(numbered, return_index=True, return_inverse=True)
    order = np.argsort(np.where(found == 0, -1, first))
    rank = np.empty(len(found), np.uint64)
    rank[order] = np.arange(len(found)) + (0 if 0 in found else 1)
    return rank[inverse].reshape(numbered.shape)


def whole_components(values: Array, neighbours: int) -> Array:
    """cc3d on the whole volume, or on each whole section, in canonical numbers."""
    values = values.view(np.uint8) if values.dtype == np.bool_ else values
    if neighbours not in (4, 8):
        return canonical(cc3d.connected_components(values, connectivity=neighbours))
    result, count = np.zeros(values.shape, np.uint64), 0
    for section, target in zip(values, result, strict=True):
        found = cc3d.connected_components(section, connectivity=neighbours)
        target[:] = np.where(found > 0, canonical(found) + np.uint64(count), 0)
        count += int(found.max())
    return result


def components_by_blocks(
    values: Array, neighbours: int, block: Vec3, folder: Path, *, first_id: int = FIRST_ID, at_once: int = AT_ONCE
) -> Array:
    """Components of all blocks, joined and numbered: uint64 (z, y, x)."""
    connectivity, grid = Connectivity(neighbours), BlockGrid(values.shape, block)
    pieces, joins, tables = folder / "pieces", folder / "joins", folder / "tables"
    for path in (pieces, joins, tables):
        path.mkdir(parents=True)
    blocks = list(grid)
    for task in (
        BlockTask(grid, pieces, BlockPieces(lambda box: values[box.slices], connectivity)),
        BlockTask(grid, joins, BlockJoins(pieces, connectivity)),
    ):
        for each in blocks:
            task.process(each)
    cuts = BlockFiles(
        [block_file(pieces, each) for each in blocks], [block_file(joins, each) for each in blocks]
    ).cuts()
    merge(cuts, tables, first_id=first_id, at_once=at_once, range_pieces=(at_once, at_once))
    result = np.zeros(values.shape, np.uint64)
    for each in blocks:
        result[each.core.slices] = painted_block(grid, each, pieces, tables, np.dtype(np.uint64))
    return result


def table_of(decoded: Decoded, folder: Path) -> dict[str, list[Any]]:
    """The table of the last scene's objects, written to a folder and read again."""
    assert decoded.state.tables is not None
    path = folder / "objects.parquet"
    write_table(decoded.state.tables, decoded.state.count, path, decoded.state.frame, "key")
    found: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    assert list(found) == list(COLUMNS)
    return found
