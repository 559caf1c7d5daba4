"""The filters of ``inference.postprocessing.binary`` on a store of labels of any size: small objects, holes.

``stages.predict.filters.filter_store`` calls it. The same tasks and tables as for decoding; labels stay labels.
"""

from __future__ import annotations

from pathlib import Path

from connectomics.core.files import discard, put_in_place
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.run_folder import FILTERED, LEDGER
from connectomics.execution.stage import Workspace
from connectomics.objects.components import Connectivity
from connectomics.objects.selection import Holes, Selection
from connectomics.stages.decode.context import BLOCK_VOXELS, PLAN, VOXEL_BYTES, StepContext, decode_plan, kept_plan
from connectomics.stages.decode.tasks import BlockPieces
from connectomics.stages.decode.values import Values
from connectomics.volumes.store import Store, open_store

OBJECTS, BACKGROUND = Connectivity(26), Connectivity(6)
FILTER = "filter"


def filter_labels(
    store: Store, grid: BlockGrid, workspace: Workspace, *, minimum_voxels: int, fill_holes: bool
) -> Store:
    """Write filtered labels, block by block, continuing what an earlier run left; one process alone does so.

    Parameters
    ----------
    store
        Labels.
    grid
        How the volume was cut; blocks that are too large for labelling are cut smaller.
    workspace
        Where the filtered store, ``filtered.zarr``, stands once it is complete.
    minimum_voxels
        Components (26-connected, of one label) of fewer voxels become background; 0 for none.
    fill_holes
        Whether background (6-connected) that one label encloses takes this label.

    Raises
    ------
    QuarantineError
        If blocks failed.
    """
    work, target = workspace.work, workspace.work / FILTERED
    if not target.exists():
        plan = BlockPlan(grid.block_shape, store.info.chunk_shape)
        if grid.block((0, 0, 0)).core.voxels > min(BLOCK_VOXELS, workspace.block_bytes // VOXEL_BYTES):
            plan = decode_plan(store.info, workspace.block_bytes)
        plan = kept_plan(work / f"{FILTER}.{PLAN}", plan)
        facts = {"small": minimum_voxels, "holes": fill_holes, "block": list(plan.block_shape)}
        cut = BlockGrid(grid.volume, plan.block_shape)
        context = StepContext(work, FILTER, plan, cut, run_key=key_of(facts), run=workspace.run)
        current = store
        if minimum_voxels > 0:
            current = _without_small_objects(current, minimum_voxels, context.part("dust"))
        if fill_holes:
            current = _without_holes(current, context.part("holes"))
        current.close()
        put_in_place(current.path, target)
    discard_unfinished(work)
    filtered = open_store(target)
    filtered.expect(lambda index: True)
    return filtered


def discard_unfinished(work: Path) -> None:
    """Forget how far filtering has come."""
    for path in (*work.glob(f"{FILTER}.*"), *work.glob(f"{LEDGER}_{FILTER}.*")):
        discard(path)


def _without_small_objects(store: Store, minimum_voxels: int, context: StepContext) -> Store:
    pieces = context.pieces(BlockPieces(Values(store), OBJECTS))
    tables, _, _ = context.objects(pieces, Selection(minimum_voxels, by_value=True), joined=True)
    return context.paint(pieces, tables, store.info, store.info.dtype)


def _without_holes(store: Store, context: StepContext) -> Store:
    values = Values(store)
    pieces = context.pieces(BlockPieces(values, BACKGROUND, holes=True))
    tables, _, _ = context.objects(pieces, Holes(), joined=True)
    return context.paint(pieces, tables, store.info, store.info.dtype, under=values)
