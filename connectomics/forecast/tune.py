"""``connectomics tune``: which backend, precision, batch and threads run a model fastest on this machine.

Every way is made, given the same windows of the user's volume, and timed turn by turn; what is found is kept as the
profile that runs and ``connectomics plan`` pick up for what the configuration leaves open.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from connectomics.assembly.engine.backends import holds_batch, trial_backends
from connectomics.assembly.engine.models import load_models
from connectomics.assembly.engine.rules import make_window
from connectomics.assembly.settings import NetworkSettings, VolumeSettings, resolve
from connectomics.assembly.volumes import named_sources, open_input
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError, DeviceError
from connectomics.core.features import PRECISIONS
from connectomics.core.geometry import AxisOrder, Box, Vec3, vec3
from connectomics.inference.case import CaseInput
from connectomics.models.backends.choice import ChosenBackends
from connectomics.models.backends.device import select_device
from connectomics.models.backends.precisions import EXACT, FAST
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.spec import ModelSpec
from connectomics.planning.profile import Profile, Trial, profile_path, save_profile
from connectomics.stages.survey.survey import survey
from connectomics.volumes.in_memory import ArrayVolume
from connectomics.volumes.volume import Array, VolumeReader

SAMPLED = 4  # windows of the volume
BATCH = 4  # that is tried beside the configured one and 1
MAKING_SHARE = 0.6  # of the time, in which backends are made; those that are not by then are left out
COMPILING_SHARE = 0.3  # the same of what compiles for a quarter of a minute
ROUNDS = 25  # at most
FEWEST_ROUNDS = 3
SINGLE_S = 2.0  # a window that takes longer is sampled once only
REFERENCE = ("torch", EXACT.name)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What was found, and where it is kept (None where there is no cache folder)."""

    profile: Profile
    path: Path | None


@dataclass(slots=True)
class _Running:
    """A trial whose backends are there."""

    trial: Trial
    chosen: ChosenBackends
    windows: list[Array]
    seconds: list[float]

    def once(self) -> list[torch.Tensor]:
        """Logits of the first fold of each model for one whole batch of each one's windows; time is kept."""
        batches = [
            torch.from_numpy(np.resize(w, (self.trial.batch, *w.shape[1:]))).to(row[0].device)
            for w, row in zip(self.windows, self.chosen.backends, strict=True)
        ]
        began = time.perf_counter()
        logits = [row[0].forward(batch) for row, batch in zip(self.chosen.backends, batches, strict=True)]
        if logits[0].device.type != "cpu":
            torch.cuda.synchronize(logits[0].device)
        self.seconds.append((time.perf_counter() - began) / self.trial.batch)
        return logits

    def labels(self) -> list[Array]:
        """Give the index of the largest logit of each model in the sample, window by window."""
        found = []
        for w, row in zip(self.windows, self.chosen.backends, strict=True):
            for i in range(0, len(w), self.trial.batch):
                part = torch.from_numpy(w[i : i + self.trial.batch]).to(row[0].device)
                logits = row[0].forward(part)
                found.append((logits.argmax(1) if logits.shape[1] > 1 else logits > 0).cpu().numpy())
        return found


def tune(config: Config, checkpoint: Path | None, volume: str, seconds: float, progress: Progress) -> TuneReport:
    """Measure all ways to run a model, and keep the result.

    Parameters
    ----------
    config, checkpoint
        ``sw_batch_size``, ``num_cpus`` and device as a run would have them, and the model.
    volume
        Where the sample windows are taken.
    seconds
        About how long it may take.
    progress
        Hears of ways made or measured: how many, of how many, which.

    Raises
    ------
    ConnectomicsError
        If the model or the volume cannot be read, or the profile cannot be written.
    """
    if seconds <= 0:
        raise ConfigError(f"--seconds is {seconds:g}, expected more than 0")
    began = time.perf_counter()
    stated = resolve(config, checkpoint)
    networks = stated.networks
    models = [model for _, model in load_models(stated.models)]
    patches = [make_window(stated.windows, None, model.spec).patch for model in models]
    windows = _sample(stated.volumes, models, patches, volume)
    planned = _candidates(networks, models, patches)
    total = len(planned) + 1
    running, trials, reference = list[_Running](), list[Trial](), list[Array]()
    for i, trial in enumerate(planned):
        progress(i, total, f"{trial.backend} {trial.precision}")
        share = COMPILING_SHARE if trial.backend == "compile" else MAKING_SHARE
        if reference and time.perf_counter() - began > share * seconds:
            trials.append(replace(trial, reason=f"not measured: --seconds {seconds:g} did not suffice"))
            continue
        if trial.reason:
            trials.append(trial)
            continue
        try:
            made = _Running(trial, trial_backends(networks, models, patches, trial), windows, [])
            if not reference:
                windows, reference = _reference(made)
            made.windows = windows
            differing = _share(made.labels(), reference)
        except (DeviceError, RuntimeError, MemoryError) as error:
            trials.append(replace(trial, reason=" ".join(str(error).split()) or type(error).__name__))
            continue
        made.trial = replace(trial, disagreement=differing)
        running.append(made)
        trials.append(made.trial)
    progress(total - 1, total, "measuring")
    _measure(running, began + seconds)
    profile = Profile(tuple(_timed(trial, running) for trial in trials))
    path = None
    if networks.cache is not None:
        path = profile_path(networks.cache, [model.spec for model in models], patches, networks.device)
        save_profile(path, profile, networks.device)
    progress(total, total, "done")
    return TuneReport(profile, path)


def _candidates(networks: NetworkSettings, models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> list[Trial]:
    """What is tried, PyTorch eager and exact as configured first, what takes long to make last."""
    batch, most = networks.batch or 1, networks.threads
    batches = dict.fromkeys((batch, 1, BATCH))
    on_cpu = select_device(networks.device).type == "cpu"
    kinds = [REFERENCE, ("torch", FAST.name)]
    if on_cpu:
        kinds = [REFERENCE, ("openvino", EXACT.name), ("openvino", FAST.name), ("torch", FAST.name)]
    ways = [(*kind, b, most) for b, kind in itertools.product(batches, kinds)]
    # two threads of one core, or of a core that others use, are often slower
    if networks.stated_threads is None and most > 1 and on_cpu:
        ways += [(*kind, batch, most // 2) for kind in kinds]
    ways += [("compile", precision, batch, most) for precision in PRECISIONS.names()]
    too_large = {b for b in batches if b > batch and not holds_batch(networks.budget_bytes, models, patches, b)}
    reason = "the batch does not fit half of system.memory_budget_gb"
    return [
        Trial(backend, precision, b, t, reason=reason if b in too_large else "") for backend, precision, b, t in ways
    ]


def _reference(made: _Running) -> tuple[list[Array], list[Array]]:
    """The windows that are compared, fewer where one takes long, and their labels by the reference."""
    made.once()
    if made.seconds[-1] > SINGLE_S:
        made.windows = [w[:1] for w in made.windows]
    made.seconds.clear()
    return made.windows, made.labels()


def _share(labels: Sequence[Array], reference: Sequence[Array]) -> float:
    """Return the share of the reference's labels that differ; batches may be cut otherwise."""
    ours, theirs = (np.concatenate([part.ravel() for part in parts]) for parts in (labels, reference))
    return float((ours != theirs).mean())


def _measure(running: Sequence[_Running], deadline: float) -> None:
    """Time all in turn until the time is over, each a few times at least."""
    for turn in range(ROUNDS):
        for made in running:
            if turn >= FEWEST_ROUNDS and time.perf_counter() > deadline:
                return
            made.once()


def _timed(trial: Trial, running: Sequence[_Running]) -> Trial:
    """A trial with what was measured; the first of all is the reference."""
    found = next((made for made in running if made.trial == trial), None)
    if found is None:
        return trial
    quick_s, window_s, slow_s = (float(s) for s in np.quantile(found.seconds, (0.1, 0.5, 0.9)))
    ratio = statistics.median(running[0].seconds) / window_s
    return replace(trial, window_s=window_s, ratio=ratio, quick_s=quick_s, slow_s=slow_s)


def _sample(stated: VolumeSettings, models: Sequence[LoadedModel], patches: Sequence[Vec3], volume: str) -> list[Array]:
    """Windows of each model from the volume, float32 [n, c, z, y, x], each normalised by itself."""
    (source,) = named_sources([volume], models[0].spec.channels)
    with contextlib.closing(open_input(stated, models[0].spec, source)) as reader:
        return [_windows(reader, model.spec, patch, source.name) for model, patch in zip(models, patches, strict=True)]


def _windows(reader: VolumeReader, spec: ModelSpec, patch: Vec3, name: str) -> Array:
    """Windows spread over the diagonal of the volume."""
    order, extent = AxisOrder(spec.axis_order), reader.info.extent
    shape = vec3([min(p, n) for p, n in zip(order.inverse.turn(patch), extent, strict=True)])
    found: Array = np.zeros((SAMPLED, spec.input_channels, *patch), np.float32)
    for i in range(SAMPLED):
        start = [(n - s) * (2 * i + 1) // (2 * SAMPLED) for n, s in zip(extent, shape, strict=True)]
        raw = reader.read(Box.of_shape(shape).shift(vec3(start))).transpose(order.of_array)
        part = ArrayVolume(np.ascontiguousarray(raw))
        (case,) = survey(part, name, spec.normalisations, by_slice=False)
        found[i, : spec.channels] = CaseInput(case, spec.normalisations, part.read).get(Box.of_shape(patch))
    return found


def table(tuned: TuneReport) -> list[str]:
    """The trials for the screen, the fastest of each precision first, then what could not be run and why."""
    trials = tuned.profile.trials
    lines = [
        f"{'backend':9} {'precision':9} {'batch':>5} {'threads':>7} {'windows/s':>10} {'ratio':>6} {'disagreement':>12}"
    ]
    measured = sorted((t for t in trials if t.window_s), key=lambda t: (t.precision, t.window_s or 0.0))
    for t in measured:
        assert t.window_s is not None
        lines.append(
            f"{t.backend:9} {t.precision:9} {t.batch:5} {t.threads:7} {1 / t.window_s:10.3g} {t.ratio or 0.0:6.2f} "
            f"{t.disagreement or 0.0:12.1e}"
        )
    failed = [t for t in trials if not t.window_s]
    lines += [f"{t.backend:9} {t.precision:9} {t.batch:5} {t.threads:7}  {t.reason}" for t in failed]
    return lines
