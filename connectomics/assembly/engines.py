"""The engines of a run: the one it was started with, and others like it that some volumes need; each is made once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from connectomics.assembly.batch import against_batch
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import make_engine
from connectomics.assembly.settings import InferenceSettings, NetworkSettings
from connectomics.volumes.volume import VolumeReader

log = logging.getLogger(__name__)


class Engines:
    """Makes engines that differ from the run's in how the networks are run.

    Parameters
    ----------
    first
        The run's.
    """

    def __init__(self, first: Engine) -> None:
        self.first = first
        self._made: list[tuple[InferenceSettings, Engine]] = [(first.inference, first)]

    def __iter__(self) -> Iterator[Engine]:
        """All there are by now."""
        return (engine for _, engine in self._made)

    def of(self, networks: NetworkSettings) -> Engine:
        """The engine whose networks are run so.

        Raises
        ------
        ConfigError, DeviceError
            If what the settings say is not available.
        """
        wanted = replace(self.first.inference, networks=networks)
        for known, engine in self._made:
            if known == wanted:
                return engine
        engine = make_engine(wanted)
        self._made.append((wanted, engine))
        return engine

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
