"""Connected components of one block of labels: which voxels are neighbours, and the components of an array.

``pieces`` labels blocks with it; ``faces`` asks it which voxels of two blocks touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

from connectomics.core.geometry import Vec3, vec3
from connectomics.volumes.volume import Array

_number: Callable[..., Any] = cc3d.connected_components
IN_A_SECTION = {4: 1, 8: 2}
IN_THE_VOLUME = {6: 1, 18: 2, 26: 3}


@dataclass(frozen=True, slots=True)
class Connectivity:
    """Which voxels are neighbours.

    Parameters
    ----------
    neighbours
        6 (by faces), 18 (and edges) or 26 (and corners) in the volume; 4 (by sides) or 8 (and corners) within a
        section, where no object reaches from one z to the next.

    Raises
    ------
    ValueError
        For any other number.

    Examples
    --------
    >>> len(Connectivity(26).steps), Connectivity(4).steps
    (26, ((0, -1, 0), (0, 0, -1), (0, 0, 1), (0, 1, 0)))
    """

    neighbours: int

    def __post_init__(self) -> None:
        if self.neighbours not in IN_A_SECTION | IN_THE_VOLUME:
            raise ValueError(f"connectivity is 6, 18 or 26, or within a section 4 or 8, not {self.neighbours}")

    @property
    def by_section(self) -> bool:
        """Whether every section is labelled for itself."""
        return self.neighbours in IN_A_SECTION

    @property
    def steps(self) -> tuple[Vec3, ...]:
        """Offsets (z, y, x) from a voxel to its neighbours."""
        longest = (IN_A_SECTION | IN_THE_VOLUME)[self.neighbours]
        return tuple(
            vec3(step)
            for step in itertools.product((-1, 0, 1), repeat=3)
            if 1 <= sum(map(abs, step)) <= longest and not (self.by_section and step[0])
        )


def connected_components(values: Array, connectivity: Connectivity) -> Array:
    """Number the connected components of equal values.

    Parameters
    ----------
    values
        bool or unsigned integers (z, y, x), fewer than 2^32 voxels; 0 is background.
    connectivity
        Which voxels are neighbours.

    Returns
    -------
    array
        Unsigned integers (z, y, x): 0 in the background, else 1 to the number of components.
    """
    values = np.ascontiguousarray(values)
    if values.dtype == np.bool_:  # cc3d 4.1.1 labels background, or fails, in small bool images with corners
        values = values.view(np.uint8)
    settings = {"connectivity": connectivity.neighbours}
    if not connectivity.by_section:
        found: Array = _number(values, **settings)
        return found
    numbered = np.zeros(values.shape, np.uint32)
    count = 0
    for section, target in zip(values, numbered, strict=True):
        found, inside = _number(section, **settings, return_N=True)
        np.add(found, np.uint32(count), out=target, where=found > 0)
        count += inside
    return numbered
