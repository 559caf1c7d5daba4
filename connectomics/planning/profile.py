"""What ``connectomics tune`` measured on this machine, for what a configuration leaves open; kept in the cache folder.

A profile belongs to models, patches and a machine, which name its file. It appears whole, and one that is damaged or of
another version counts as absent. It decides which backend of ``system.backend=auto`` comes first, and the batch.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from connectomics.core.errors import OutputError
from connectomics.core.features import BACKENDS, PRECISIONS
from connectomics.core.files import write_text
from connectomics.core.fingerprint import key_of
from connectomics.core.geometry import Vec3
from connectomics.core.process import cpus
from connectomics.models.backends.device import capability, select_device
from connectomics.models.backends.precisions import precision_named
from connectomics.models.spec import ModelSpec

log = logging.getLogger(__name__)
VERSION = 1
WORTH = 0.05  # of a window's time that a batch has to save


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to run the networks, and what was measured of it.

    Parameters
    ----------
    backend, precision, batch, threads
        As the configuration has them.
    window_s
        Seconds of a window in one forward pass of one fold of each model; None where it could not be run.
    ratio
        How many times faster than PyTorch, eager and exact, with the configured batch and threads.
    disagreement
        Share of the sample's labels, of plain logits, that differ from that.
    reason
        Why it could not be run, or was not measured.
    quick_s, slow_s
        As ``window_s``, which is the median: a tenth of the passes were quicker, a tenth slower.
    """

    backend: str
    precision: str
    batch: int
    threads: int
    window_s: float | None = None
    ratio: float | None = None
    disagreement: float | None = None
    reason: str = ""
    quick_s: float | None = None
    slow_s: float | None = None

    @property
    def eligible(self) -> bool:
        """Whether auto may take it."""
        if self.window_s is None or self.disagreement is None:
            return False
        return self.disagreement <= precision_named(self.precision).most_disagreement


@dataclass(frozen=True, slots=True)
class Profile:
    """All trials of one model on one machine, in the order they were planned."""

    trials: tuple[Trial, ...]

    def fastest(
        self, precision: str, batch: int | None, threads: int | None, backend: str | None = None
    ) -> tuple[Trial, ...]:
        """Eligible trials of a precision, the fastest first.

        Parameters
        ----------
        batch, threads, backend
            Those that are stated, or None where they may be chosen. Of batches that may be chosen, those that are not
            beyond doubt faster than 1 are left out, and all where 1 was not measured.
        """
        wanted = (batch, threads, backend)
        found = [
            t
            for t in self.trials
            if t.eligible
            and t.precision == precision
            and all(w in (None, own) for w, own in zip(wanted, (t.batch, t.threads, t.backend), strict=True))
        ]
        found.sort(key=_window_s)
        if batch is None:
            alone = [t for t in found if t.batch == 1]
            found = [t for t in found if alone and (t.batch == 1 or _surely_faster(t, alone[0]))]
        return tuple(found)

    def window_s(self, backend: str, precision: str, batch: int, threads: int) -> float | None:
        """Seconds of a window in one pass of one fold, where exactly this was measured."""
        wanted = (backend, precision, batch, threads)
        return next((t.window_s for t in self.trials if (t.backend, t.precision, t.batch, t.threads) == wanted), None)


def _window_s(trial: Trial) -> float:
    assert trial.window_s is not None
    return trial.window_s


def _surely_faster(trial: Trial, other: Trial) -> bool:
    """Whether a trial saves ``WORTH``, and nine in ten of its passes were quicker than nine in ten of the other's.

    Where others use the machine, one way measured twice seems 5 % faster in a third of all cases; by this rule in 5 %
    with three passes, and in none with nine (benchmarks/tune_noise.py).
    """
    if trial.slow_s is None or other.quick_s is None:
        return False
    return trial.slow_s < other.quick_s and _window_s(trial) <= (1 - WORTH) * _window_s(other)


def machine(device: str) -> dict[str, object]:
    """What of this machine decides speed: the processor's name, the CPUs of this process, the device."""
    return {"processor": _processor(), "cores": cpus(), "device": capability(select_device(device))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def profile_path(folder: Path, specs: Sequence[ModelSpec], patches: Sequence[Vec3], device: str) -> Path:
    """Where the profile of some models on this machine is kept."""
    models = [[spec.sha256, list(patch)] for spec, patch in zip(specs, patches, strict=True)]
    return folder / f"tune_{key_of({'models': models, 'machine': machine(device)})[:32]}.json"


def load_profile(path: Path) -> Profile | None:
    """What was measured, or None where nothing was or what stands there is damaged."""
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            return None
        trials = tuple(Trial(**fields) for fields in found["trials"])
        if not all(_sound(trial) for trial in trials):
            raise ValueError("a value is out of range")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: is damaged and not used (%s); run connectomics tune again", path, error)
        return None
    return Profile(trials)


def save_profile(path: Path, profile: Profile, device: str) -> None:
    """Keep it for later runs; OutputError if the disk refuses."""
    content = {"version": VERSION, "machine": machine(device), "trials": [asdict(t) for t in profile.trials]}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); set system.cache_dir to a folder that can"
        ) from error


def _sound(trial: Trial) -> bool:
    """Whether a trial can have been measured."""
    numbers = (trial.window_s, trial.ratio, trial.disagreement, trial.quick_s, trial.slow_s)
    return (
        trial.backend in BACKENDS
        and trial.precision in PRECISIONS
        and all(isinstance(n, int) and n >= 1 for n in (trial.batch, trial.threads))
        and all(n is None or (isinstance(n, float | int) and 0 <= n < float("inf")) for n in numbers)
    )
