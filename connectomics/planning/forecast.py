"""What a run of a volume will take: time with a range, memory, disk, reading; and the pace that time is judged by.

Plain values and their texts: ``forecast.volumes`` puts them together, ``connectomics plan`` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from connectomics.core.errors import ResourceError
from connectomics.core.geometry import Vec3
from connectomics.stages.output.size import OutputSize

UNCERTAIN = 0.2  # of every prediction, whatever the measurements say: machines are shared, caches cold
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
HOURS_ADVICE = (
    "set system.backend=auto (measured by connectomics tune) or inference.precision=fast, leave mirroring out with "
    "inference.test_time_augmentation.enabled=false, label a part with inference.roi or inference.mask, share the work "
    "among machines, or raise --max-hours"
)
GB_ADVICE = (
    "leave formats out of inference.output.formats, set inference.output.pyramid=false or "
    "inference.output.save_probabilities=false, or raise --max-gb"
)


@dataclass(frozen=True, slots=True)
class Timing:
    """A measured time: the median, and the least and largest of the measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Return the timing of some measurements, at least one.

        Examples
        --------
        >>> Timing.of([3.0, 1.0, 2.0])
        Timing(median=2.0, low=1.0, high=3.0)
        """
        ordered = sorted(values)
        return cls(ordered[len(ordered) // 2], ordered[0], ordered[-1])


@dataclass(frozen=True, slots=True)
class CostModel:
    """How fast an engine goes on this machine.

    Parameters
    ----------
    windows_s
        Of each member, all that a window takes: the network with its mirrored passes and folds, and the blending.
    sample_s
        Of each member, a window computed both ways while fast is compared with exact; 0 where it is not.
    voxel_s
        What a voxel takes outside the network: survey, reading, normalising, labels, writing, exports.
    fixed_s
        What a volume takes however small it is.
    basis
        Where the time of a window comes from, in words.
    survey_s
        The part of ``voxel_s`` that voxels which nobody wants take, too.
    """

    windows_s: tuple[Timing, ...]
    sample_s: tuple[float, ...]
    voxel_s: float
    fixed_s: float
    basis: str
    survey_s: float = 0.0

    def predict(
        self, windows: Sequence[float], sampled: Sequence[int], voxels: int, wanted: int | None = None
    ) -> Timing:
        """Time of a volume.

        Parameters
        ----------
        windows, sampled
            Of each member, those of all blocks, with what fills up their batches, and those of the sample on which fast
            is compared.
        voxels, wanted
            Of the volume, and of its blocks that hold wanted voxels; None for all.
        """
        unwanted = 0 if wanted is None else voxels - wanted
        outside = self.fixed_s + (voxels - unwanted) * self.voxel_s + unwanted * self.survey_s
        outside += sum(n * s for n, s in zip(sampled, self.sample_s, strict=True))
        low, middle, high = (
            outside + sum(n * t for n, t in zip(windows, each, strict=True))
            for each in zip(*((t.low, t.median, t.high) for t in self.windows_s), strict=True)
        )
        return Timing(middle, min(low, middle * (1 - UNCERTAIN)), max(high, middle * (1 + UNCERTAIN)))


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """One final output and its upper bounds."""

    path: Path
    format: str
    size: OutputSize


@dataclass(frozen=True, slots=True)
class PlannedWork:
    """Blocks with work and the shape (z, y, x) of their cores; windows of all members and their forward passes; voxels.

    ``read_voxels`` are read in the survey and by all blocks.
    """

    blocks: int
    block_shape: Vec3
    windows: int
    passes: int
    voxels: int
    read_voxels: int


@dataclass(frozen=True, slots=True)
class PlannedTime:
    """Time of one process, from opening to the last export, and where the time of a window comes from."""

    seconds: Timing
    basis: str


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """Peak memory of the process and of a device, and what the process may take."""

    host_bytes: int
    device_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one volume will take; no time where it was not asked for.

    ``scratch`` is what lies on the disk beside the outputs before the end, at most; ``backend`` the numeric class in
    words; ``notes`` say what is not counted.
    """

    name: str
    work: PlannedWork
    time: PlannedTime | None
    memory: PlannedMemory
    outputs: tuple[PlannedOutput, ...]
    scratch: OutputSize
    backend: str
    notes: tuple[str, ...] = ()

    @property
    def output(self) -> OutputSize:
        """All final outputs together."""
        return sum((output.size for output in self.outputs), OutputSize(0, 0))

    @property
    def read_amplification(self) -> float:
        """How often a voxel of the volume is read on average."""
        return self.work.read_voxels / self.work.voxels

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        seconds = None if self.time is None else asdict(self.time.seconds)
        return {
            "name": self.name,
            "blocks": self.work.blocks,
            "block_shape": list(self.work.block_shape),
            "windows": self.work.windows,
            "forward_passes": self.work.passes,
            "predicted_s": None if seconds is None else round(seconds["median"], 3),
            "low_s": None if seconds is None else round(seconds["low"], 3),
            "high_s": None if seconds is None else round(seconds["high"], 3),
            "host_bytes": self.memory.host_bytes,
            "device_bytes": self.memory.device_bytes,
            "budget_bytes": self.memory.budget_bytes,
            "outputs": [
                {"path": str(o.path), "format": o.format, "bytes": o.size.nbytes, "files": o.size.files}
                for o in self.outputs
            ],
            "output_bytes": self.output.nbytes,
            "output_files": self.output.files,
            "scratch_bytes": self.scratch.nbytes,
            "voxels": self.work.voxels,
            "read_amplification": round(self.read_amplification, 3),
            "backend": self.backend,
            "basis": "" if self.time is None else self.time.basis,
            "notes": list(self.notes),
        }

    def short(self) -> str:
        """One line for the log."""
        files, work = self.output.files, self.work
        time = "" if self.time is None else f"about {_range(self.time.seconds)} by {self.time.basis}, "
        return (
            f"{work.blocks} blocks of {work.block_shape} voxels, {work.windows} windows, {time}"
            f"memory {_gb(self.memory.host_bytes)}, output at most {_gb(self.output.nbytes)} in {files} files"
        )

    def lines(self) -> list[str]:
        """Return the text for the screen."""
        rows = [
            ("blocks", f"{self.work.blocks} of {self.work.block_shape} voxels at most"),
            ("windows", f"{self.work.windows}, {self.work.passes} forward passes; {self.backend}"),
        ]
        if self.time is not None:
            rows.append(("time", f"about {_range(self.time.seconds)}; a window's from {self.time.basis}"))
        memory = f"at most {_gb(self.memory.host_bytes)} of {_gb(self.memory.budget_bytes)}"
        if self.memory.device_bytes:
            memory += f", {_gb(self.memory.device_bytes)} of the device's"
        rows.append(("memory", memory))
        rows += [("output", f"{o.path}: at most {_gb(o.size.nbytes)}, {_files(o.size.files)}") for o in self.outputs]
        rows.append(("scratch", f"at most {_gb(self.scratch.nbytes)} more on the disk before the end"))
        rows.append(("reading", f"each voxel {self.read_amplification:.2f} times"))
        rows += [("not counted", note) for note in self.notes]
        return [self.name, *(f"  {what:12} {text}" for what, text in rows)]


def require_within(forecasts: Sequence[Forecast], max_hours: float | None, max_gb: float | None) -> None:
    """Refuse volumes that all together take more predicted time, or 10^9 bytes of final outputs, than is allowed.

    Raises
    ------
    ResourceError
        Saying what is found, what was allowed and what to change.
    """
    seconds = sum(f.time.seconds.median for f in forecasts if f.time is not None)
    if max_hours is not None and seconds > max_hours * HOUR_S:
        raise ResourceError(
            f"{len(forecasts)} volumes are predicted to take {seconds / HOUR_S:.3g} hours, --max-hours allows "
            f"{max_hours:g}; {HOURS_ADVICE}"
        )
    nbytes = sum(f.output.nbytes for f in forecasts)
    if max_gb is not None and nbytes > max_gb * 1e9:
        raise ResourceError(
            f"the outputs of {len(forecasts)} volumes can take {nbytes / 1e9:.3g} GB before compression, --max-gb "
            f"allows {max_gb:g}; {GB_ADVICE}"
        )


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Examples
    --------
    >>> duration(0.4), duration(75), duration(9000), duration(400_000)
    ('0.4 s', '75 s', '2.5 h', '4.6 days')
    """
    if seconds < 2 * MINUTE_S:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h" if seconds < 2 * DAY_S else f"{seconds / DAY_S:.1f} days"


def _range(seconds: Timing) -> str:
    return f"{duration(seconds.median)} ({duration(seconds.low)} to {duration(seconds.high)})"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
