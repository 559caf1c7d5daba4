"""The survey in bands, blocks of tiles that all processes of a run share; each leaves one small file.

``survey`` takes the tallies from these files in raster order, so what it finds is what one pass alone finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.core.errors import QuarantineError, StorageError, VolumeError
from connectomics.core.files import make_folder
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Block, BlockGrid, Box, Vec3, vec3
from connectomics.execution.block_plan import BlockPlan
from connectomics.execution.ledger import Ledger
from connectomics.execution.run_folder import LEDGER
from connectomics.execution.runner import failure_message, is_kept
from connectomics.execution.stage import Workspace
from connectomics.inference.normalise import IntensityStats, is_exact
from connectomics.objects.arrays import load
from connectomics.stages.decode.tasks import BlockTask, block_file
from connectomics.stages.survey.tallies import CaseTally, SectionExtremes, TileTallies, rows
from connectomics.stages.survey.tiles import SurveyPass, tile_shape
from connectomics.volumes.volume import Array, VolumeInfo

STAGE = "survey"
LEAST_BYTES, MOST_BYTES = 256 << 20, 1 << 30  # raw voxels of a band: seconds of work; smaller volumes are one
FEW, MANY = 32, 1 << 14  # bands that a volume has where their bytes allow it; to stay under the latter they grow
SPLIT = 62  # bits of the lower half of a sum of squares, which may exceed int64
TALLIES = ("counts", "sums", "limits", "boxes", "inside")
PLANES = ("plane_counts", "plane_low", "plane_high")


def band_shape(info: VolumeInfo) -> Vec3:
    """Shape (z, y, x) of the bands: whole tiles, joined along x first, then y, then z, so that raster order holds.

    Examples
    --------
    >>> band_shape(VolumeInfo((1, 600, 4096, 4096), np.dtype(np.uint8), (1, 4096, 4096)))
    (18, 4096, 4096)
    >>> band_shape(VolumeInfo((1, 1, 40000, 40000), np.dtype(np.uint8), (1, 512, 512)))
    (1, 6656, 40000)
    """
    total, voxel_bytes = math.prod(info.extent), info.channels * info.dtype.itemsize
    wanted = min(max(total * voxel_bytes // FEW, LEAST_BYTES), MOST_BYTES) // voxel_bytes
    most = max(wanted, total // MANY)
    shape = list(tile_shape(info))
    for axis in (2, 1, 0):
        shape[axis] = min(info.extent[axis], shape[axis] * max(1, most // math.prod(shape)))
        if shape[axis] < info.extent[axis]:
            break
    return vec3(shape)


def part_shape(info: VolumeInfo) -> Vec3:
    """Shape (z, y, x) of the parts of a band of which sections are told apart: what merges in any order is one."""
    tile, band = tile_shape(info), band_shape(info)
    return (tile[0], *band[1:]) if is_exact(info.dtype) else tile


def band_bytes(info: VolumeInfo) -> int:
    """Most memory that the tallies of a band take, beside a row of tiles, until they are on the disk."""
    band, part = band_shape(info), part_shape(info)
    if band == info.extent:
        return 0
    sections = band[0] * math.prod(-(-b // p) for b, p in zip(band[1:], part[1:], strict=True))
    return 3 * sections * (56 + 48 * info.channels)


class _RefusedVolume(StorageError):
    """Carries a refusal past what tries blocks again and sets them aside: no other block helps a refused volume."""

    def __init__(self, refusal: VolumeError, block: Block) -> None:
        super().__init__(str(refusal))
        self.refusal, self.block = refusal, block


@dataclass(frozen=True, slots=True)
class Bands:
    """The bands of one pass over a volume.

    Parameters
    ----------
    look
        The pass.
    workspace
        Where their files and their ledger lie, and who does them.
    stage
        Name of the stage: of the folder of the files, and of the ledger ``ledger_STAGE``.
    """

    look: SurveyPass
    workspace: Workspace
    stage: str = STAGE

    @property
    def grid(self) -> BlockGrid:
        """The bands, in the volume's axes."""
        back, info = self.look.order.inverse, self.look.info
        return BlockGrid(back.turn(info.extent), back.turn(band_shape(info)))

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.workspace.work / self.stage

    def do(self) -> None:
        """Do all bands whose files are not there, together with all processes that do the same.

        Raises
        ------
        VolumeError
            If a band is refused, or cannot be read; what is done is kept.
        QuarantineError
            If a band failed in another way.
        """
        make_folder(self.folder)
        shape, work = self.grid.block_shape, self.workspace.work
        place, plan = work / f"{LEDGER}_{self.stage}", BlockPlan(shape, shape)
        with closing(Ledger(place, self._key(), {}, plan, volume=self.grid.volume)) as ledger:
            for name, record in ledger.named_records():
                if not is_kept(work, record, [self.stage], compared=True):
                    ledger.void(name, record.block)
            refusal = None
            try:
                blocks = self.workspace.run(BlockTask(self.grid, self.folder, self), ledger)
            except _RefusedVolume as refused:
                refusal = self._first(refused, ledger)
            if refusal is not None:  # raised here, so that its cause stays what it was
                raise refusal
            if blocks.failures:
                raise QuarantineError(failure_message(blocks.failures, blocks.planned, place))

    def _first(self, refused: _RefusedVolume, ledger: Ledger) -> VolumeError:
        """The refusal that one pass alone meets: bands before that are not done are looked at, whoever has them."""
        ledger.refresh()
        back, grid = self.look.order.inverse, self.grid
        for band in BlockGrid(self.look.info.extent, band_shape(self.look.info)):
            block = grid.block(back.turn(band.index))
            if block == refused.block:
                break
            try:
                if not ledger.is_done(block):
                    self(grid, block)
            except _RefusedVolume as earlier:
                return earlier.refusal
        return refused.refusal

    def __call__(self, grid: BlockGrid, block: Block) -> Mapping[str, Array]:
        """The arrays of a band: a row for each section of each of its parts."""
        core = self.look.order.turn_box(block.core)
        planes = self.look.planes(core)
        tiles = self.look.tiles(core, planes)
        try:
            parts = rows(tiles) if self.look.exact else (tallies for _, tallies in tiles)
            packed = [_packed(list(tallies)) for tallies in parts]
        except VolumeError as refusal:
            raise _RefusedVolume(refusal, block) from None
        arrays = {name: np.concatenate([part[name] for part in packed]) for name in TALLIES}
        if planes is not None:
            arrays |= zip(PLANES, (planes.nonzero, planes.low, planes.high), strict=True)
        return arrays

    def tiles(self, planes: SectionExtremes | None) -> Iterator[TileTallies]:
        """The tallies of all bands, which are done, in raster order; ``planes`` learn of each band.

        Raises
        ------
        LedgerError
            If a file was taken away.
        """
        info, back, grid = self.look.info, self.look.order.inverse, self.grid
        part = part_shape(info)
        for band in BlockGrid(info.extent, band_shape(info)):
            path = block_file(self.folder, grid.block(back.turn(band.index)))
            if planes is not None:
                counts, low, high = load(path, *PLANES)
                planes.merge(counts, low, high, band.core)
            arrays, first = load(path, *TALLIES), 0
            for block in BlockGrid(band.core.shape, part):
                last = first + block.core.shape[0]
                yield block.core.shift(band.core.start), _unpacked([a[first:last] for a in arrays], self.look.exact)
                first = last

    def _key(self) -> str:
        """What the files of the bands depend on beside the volume, which the work folder belongs to."""
        look = self.look
        facts: dict[str, object] = {"tile": list(tile_shape(look.info)), "band": list(band_shape(look.info))}
        facts |= {"order": list(look.order.axes), "planes": look.plane_axis, "clipped": list(look.clipped)}
        return key_of(facts)


def bands_of(look: SurveyPass, workspace: Workspace | None, stage: str) -> Bands | None:
    """The bands of a pass, None where they are not worth it: the volume is a single one, or there is no workspace."""
    if workspace is None or band_shape(look.info) == look.info.extent:
        return None
    return Bands(look, workspace, stage)


def _packed(tallies: list[CaseTally]) -> dict[str, Array]:
    """Tallies as arrays that lose nothing: a row each, in ``boxes`` six zeros where there is none."""
    boxes = [(0,) * 6 if t.box is None else (*t.box.start, *t.box.stop) for t in tallies]
    return {
        "counts": np.array([[s.nonzero for s in t.stats] for t in tallies], np.int64),
        "sums": np.array([[_sums(s) for s in t.stats] for t in tallies], np.int64 if tallies[0].exact else np.float64),
        "limits": np.array([[(s.minimum, s.maximum) for s in t.stats] for t in tallies], np.float64),
        "boxes": np.array(boxes, np.int64),
        "inside": np.array([t.inside for t in tallies], np.int64),
    }


def _sums(stats: IntensityStats) -> tuple[float, ...]:
    if not stats.exact:
        return (float(stats.first), float(stats.second))
    return (stats.first, *divmod(int(stats.second), 1 << SPLIT))


def _unpacked(arrays: list[Array], exact: bool) -> Iterator[CaseTally]:
    """The inverse of ``_packed``; arrays come in the order of ``TALLIES``."""
    for counts, sums, limits, box, inside in zip(*(array.tolist() for array in arrays), strict=True):
        stats = []
        for nonzero, (first, *rest), (low, high) in zip(counts, sums, limits, strict=True):
            second = (rest[0] << SPLIT) + rest[1] if exact else rest[0]
            stats.append(IntensityStats(nonzero, exact, first, second, minimum=low, maximum=high))
        there = box[3] > box[0]
        yield CaseTally(stats, Box(vec3(box[:3]), vec3(box[3:])) if there else None, inside)
