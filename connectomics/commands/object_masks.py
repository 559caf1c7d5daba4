"""What ``evaluate`` makes of masks where ids are compared, and how many pairs of ids its memory holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil

from connectomics.core.geometry import BlockGrid, vec3
from connectomics.evaluate.comparison import PIECE, Comparison
from connectomics.evaluate.contingency import Contingency
from connectomics.evaluate.masks import values_of
from connectomics.objects.components import Connectivity, connected_components
from connectomics.volumes.listing import stem_of
from connectomics.volumes.opening import open_volume

PAIR_BYTES = 500  # at most, while scores and tables of matches are made: 440 were measured for objects of 8 voxels
MASK_VALUES = frozenset({1, *(2**bits - 1 for bits in (8, 16, 32, 64))})


def most_pairs(budget_bytes: int | None) -> int | None:
    """How many pairs of ids the memory budget holds, beside what the process has already."""
    if budget_bytes is None:
        return None
    taken = int(psutil.Process().memory_info().rss)
    return max(1, (budget_bytes - taken) // PAIR_BYTES)


def ids_message(folder: Path, ids: str, mask: str) -> str:
    """Why ids and a mask are not compared, and the commands that make them comparable."""
    objects = folder / f"{stem_of(mask)}_instances.h5"
    decode = shlex.join(["connectomics", "decode", mask, "decoding=[{name: connected_components}]"])
    return (
        f"{ids} holds ids of objects and {mask} is a mask; number the objects of the mask: {decode} "
        f"inference.data.output_path={shlex.quote(str(folder))}, and compare {objects} with --instances, or compare "
        "voxels with test.evaluation.foreground=true"
    )


def refuse_masks(
    folder: Path, jobs: Sequence[Comparison], tables: Mapping[str, Contingency], failures: dict[str, str]
) -> None:
    """Add to ``failures`` what compares ids with a mask, all of whose objects have one value."""
    for job in jobs:
        if job.name not in tables or job.name in failures:
            continue
        prediction, truth = (side - {0} for side in values_of(tables[job.name]))
        pairs = ((job.prediction, job.truth, prediction, truth), (job.truth, job.prediction, truth, prediction))
        for ids, mask, many, one in pairs:
            if len(many) > 1 and len(one) == 1 and one <= MASK_VALUES and in_several_pieces(mask):
                failures[job.name] = ids_message(folder, ids, mask)


def in_several_pieces(uri: str) -> bool:
    """Whether what is not 0 in a volume certainly is not one connected object; read piece by piece."""
    enclosed, others = 0, False
    with closing(open_volume(uri)) as volume:
        extent = volume.info.extent
        for block in BlockGrid(extent, vec3([min(n, p) for n, p in zip(extent, PIECE, strict=True)])):
            numbered = connected_components(volume.read(block.core)[0] != 0, Connectivity(26))
            outer = np.zeros(int(numbered.max()) + 1, bool)
            for axis in range(3):
                if block.core.start[axis] > 0:
                    outer[numbered.take(0, axis)] = True
                if block.core.stop[axis] < extent[axis]:
                    outer[numbered.take(-1, axis)] = True
            enclosed += int(np.count_nonzero(~outer[1:]))
            others |= bool(outer[1:].any())
            if enclosed + others > 1:
                return True
    return False
