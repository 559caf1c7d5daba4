"""Surveys in bands for small volumes: tiles of a few voxels and bands of a few tiles, here or in a forked child."""

from __future__ import annotations

import pytest

from connectomics.stages.survey import bands, tiles


def prepare(tile_voxels: int, least_bytes: int, most_bytes: int, patch: pytest.MonkeyPatch | None = None) -> None:
    """From now on cut surveys so, however small the volume is; ``patch`` undoes it."""
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(tiles, "TILE_VOXELS", tile_voxels)
    patch.setattr(bands, "LEAST_BYTES", least_bytes)
    patch.setattr(bands, "MOST_BYTES", most_bytes)
