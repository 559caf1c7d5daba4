"""Planes: along which a 2D model runs through a volume, and which volumes and models that fits."""

from __future__ import annotations

from pathlib import Path

from connectomics.assembly.settings import VolumeSettings
from connectomics.core.errors import ModelError, VolumeError
from connectomics.models.spec import ModelSpec
from connectomics.volumes.volume import Nanometres, Spacing

KEY = "inference.planes"
LARGEST_RATIO = 1.5
"""How many times longer than the shortest the longest edge of a voxel may be."""


def check_planes(planes: list[str], spec: ModelSpec, path: Path) -> None:
    """Refuse planes other than xy for a model that cannot take them.

    Raises
    ------
    ModelError
        If it is 3D, or the second stage of a cascade.
    """
    if planes == ["xy"]:
        return
    if spec.dimensions != 2:
        raise ModelError(
            f"{path}: is a 3D model, and {KEY} is {planes}: planes are for 2D models, a 3D one sees all three axes at "
            f"once; set {KEY}=[xy]"
        )
    if spec.previous_stage is not None:
        raise ModelError(
            f"{path}: is the second stage of a cascade, and {KEY} is {planes}; a cascade runs along xy only: set "
            f"{KEY}=[xy]"
        )


def check_isotropic(stated: VolumeSettings, edges: Nanometres | Spacing | None, name: str) -> None:
    """Refuse planes other than xy in a volume whose voxels are longer along one axis.

    Nothing is refused with ``inference.resample=plan``, which brings each plane to the pixels of the model's training.

    Parameters
    ----------
    edges
        Of a voxel (z, y, x) in any unit, None where they are not known.
    name
        Of the volume, for messages.

    Raises
    ------
    VolumeError
        If the longest edge is more than ``LARGEST_RATIO`` times the shortest.
    """
    planes = stated.plane_names
    if planes == ["xy"] or stated.resample or stated.allow_anisotropic or edges is None:
        return
    if max(edges) > LARGEST_RATIO * min(edges):
        raise VolumeError(
            f"{name}: its voxels measure {edges[0]:g} x {edges[1]:g} x {edges[2]:g} (z, y, x), and {KEY} is "
            f"{planes}: the model would see sections stretched {max(edges) / min(edges):.3g} times, "
            f"expected at most {LARGEST_RATIO:g}; set {KEY}=[xy], bring the planes to the model's pixels by "
            "inference.resample=plan, or set inference.allow_anisotropic_planes=true"
        )
