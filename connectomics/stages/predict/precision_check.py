"""Fast against exact, measured on the user's own volume before the first block of a run.

``run_volume`` measures once a run and keeps the result in the work folder; ``InferenceManager`` does so on arrays. Many
small volumes of one call share a sample, which ``assembly.shared_sample`` takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from connectomics.core.errors import AgreementError
from connectomics.core.files import write_text
from connectomics.core.geometry import Box, Vec3, vec3
from connectomics.execution.stage import LABELS
from connectomics.inference.case import Case, ReadBox
from connectomics.stages.predict.segmenter import Segmenter, Surveyed

log = logging.getLogger(__name__)
SAMPLED_VOXELS = 1_000_000
PIECE_VOXELS = SAMPLED_VOXELS // 2
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many labels of a sample differ between fast and exact.

    ``boxes`` says where it was taken: name of the volume, start, stop.
    """

    voxels: int
    differ: int
    boxes: tuple[tuple[str, Vec3, Vec3], ...]

    def __add__(self, other: Agreement) -> Agreement:
        """Both samples together."""
        return Agreement(self.voxels + other.voxels, self.differ + other.differ, self.boxes + other.boxes)

    @property
    def share(self) -> float:
        """Share of the sampled voxels that differ."""
        return self.differ / self.voxels if self.voxels else 0.0

    def describe(self) -> str:
        """One line."""
        return f"{self.differ} of {self.voxels} sampled labels differ from precision=exact ({self.share:.1e})"


@dataclass(frozen=True, slots=True)
class FastContract:
    """What a fast run is held to.

    Parameters
    ----------
    exact
        The same models in float32.
    most
        Largest share of labels that may differ.
    piece
        Shape (z, y, x) of the pieces of the sample, at most; what computes a block computes such a piece, too.
    shared
        Takes the sample that this volume shares with others; None where it has its own.
    sampled
        Opened while the sample is labelled.
    """

    exact: Segmenter
    most: float
    piece: Vec3
    shared: Callable[[], Agreement] | None = None
    sampled: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def measure(
        self,
        fast: Segmenter,
        read: ReadBox,
        surveyed: Surveyed,
        roi: Box,
        seed: int,
        name: str,
        voxels: int = SAMPLED_VOXELS,
    ) -> Agreement:
        """Label the sample both ways.

        Parameters
        ----------
        fast
            What the run uses.
        read, surveyed
            The volume's raw voxels, and the cases of each member.
        roi
            The part of the volume that is labelled.
        seed
            Decides, with the shape of the cases, where the sample is taken.
        name
            Of the volume.
        voxels
            Least size of the sample, if there are as many.
        """
        found = Agreement(0, 0, ())
        with self.sampled():
            for box in sample(surveyed[0], roi, self.piece, seed, least=voxels):
                exact, changed = (s.segment(read, surveyed, box)[LABELS] for s in (self.exact, fast))
                differ = int(np.count_nonzero(exact != changed))
                found += Agreement(box.voxels, differ, ((name, box.start, box.stop),))
        return found

    def require(self, agreement: Agreement, name: str) -> None:
        """Say what was found, and refuse a volume of which more labels differ than may, by an AgreementError."""
        if agreement.share > self.most:
            raise AgreementError(
                f"{name}: inference.precision=fast: {agreement.describe()}, at most {self.most:.1e} may; set "
                "inference.precision=exact, or allow more with inference.max_disagreement"
            )
        level = logging.WARNING if self.shared is None else logging.INFO  # which is told once for all that share it
        log.log(level, "%s: inference.precision=fast: %s, at most %.1e may", name, agreement.describe(), self.most)


def piece_shape(patch: Sequence[float], block: Vec3) -> Vec3:
    """A shape like ``patch`` of about half a million voxels, flat where it is flat, no larger than ``block``.

    Examples
    --------
    >>> piece_shape((1, 384, 512), (1, 2048, 4096)), piece_shape((32, 128, 128), (64, 512, 100))
    ((1, 613, 817), (32, 126, 100))
    """
    thick = [p > 1 for p in patch]
    scale = (PIECE_VOXELS / math.prod(patch)) ** (1 / max(1, sum(thick)))
    roi = (math.ceil(p * scale) if t else 1 for p, t in zip(patch, thick, strict=True))
    return vec3([min(w, b) for w, b in zip(roi, block, strict=True)])


def sample(cases: Sequence[Case], roi: Box, piece: Vec3, seed: int, least: int = SAMPLED_VOXELS) -> Iterator[Box]:
    """Pieces of the nonzero boxes of cases, spread evenly, until they hold ``least`` voxels; all where there are fewer.

    Each box is cut into equal pieces no larger than ``piece``, which are taken as ``spread`` orders them.
    """
    boxes = [box for case in cases if not _is_empty(case) and (box := case.box.intersect(roi)).voxels]
    counts = [vec3([-(-n // p) for n, p in zip(box.shape, piece, strict=True)]) for box in boxes]
    ends = list(accumulate(math.prod(count) for count in counts))
    voxels = 0
    for number in spread(ends[-1] if ends else 0, seed):
        which = bisect_right(ends, number)
        box = _piece(boxes[which], counts[which], number - (ends[which - 1] if which else 0))
        yield box
        voxels += box.voxels
        if voxels >= least:
            return


def spread(total: int, seed: int) -> Iterator[int]:
    """The numbers below ``total``, each once, in steps of the golden section: any few in a row lie apart."""
    step = _coprime(max(1, round(GOLDEN * total)), total)
    return ((seed + i * step) % total for i in range(total))


def _is_empty(case: Case) -> bool:
    """Whether all its voxels are zero, where all is background either way."""
    return all(channel.minimum == channel.maximum == 0 for channel in case.channels)


def _coprime(step: int, total: int) -> int:
    while math.gcd(step, total) > 1:
        step += 1
    return step


def _piece(box: Box, counts: Vec3, number: int) -> Box:
    """Piece ``number``, in raster order, of a box cut into ``counts`` (z, y, x) pieces."""
    index = np.unravel_index(number, counts)
    spans = [(n * int(i) // c, n * (int(i) + 1) // c) for n, i, c in zip(box.shape, index, counts, strict=True)]
    return Box(vec3([a for a, _ in spans]), vec3([b for _, b in spans])).shift(box.start)


def load(path: Path) -> Agreement | None:
    """What was measured earlier, or None."""
    try:
        found = json.loads(path.read_text())
        boxes = tuple((str(name), vec3(start), vec3(stop)) for name, start, stop in found["boxes"])
        return Agreement(int(found["voxels"]), int(found["differ"]), boxes)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(agreement: Agreement, path: Path) -> None:
    """Keep it for whoever continues."""
    write_text(path, json.dumps(asdict(agreement), indent=1) + "\n")
