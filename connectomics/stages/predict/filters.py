"""Whole-volume filters of labels, in memory and out of core."""

from __future__ import annotations

from dataclasses import dataclass

from connectomics.core.geometry import BlockGrid
from connectomics.execution.stage import Workspace
from connectomics.objects.filters import fill_holes, remove_small_objects
from connectomics.stages.decode.binary_filters import filter_labels
from connectomics.volumes.store import Store
from connectomics.volumes.volume import Array


@dataclass(frozen=True, slots=True)
class BinaryFilters:
    """Filters that see whole objects; they change labels only.

    Parameters
    ----------
    minimum_voxels
        Objects smaller than this are removed; 0 for none.
    fill_holes
        Whether holes inside objects take the object's label.
    """

    minimum_voxels: int = 0
    fill_holes: bool = False

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.fill_holes or self.minimum_voxels > 0

    def apply(self, labels: Array) -> Array:
        """Filtered labels (z, y, x) of a whole volume."""
        if self.minimum_voxels > 0:
            labels = remove_small_objects(labels, self.minimum_voxels)
        return fill_holes(labels) if self.fill_holes else labels


def filter_store(store: Store, grid: BlockGrid, workspace: Workspace, filters: BinaryFilters) -> Store:
    """Apply filters of whole objects to a store of labels."""
    return filter_labels(store, grid, workspace, minimum_voxels=filters.minimum_voxels, fill_holes=filters.fill_holes)
