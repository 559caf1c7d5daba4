"""How a volume is cut into blocks and chunks."""

from __future__ import annotations

from dataclasses import dataclass

from connectomics.core.geometry import Vec3

REFUSAL_STEP_BYTES = 10**7  # a budget that can work is named in such steps, one more than needed


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Shape of the blocks' cores and of the chunks inside them, (z, y, x) voxels; chunks divide blocks."""

    block_shape: Vec3
    chunk_shape: Vec3
