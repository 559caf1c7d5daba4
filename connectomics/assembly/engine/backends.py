"""How the networks are run: backend, precision, threads and device, from the configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from connectomics.assembly.engine.budget import holds_batch
from connectomics.config.schema import Config
from connectomics.core.errors import ConfigError
from connectomics.core.geometry import Vec3
from connectomics.core.process import cpus
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import (
    AUTO,
    BackendRequest,
    ChosenBackends,
    ModelNetworks,
    choose,
    default_precision,
)
from connectomics.models.backends.contract import NumericClass
from connectomics.models.backends.probe import largest_fitting, try_batch
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.spec import ModelSpec
from connectomics.planning.profile import Profile, Trial, load_profile, profile_path

NNUNET_THREADS = 8  # nnU-Net's own upper bound of threads in a forward pass
REFERENCES = ("torch", "openvino")  # fast is held against its own float32, or where that is not listed the first's


def threads(config: Config) -> int:
    """CPU threads of a forward pass: what is stated, else this process's CPUs, at most nnU-Net's own 8."""
    stated = config.system.inference.num_cpus or config.system.num_cpus
    return stated or min(NNUNET_THREADS, cpus())


def device_name(config: Config) -> str:
    """The device the network runs on.

    Raises
    ------
    ConfigError
        If no GPU is allowed and one is asked for.
    """
    device = config.model.nnunet_device or config.system.device
    gpus = config.system.inference.num_gpus
    gpus = config.system.num_gpus if gpus is None else gpus
    if gpus == 0 and device == "auto":
        return "cpu"
    if gpus == 0 and device != "cpu":
        raise ConfigError(f"num_gpus=0 allows no GPU, but the device is '{device}'; set num_gpus=1 or device=cpu")
    if gpus == 1 and device == "cpu":
        raise ConfigError("num_gpus=1 asks for a GPU, but the device is 'cpu'; set system.device=cuda or num_gpus=0")
    return "cuda" if gpus == 1 and device == "auto" else device


def precision(config: Config) -> str:
    """``exact`` or ``fast``: what is stated, else fast on CUDA, as nnU-Net is, and exact elsewhere."""
    return config.inference.precision or default_precision(device_name(config))


def cache_folder(config: Config) -> Path | None:
    """Where compiled networks are kept: what is stated, else in the user's own cache; None where there is no home."""
    if config.system.cache_dir is not None:
        return Path(config.system.cache_dir)
    stated = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(stated) if Path(stated).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "connectomics"


def choose_backends(
    config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3], trials: Sequence[Trial] = ()
) -> ChosenBackends:
    """Backends of all networks, of one kind.

    Parameters
    ----------
    models, patches
        The models, and the windows (z, y, x) each is given.
    trials
        What was measured of the ways that the configuration leaves open, the fastest first.

    Raises
    ------
    ConfigError, DeviceError
        If device or backend are not available, with the reason.
    """
    backend, terms = config.system.backend, _terms(config)
    measured = [(t.backend, dataclasses.replace(terms, batch=t.batch, threads=t.threads)) for t in trials]
    if measured and backend != AUTO:
        (_, terms), measured = measured[0], []
    return choose(backend, terms, _networks(models, patches), Artefacts(cache_folder(config)), measured=measured)


def _measured(config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> list[Trial]:
    """What ``tune`` measured, where the configuration leaves anything open; batches as memory holds them."""
    batch, backend = config.inference.sliding_window.sw_batch_size, config.system.backend
    promised = (backend, precision(config)) == ("torch", "exact")  # to be equal to nnU-Net, which takes one at a time
    if backend != AUTO and (batch is not None or promised):
        return []
    profile = known_profile(config, [model.spec for model in models], patches)
    if profile is None:
        return []
    found = ways(config, profile)
    return [t for t in found if t.batch in (batch, 1) or holds_batch(config, models, patches, t.batch)]


def ways(config: Config, profile: Profile) -> tuple[Trial, ...]:
    """The trials that the configuration leaves open, the fastest first.

    With ``system.backend=auto`` the backend is open, and the threads unless they are stated; a null batch always is.
    """
    batch, backend = config.inference.sliding_window.sw_batch_size, config.system.backend
    if backend != AUTO:
        return profile.fastest(precision(config), batch, threads(config), backend)
    return profile.fastest(precision(config), batch, config.system.inference.num_cpus or config.system.num_cpus)


def known_profile(config: Config, specs: Sequence[ModelSpec], patches: Sequence[Vec3]) -> Profile | None:
    """What ``connectomics tune`` measured of these models on this machine, or None."""
    folder = cache_folder(config)
    return None if folder is None else load_profile(profile_path(folder, specs, patches, device_name(config)))


def trial_backends(
    config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3], trial: Trial
) -> ChosenBackends:
    """As ``choose_backends``, as a trial wants them.

    Raises
    ------
    DeviceError
        If they are not available, with the reason.
    """
    terms = BackendRequest(device_name(config), trial.precision, trial.batch, trial.threads)
    return choose(trial.backend, terms, _networks(models, patches), Artefacts(cache_folder(config)))


def reference_backends(
    config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3], fast: NumericClass
) -> ChosenBackends:
    """As ``choose_backends``, in float32: what a fast backend is held against."""
    terms = BackendRequest(device_name(config), "exact", fast.batch, fast.threads, low_memory=True)
    own = kind_of(fast.as_dict())
    name = own if own in REFERENCES else REFERENCES[0]
    return choose(name, terms, _networks(models, patches), Artefacts(cache_folder(config)))


@dataclasses.dataclass(frozen=True, slots=True)
class FittedBackends:
    """Backends whose whole batches fit the device: what the run uses, what fast is held against, and how it is run.

    ``config`` is the given one, with the batch that was chosen, or a smaller one where that does not fit.
    """

    config: Config
    chosen: ChosenBackends
    reference: ChosenBackends | None


def fitting_backends(config: Config, models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> FittedBackends:
    """``choose_backends`` and ``reference_backends``, with as many windows a batch as the device's memory holds.

    Raises
    ------
    ConfigError, DeviceError
        If device or backend are not available, with the reason.
    DeviceMemoryError
        If not even one window fits.
    """

    stated = config.inference.sliding_window.sw_batch_size
    measured = _measured(config, models, patches)
    first = measured[0].batch if measured else stated or 1

    def made(batch: int) -> FittedBackends:
        tried, trials = config, measured
        if batch != first:
            tried = with_batch(config, batch)
            trials = _measured(tried, models, patches)
        chosen = choose_backends(tried, models, patches, trials)
        own = chosen.backends[0][0].numeric_class
        tried, fast = with_batch(config, own.batch), own.precision == "fast"
        reference = reference_backends(tried, models, patches, own) if fast else None
        for each in (chosen, reference):
            for model, patch, row in zip(models, patches, each.backends if each is not None else (), strict=False):
                for backend in row:
                    try_batch(backend, model.spec.input_channels, patch)
        return FittedBackends(tried, chosen, reference)

    fitting, _ = largest_fitting(made, first)
    return fitting


def with_batch(config: Config, batch: int) -> Config:
    """The configuration with so many windows a forward pass stated."""
    window = dataclasses.replace(config.inference.sliding_window, sw_batch_size=batch)
    return dataclasses.replace(config, inference=dataclasses.replace(config.inference, sliding_window=window))


def _terms(config: Config) -> BackendRequest:
    batch = config.inference.sliding_window.sw_batch_size
    return BackendRequest(device_name(config), precision(config), batch or 1, threads(config))


def _networks(models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> list[ModelNetworks]:
    return [
        ModelNetworks(model.networks, model.spec.sha256, model.spec.input_channels, patch, let_go=model.networks.let_go)
        for model, patch in zip(models, patches, strict=True)
    ]


def as_begun(config: Config, begun: Mapping[str, object]) -> Config:
    """The configuration with what it leaves to the machine as in a numeric class: backend, threads and batch.

    A GPU's memory may have held fewer windows at once than are stated, and goes on with as many.
    """
    system, batch = config.system, int(str(begun["batch"]))
    stated = config.inference.sliding_window.sw_batch_size
    if stated is None or (str(begun["device"]).startswith("cuda") and batch < stated):
        config = with_batch(config, batch)
    if system.backend == AUTO:
        system = dataclasses.replace(system, backend=kind_of(begun))
    if system.num_cpus is None and system.inference.num_cpus is None:
        system = dataclasses.replace(system, num_cpus=int(str(begun["threads"])))
    return dataclasses.replace(config, system=system)


def kind_of(numeric_class: Mapping[str, object]) -> str:
    """Name of a numeric class's backend in the configuration, without the version."""
    return str(numeric_class["backend"]).partition(" ")[0]


def measured_as(numeric_class: Mapping[str, object]) -> tuple[str, str, int, int]:
    """Backend, precision, batch and threads of a numeric class, by which a profile knows what it measured."""
    precision, batch, threads = (str(numeric_class[name]) for name in ("precision", "batch", "threads"))
    return kind_of(numeric_class), precision, int(batch), int(threads)
