"""How a volume is cut into blocks and chunks, and the header of a ledger, which says so to whoever continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.core.errors import LedgerError
from connectomics.core.geometry import BlockGrid, Vec3, vec3

VERSION = 2
HEADER = "header.json"
REFUSAL_STEP_BYTES = 10**7  # a budget that can work is named in such steps, one more than needed


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Shape of the blocks' cores and of the chunks inside them, (z, y, x) voxels; chunks divide blocks."""

    block_shape: Vec3
    chunk_shape: Vec3


def read_header(folder: Path) -> dict[str, Any]:
    """The header of the ledger in ``folder``; a LedgerError if there is none of this version."""
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"{path}: is not a ledger's header ({error}); remove {folder.parent} to start this volume over"
        ) from error
    if not isinstance(header, dict) or header.get("ledger") != VERSION:
        raise LedgerError(
            f"{path}: found ledger version {header!r:.80}, expected {VERSION}; finish the run with the program "
            f"that began it, or remove {folder.parent} to start over"
        )
    return header


def plan_of(folder: Path) -> BlockPlan | None:
    """The plan in the header of the ledger in ``folder``, None where there is no ledger; errors of ``read_header``."""
    if not (folder / HEADER).exists():
        return None
    return plan_in(read_header(folder))


def plan_in(header: Mapping[str, Any]) -> BlockPlan:
    """The plan that a header tells of."""
    return BlockPlan(vec3(header["plan"]["block_shape"]), vec3(header["plan"]["chunk_shape"]))


def grid_of(header: Mapping[str, Any]) -> BlockGrid:
    """The blocks that a header tells of."""
    return BlockGrid(vec3(header["volume"]), vec3(header["plan"]["block_shape"]))
