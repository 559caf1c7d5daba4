"""The engines of a run: the one it was started with, and others like it that some volumes need; each is made once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

from connectomics.assembly.engine.backends import known_profile, measured_as, ways
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import make_engine
from connectomics.assembly.memory import plan_volume
from connectomics.assembly.settings import NetworkSettings
from connectomics.assembly.volumes import segmenter_of
from connectomics.core.errors import ResourceError
from connectomics.core.geometry import Box
from connectomics.planning.profile import WORTH
from connectomics.planning.workload import Partition, batch_fill
from connectomics.volumes.volume import VolumeInfo, VolumeReader

log = logging.getLogger(__name__)
TOO_LARGE = "the memory budget has no room for more beside blocks of the same size"
PADDED = "the last batch of a block is not full, and here blocks have so few windows that too much of it stays empty"


class Engines:
    """Makes engines that differ from the run's, which is the first, in how the networks are run."""

    def __init__(self, first: Engine) -> None:
        self.first = first
        self._made = [first]

    def __iter__(self) -> Iterator[Engine]:
        """All there are by now."""
        return iter(self._made)

    def of(self, networks: NetworkSettings) -> Engine:
        """The engine whose networks are run so; ConfigError or DeviceError where that cannot be had."""
        wanted = replace(self.first.inference, networks=networks)
        for engine in self._made:
            if engine.inference == wanted:
                return engine
        self._made.append(make_engine(wanted))
        return self._made[-1]

    def suiting(self, reader: VolumeReader) -> Engine:
        """The engine for a volume that nobody has begun: the first, or with one window a batch where that suits better.

        Raises
        ------
        ResourceError, VolumeError
            If the volume cannot be labelled with any.
        """
        if self.first.inference.networks.batch is not None:
            return self.first
        reason = against_batch(self.first, reader.info)
        if reason is None:
            return self.first
        log.info("1 window a forward pass, although connectomics tune measured more to be faster: %s", reason)
        return self.of(replace(self.first.inference.networks, batch=1))


def against_batch(engine: Engine, info: VolumeInfo) -> str | None:
    """Why a volume is better labelled a window at a time, or None where the batch of the engine, not stated, is faster.

    Raises
    ------
    ResourceError
        If the memory budget cannot hold the smallest blocks and one window.
    VolumeError
        If the volume's spacing is needed and not known.
    """
    if engine.previous is not None and (found := against_batch(engine.previous, info)) is not None:
        return found
    if all(model.window.batch == 1 for model in engine.models):
        return None
    segmenter = segmenter_of(engine, info.spacing)
    single = replace(engine, models=tuple(replace(m, window=replace(m.window, batch=1)) for m in engine.models))
    plan, _ = plan_volume(single, segmenter, info)
    try:
        if plan_volume(engine, segmenter, info)[0] != plan:
            return TOO_LARGE
    except ResourceError:
        return TOO_LARGE
    partition = Partition(info.extent, plan.block_shape, Box.of_shape(info.extent))
    whole = engine.inference.windows.whole
    pairs = zip(segmenter.members, engine.of_members, strict=True)
    fill = min(batch_fill(member, model.window, partition, whole=whole) for member, model in pairs)
    return None if _share(engine) / fill <= 1 - WORTH else PADDED


def _share(engine: Engine) -> float:
    """Time of a window in the engine's batches as a share of the least one alone takes; infinite where not measured."""
    networks = engine.inference.networks
    profile = known_profile(networks, engine.specs, [model.window.patch for model in engine.models])
    if profile is None:
        return math.inf
    together = profile.window_s(*measured_as(engine.settings.numeric_class))
    alone = ways(replace(networks, batch=1), profile)
    if together is None or not alone or not alone[0].window_s:
        return math.inf
    return together / alone[0].window_s
