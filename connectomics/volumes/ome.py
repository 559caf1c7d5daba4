"""OME-Zarr's multiscales metadata, 0.4 and 0.5, for the working store and the Zarr outputs."""

from __future__ import annotations

from collections.abc import Sequence

from connectomics.volumes.levels import Level
from connectomics.volumes.volume import VolumeInfo


def multiscale(name: str, info: VolumeInfo, levels: Sequence[Level]) -> dict[str, object]:
    """One entry of ``multiscales``; level ``k`` is the array of that name.

    Parameters
    ----------
    name
        Of the image.
    info
        Level 0: its physical frame, and whether there is a channel axis.
    levels
        From level 0 on, none with a phase.
    """
    unit = {} if info.voxel_size_nm is None else {"unit": "nanometer"}
    channel = [] if info.channels == 1 else [{"name": "c", "type": "channel"}]
    size = info.voxel_size_nm or (1.0, 1.0, 1.0)
    datasets = [
        {
            "path": str(k),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0] * len(channel) + list(level.scale(size))},
                {
                    "type": "translation",
                    "translation": [0.0] * len(channel) + list(level.translation(size, info.origin_nm)),
                },
            ],
        }
        for k, level in enumerate(levels)
    ]
    axes = channel + [{"name": axis, "type": "space", **unit} for axis in "zyx"]
    return {"name": name, "axes": axes, "datasets": datasets}
