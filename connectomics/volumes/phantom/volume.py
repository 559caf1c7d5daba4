"""A phantom of electron microscopy: volumes of any size, computed when read, with exact ground truth.

Every value is a function of the seed and the voxel's own coordinates (hashes of lattice points, never a
random state), by operations that IEEE 754 rounds one way only; so it is the same in whatever box it is read.
``open_volume`` calls ``open_phantom`` for URIs such as ``phantom:64x1024x1024?seed=7&what=image``.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from connectomics.core.errors import VolumeError
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.volumes.phantom.picture import Damage, picture, section
from connectomics.volumes.phantom.shapes import VOXEL_SIZE_NM, Tile, id_dtype, mitochondria, warp_of
from connectomics.volumes.volume import Array, VolumeInfo, VolumeReader

What = Literal["image", "label", "instances"]

VERSION = 1
GRAMMAR = "phantom:ZxYxX[?seed=N][&what=image|label|instances], for example phantom:64x1024x1024?seed=7&what=image"
LARGEST_AXIS = 10**6
LARGEST_SEED = 2**63 - 1
TILE = 256  # pixels along y and x that are computed at once; does not change a value


def open_phantom(uri: str) -> VolumeReader:
    """Open the phantom that ``uri`` describes.

    Parameters
    ----------
    uri
        ``phantom:ZxYxX``, each axis 1 to 10**6 voxels, then optionally ``?seed=N`` (default 0) and
        ``what=image`` (uint8, the default), ``what=label`` (uint8, 1 in mitochondria) or ``what=instances``
        (ids of mitochondria; uint32, uint64 for volumes whose ids need it).

    Raises
    ------
    VolumeError
        If ``uri`` does not follow this grammar.
    """
    match = re.fullmatch(r"phantom:([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})(?:\?(.*))?", uri)
    if match is None:
        raise VolumeError(f"{uri!r} is not a phantom; write {GRAMMAR}.")
    extent = vec3([int(size) for size in match.groups()[:3]])
    if not all(1 <= size <= LARGEST_AXIS for size in extent):
        raise VolumeError(
            f"{uri!r} asks for {extent} voxels (z, y, x), expected 1 to {LARGEST_AXIS} each; write {GRAMMAR}."
        )
    options = {"seed": "0", "what": "image"}
    given = [part.partition("=")[::2] for part in match[4].split("&")] if match[4] else []
    for name, value in given:
        if name not in options or [n for n, _ in given].count(name) > 1:
            raise VolumeError(f"{uri!r} has an unknown or repeated option {name!r}; write {GRAMMAR}.")
        options[name] = value
    seed, what = options["seed"], options["what"]
    if re.fullmatch(r"[0-9]{1,19}", seed) is None or int(seed) > LARGEST_SEED:
        raise VolumeError(f"{uri!r} has seed {seed!r}, expected 0 to {LARGEST_SEED}; write {GRAMMAR}.")
    if what not in ("image", "label", "instances"):
        raise VolumeError(f"{uri!r} asks for {what!r}, expected image, label or instances; write {GRAMMAR}.")
    return PhantomReader(extent, int(seed), cast(What, what))


def section_damage(seed: int, z: int) -> Damage:
    """How section ``z`` of the phantoms of ``seed`` is damaged; empty for the 98 % that are not.

    ``black`` sections are zero throughout, ``fold`` ones have dark bands, ``faint`` ones little contrast and
    much noise. Labels and instances go on through all of them: the tissue was there.
    """
    return section(seed, z).damage


@dataclass(frozen=True, slots=True)
class PhantomReader:
    """Reads one phantom; holds nothing but its description.

    Parameters
    ----------
    extent
        Shape (z, y, x) in voxels of 30 x 8 x 8 nm.
    seed
        0 to 2**63 - 1; another seed is another tissue.
    what
        ``image``, ``label`` or ``instances``.
    """

    extent: Vec3
    seed: int
    what: What

    @property
    def info(self) -> VolumeInfo:
        """One channel; uint8, or for instances the smaller of uint32 and uint64 that holds every id."""
        dtype = np.dtype(np.uint8) if self.what != "instances" else id_dtype(self.extent)
        chunk = vec3([min(c, n) for c, n in zip((1, TILE, TILE), self.extent, strict=True)])
        return VolumeInfo((1, *self.extent), dtype, chunk, VOXEL_SIZE_NM)

    @property
    def uri(self) -> str:
        """The description with every option stated."""
        return f"phantom:{'x'.join(map(str, self.extent))}?seed={self.seed}&what={self.what}"

    @property
    def identity(self) -> dict[str, object]:
        """The description and the version of the recipe."""
        return {"phantom": self.uri, "version": VERSION}

    def read(self, box: Box) -> Array:
        """Compute the voxels of ``box`` as a (1, z, y, x) array; time and memory depend on the box alone.

        Raises
        ------
        VolumeError
            If ``box`` is not inside the volume.
        """
        if not Box.of_shape(self.extent).contains(box):
            raise VolumeError(
                f"{self.uri} was asked for voxels {box.start} to {box.stop} (z, y, x), expected them inside "
                f"{self.extent}; clip the box to the volume."
            )
        info = self.info
        out = np.empty((1, *box.shape), info.dtype)
        (z0, y0, x0), (z1, y1, x1) = box.start, box.stop
        for z, y, x in itertools.product(range(z0, z1), range(y0, y1, TILE), range(x0, x1, TILE)):
            tile = Tile(self.seed, z, np.arange(y, min(y + TILE, y1)), np.arange(x, min(x + TILE, x1)))
            inside = (0, z - z0, slice(y - y0, y - y0 + TILE), slice(x - x0, x - x0 + TILE))
            if self.what == "image":
                out[inside] = picture(tile)
            else:
                ids = mitochondria(tile, warp_of(tile)).ids()
                out[inside] = ids if self.what == "instances" else ids > 0
        return out

    def close(self) -> None:
        """Nothing to close."""
