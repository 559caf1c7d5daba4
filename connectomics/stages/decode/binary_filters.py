"""The filters of ``inference.postprocessing.binary`` on a store of labels of any size: small objects, holes.

``stages.predict.filters.filter_store`` calls it. The same tasks and tables as for decoding; labels stay labels.
"""

from __future__ import annotations

from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import BlockGrid
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.stage import Workspace
from connectomics.objects.components import Connectivity
from connectomics.objects.selection import Holes, Selection
from connectomics.stages.decode.context import BLOCK_VOXELS, PLAN, VOXEL_BYTES, StepContext, decode_plan, kept_plan
from connectomics.stages.decode.tasks import BlockPieces
from connectomics.stages.decode.values import Values
from connectomics.volumes.store import Store

OBJECTS, BACKGROUND = Connectivity(26), Connectivity(6)
FILTER = "filter"


def filter_labels(
    store: Store, grid: BlockGrid, workspace: Workspace, *, minimum_voxels: int, fill_holes: bool
) -> Store:
    """Write filtered labels, block by block, continuing what an earlier run left, together with whoever does the same.

    Parameters
    ----------
    store
        Labels.
    grid
        How the volume was cut; blocks that are too large for labelling are cut smaller.
    workspace
        Where the filtered store is.
    minimum_voxels
        Components (26-connected, of one label) of fewer voxels become background; 0 for none.
    fill_holes
        Whether background (6-connected) that one label encloses takes this label.

    Raises
    ------
    QuarantineError
        If blocks failed.
    """
    plan = BlockPlan(grid.block_shape, store.info.chunk_shape)
    if grid.block((0, 0, 0)).core.voxels > min(BLOCK_VOXELS, workspace.block_bytes // VOXEL_BYTES):
        plan = decode_plan(store.info, workspace.block_bytes)
    plan = kept_plan(workspace.work / f"{FILTER}.{PLAN}", plan)
    facts = {"small": minimum_voxels, "holes": fill_holes, "block": list(plan.block_shape)}
    cut = BlockGrid(grid.volume, plan.block_shape)
    context = StepContext(
        workspace.work, FILTER, plan, cut, run_key=key_of(facts), run=workspace.run, alone=workspace.alone
    )
    filtered = store
    if minimum_voxels > 0:
        filtered = _without_small_objects(filtered, minimum_voxels, context.part("dust"))
    if fill_holes:
        filtered = _without_holes(filtered, context.part("holes"))
    return filtered


def _without_small_objects(store: Store, minimum_voxels: int, context: StepContext) -> Store:
    pieces = context.pieces(BlockPieces(Values(store), OBJECTS))
    tables, _, _ = context.objects(pieces, Selection(minimum_voxels, by_value=True), joined=True)
    return context.paint(pieces, tables, store.info, store.info.dtype)


def _without_holes(store: Store, context: StepContext) -> Store:
    values = Values(store)
    pieces = context.pieces(BlockPieces(values, BACKGROUND, holes=True))
    tables, _, _ = context.objects(pieces, Holes(), joined=True)
    return context.paint(pieces, tables, store.info, store.info.dtype, under=values)
