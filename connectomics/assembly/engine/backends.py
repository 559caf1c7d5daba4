"""How the networks are run: which backends, and with how many windows a pass, from what is stated and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from connectomics.assembly.settings import NetworkSettings
from connectomics.core.geometry import Vec3
from connectomics.models.backends.artefacts import Artefacts
from connectomics.models.backends.choice import AUTO, ChosenBackends, backend_kind, choose
from connectomics.models.backends.contract import BackendRequest, ModelNetworks
from connectomics.models.backends.precisions import EXACT, precision_named
from connectomics.models.backends.probe import largest_fitting, try_batch
from connectomics.models.backends.torch_eager import window_bytes
from connectomics.models.checkpoint import LoadedModel
from connectomics.models.spec import ModelSpec
from connectomics.planning.profile import Profile, Trial, load_profile, profile_path

BATCH_SHARE = 0.5  # of the budget, for the windows of a batch that is not stated


def holds_batch(budget_bytes: int, models: Sequence[LoadedModel], patches: Sequence[Vec3], batch: int) -> bool:
    """Whether the networks' work on so many windows (z, y, x) takes at most ``BATCH_SHARE`` of the budget."""
    need = max(window_bytes(model.skeleton, patch) for model, patch in zip(models, patches, strict=True))
    return batch * need <= budget_bytes * BATCH_SHARE


def _measured(networks: NetworkSettings, models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> list[Trial]:
    """What ``tune`` measured, where the configuration leaves anything open; batches as memory holds them."""
    batch, backend = networks.batch, networks.backend
    promised = (backend, networks.precision) == ("torch", EXACT)  # to be equal to nnU-Net, which takes one at a time
    if backend != AUTO and (batch is not None or promised):
        return []
    profile = known_profile(networks, [model.spec for model in models], patches)
    if profile is None:
        return []
    found = ways(networks, profile)
    return [t for t in found if t.batch in (batch, 1) or holds_batch(networks.budget_bytes, models, patches, t.batch)]


def ways(networks: NetworkSettings, profile: Profile) -> tuple[Trial, ...]:
    """The trials that the configuration leaves open, the fastest first.

    With ``system.backend=auto`` the backend is open, and the threads unless they are stated; a null batch always is.
    """
    batch, backend = networks.batch, networks.backend
    if backend != AUTO:
        return profile.fastest(networks.precision.name, batch, networks.threads, backend)
    return profile.fastest(networks.precision.name, batch, networks.stated_threads)


def known_profile(networks: NetworkSettings, specs: Sequence[ModelSpec], patches: Sequence[Vec3]) -> Profile | None:
    """What ``connectomics tune`` measured of these models on this machine, or None."""
    if networks.cache is None:
        return None
    return load_profile(profile_path(networks.cache, specs, patches, networks.device))


def trial_backends(
    networks: NetworkSettings, models: Sequence[LoadedModel], patches: Sequence[Vec3], trial: Trial
) -> ChosenBackends:
    """Backends of all networks as a trial wants them; DeviceError where they are not available, with the reason."""
    terms = BackendRequest(networks.device, precision_named(trial.precision), trial.batch, trial.threads)
    return choose(trial.backend, terms, _networks(models, patches), Artefacts(networks.cache))


@dataclasses.dataclass(frozen=True, slots=True)
class FittedBackends:
    """Backends whose whole batches fit the device: what the run uses, what fast is held against, and how it is run.

    ``batch`` is the one that was chosen, or a smaller one where that does not fit.
    """

    batch: int
    chosen: ChosenBackends
    reference: ChosenBackends | None


def fitting_backends(
    networks: NetworkSettings, models: Sequence[LoadedModel], patches: Sequence[Vec3]
) -> FittedBackends:
    """Backends of all networks, of one kind, with as many windows a batch as the device's memory holds.

    Each model is given windows of its patch (z, y, x).

    Raises
    ------
    ConfigError, DeviceError
        If device or backend are not available, with the reason.
    DeviceMemoryError
        If not even one window fits.
    """
    measured = _measured(networks, models, patches)
    first = measured[0].batch if measured else networks.batch or 1
    modules, artefacts = _networks(models, patches), Artefacts(networks.cache)

    def made(batch: int) -> FittedBackends:
        tried, trials = networks, measured
        if batch != first:
            tried = dataclasses.replace(networks, batch=batch)
            trials = _measured(tried, models, patches)
        terms = BackendRequest(tried.device, tried.precision, tried.batch or 1, tried.threads)
        open_ways = [(t.backend, dataclasses.replace(terms, batch=t.batch, threads=t.threads)) for t in trials]
        if open_ways and tried.backend != AUTO:
            (_, terms), open_ways = open_ways[0], []
        chosen, reference = choose(tried.backend, terms, modules, artefacts, measured=open_ways), None
        own = chosen.backends[0][0].numeric_class
        exact = precision_named(own.precision).reference
        if exact is not None:
            terms = BackendRequest(tried.device, exact, own.batch, own.threads, low_memory=True)
            reference = choose(backend_kind(kind_of(own.as_dict())).reference, terms, modules, artefacts)
        for each in (chosen, reference):
            for model, patch, row in zip(models, patches, each.backends if each is not None else (), strict=False):
                for backend in row:
                    try_batch(backend, model.spec.input_channels, patch)
        return FittedBackends(own.batch, chosen, reference)

    fitting, _ = largest_fitting(made, first)
    return fitting


def _networks(models: Sequence[LoadedModel], patches: Sequence[Vec3]) -> list[ModelNetworks]:
    return [
        ModelNetworks(model.networks, model.spec.sha256, model.spec.input_channels, patch, let_go=model.networks.let_go)
        for model, patch in zip(models, patches, strict=True)
    ]


def as_begun(networks: NetworkSettings, begun: Mapping[str, object]) -> NetworkSettings:
    """The settings with what they leave to the machine as in a numeric class: backend, threads and batch.

    A GPU's memory may have held fewer windows at once than are stated, and goes on with as many.
    """
    batch, backend = int(str(begun["batch"])), networks.backend
    fewer = str(begun["device"]).startswith("cuda") and networks.batch is not None and batch < networks.batch
    return dataclasses.replace(
        networks,
        batch=batch if networks.batch is None or fewer else networks.batch,
        backend=kind_of(begun) if backend == AUTO else backend,
        stated_threads=networks.stated_threads or int(str(begun["threads"])),
    )


def kind_of(numeric_class: Mapping[str, object]) -> str:
    """Name of a numeric class's backend in the configuration, without the version."""
    return str(numeric_class["backend"]).partition(" ")[0]


def measured_as(numeric_class: Mapping[str, object]) -> tuple[str, str, int, int]:
    """Backend, precision, batch and threads of a numeric class, by which a profile knows what it measured."""
    precision, batch, threads = (str(numeric_class[name]) for name in ("precision", "batch", "threads"))
    return kind_of(numeric_class), precision, int(batch), int(threads)
