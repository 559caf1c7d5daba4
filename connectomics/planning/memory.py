"""What one block's work takes of memory, counted before the run; docs/memory.md has the table."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field

from connectomics.core.geometry import AxisOrder, Vec3, vec3
from connectomics.execution.stage import BEHIND_BYTES
from connectomics.inference.predictor import FINISHED_VALUES
from connectomics.stages.survey.section_reader import SLAB_BYTES

FLOAT_BYTES = 4
DOUBLE_BYTES = 8
HEAD_COPIES = 8  # of the logits handed out at once: probabilities, their powers and sums, the winner, what is stored
DEVICE_COPIES = 3  # of them on a device: their mean, what is added to it, those on their way to the host
WRITE_COPIES = 3  # of a block's outputs while they are written: themselves, encoded chunks, the shard made of them
WINDOW_COPIES = 4  # of a batch of windows and of its logits: stacked, filled up, mirrored, summed
RESAMPLED_MARGIN = 4  # network voxels that logits are made of beyond a block
SPLINE_BYTES = 96 << 20  # a tile of the network's grid with its surroundings in float64, some copies
LIBRARY_BYTES = 192 << 20  # what libraries take when they are first used, and memory that is freed but kept by malloc
SPARE = 1.1  # the allocator's waste
M_ARENA_MAX = -8  # of glibc's malloc.h


def share_freed_memory() -> None:
    """Let all threads of this process take memory from one arena, where the C library is glibc.

    With an arena for each thread that reads and writes chunks, what one has freed is kept from the others: a run of
    many blocks took 30 % more, and the peak grew from block to block (benchmarks/scale.py). Best called before threads
    are started; safe to repeat.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@dataclass(frozen=True, slots=True)
class NetworkWork:
    """What a model's networks are given and give, as far as it decides memory.

    Parameters
    ----------
    patch
        Window (z, y, x) in voxels, in the model's axes.
    classes, folds
        Output channels of each network, and networks whose logits are summed apart.
    channels
        Input channels.
    batch, window_bytes
        Windows of a forward pass, and what the network takes for each.
    """

    patch: Vec3
    classes: int
    folds: int
    channels: int
    batch: int = 1
    window_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """One model's work on blocks of one volume, as far as it decides memory; the ratio is in the model's axes.

    Parameters
    ----------
    network
        What the model's networks do.
    voxel_bytes, stored_bytes
        Bytes of a raw voxel, and those that a voxel takes in all outputs.
    mean_classes
        Classes whose probabilities several models average in memory; 0 for one model alone.
    ratio
        Voxels of the network's grid for one of the volume, along each axis; None without resampling.
    order
        The model's order of axes.
    whole
        Whether the engine cannot cut: a case's planes, or the whole volume, are predicted at once.
    on_device
        Whether accumulators, windows and the network are in a device's memory.
    """

    network: NetworkWork
    voxel_bytes: int
    stored_bytes: int
    mean_classes: int = 0
    ratio: tuple[float, float, float] | None = None
    order: AxisOrder = field(default_factory=AxisOrder)
    whole: bool = False
    on_device: bool = False

    @property
    def rolling(self) -> int:
        """The model's axis along which the accumulator rolls."""
        return 0 if self.network.patch[0] > 1 else 1

    def footprint(self, block: Vec3, extent: Vec3) -> Footprint:
        """Memory of a block (z, y, x) of a volume of ``extent``, both in the volume's axes."""
        stored = math.prod(block) * self.stored_bytes
        own = self.order.turn(block)
        grid, whole = self._on_grid(own), self._on_grid(self.order.turn(extent))
        near = stored + self._sweep_bytes(grid, whole) + math.prod(block) * self.mean_classes * FLOAT_BYTES
        near += HEAD_COPIES * FLOAT_BYTES * FINISHED_VALUES
        far = self._sums_bytes(grid) + self._window_bytes()
        if self.on_device:
            near += 2 * self._input_bytes() + 2 * FLOAT_BYTES * FINISHED_VALUES  # pinned buffers
            far += 2 * self._input_bytes() + DEVICE_COPIES * FLOAT_BYTES * FINISHED_VALUES
        if self.network.patch[0] == 1 and self.order.axes[0] != 0:
            near += SLAB_BYTES
        if self.ratio is not None:  # the block's logits, a plane of them brought back
            far += (math.prod(grid) * FLOAT_BYTES + 3 * own[1] * own[2] * DOUBLE_BYTES) * self.network.classes
            near += SPLINE_BYTES * self.network.channels
        host, device = (near, far) if self.on_device else (near + far, 0)
        written = stored * WRITE_COPIES
        host = max(host + min(written, BEHIND_BYTES * WRITE_COPIES), written)
        return Footprint(int(host * SPARE), int(device * SPARE))

    def _on_grid(self, shape: Vec3) -> Vec3:
        if self.ratio is None:
            return shape
        return vec3([math.ceil(n * r) + RESAMPLED_MARGIN for n, r in zip(shape, self.ratio, strict=True)])

    def _sums_bytes(self, block: Vec3) -> int:
        """Weighted sums of each fold, the weights, and one more that is being finished."""
        if self.whole:
            return math.prod(block) * 3 * self.network.classes * FLOAT_BYTES
        held = math.prod(self._rolled(block))
        return held * (self.network.folds * self.network.classes + 1) * FLOAT_BYTES

    def _sweep_bytes(self, block: Vec3, extent: Vec3) -> int:
        """Normalised rows with the windows' overhang, twice those read ahead, one channel more, and their raw voxels.

        Where the axes are turned there are two of these.
        """
        wide = (min(b + 2 * p, max(n, p)) for b, p, n in zip(block, self.network.patch, extent, strict=True))
        voxels = math.prod(self._rolled(vec3([*wide])))
        raw = self.network.channels * self.voxel_bytes * (1 if self.order.identity else 2)
        return voxels * ((3 * self.network.channels + 1) * FLOAT_BYTES + raw)

    def _rolled(self, shape: Vec3) -> Vec3:
        if self.whole:
            return shape if self.network.patch[0] > 1 else (1, *shape[1:])
        held = list(shape)
        held[self.rolling] = self.network.patch[self.rolling]
        if self.rolling == 1:
            held[0] = 1
        return vec3(held)

    def _input_bytes(self) -> int:
        return self.network.batch * self.network.channels * math.prod(self.network.patch) * FLOAT_BYTES

    def _window_bytes(self) -> int:
        copies = WINDOW_COPIES * (self.network.channels + self.network.classes) * FLOAT_BYTES
        if self.network.batch > 1:  # those of all folds are kept until the windows before are added
            copies += (self.network.folds - 1) * self.network.classes * FLOAT_BYTES
        return self.network.batch * (math.prod(self.network.patch) * copies + self.network.window_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of host memory, and of a device's."""

    host_bytes: int
    device_bytes: int


def largest_footprint(works: Sequence[Work], block: Vec3, extent: Vec3) -> Footprint:
    """The most that any model's work on a block takes."""
    each = [work.footprint(block, extent) for work in works]
    return Footprint(max(f.host_bytes for f in each), max(f.device_bytes for f in each))


@dataclass(frozen=True, slots=True)
class Budget:
    """What memory there is for a volume.

    Parameters
    ----------
    host_bytes
        All that the process may take.
    taken_bytes
        What is taken of it however the volume is cut: the program and the weights, the reader, kept masks and tables.
    passing_bytes
        What a stage that is not cut into blocks takes at its time: the survey, exports.
    device_bytes
        Free memory of the device beside the weights, None where the network runs on the host.
    input_chunk
        Shape (z, y, x) of what can only be decoded whole, for messages.
    """

    host_bytes: int
    taken_bytes: int = 0
    passing_bytes: int = 0
    device_bytes: int | None = None
    input_chunk: Vec3 | None = None

    def host_need(self, footprint: Footprint) -> int:
        """Host memory of the whole process with such blocks."""
        return self.taken_bytes + LIBRARY_BYTES + max(footprint.host_bytes, self.passing_bytes)

    def holds(self, footprint: Footprint) -> bool:
        """Whether such blocks fit."""
        fits = self.device_bytes is None or footprint.device_bytes <= self.device_bytes
        return fits and self.host_need(footprint) <= self.host_bytes
