"""The engines of a run: the one it was started with, and others like it that some volumes need; each is made once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from connectomics.assembly.batch import against_batch
from connectomics.assembly.engine.backends import with_batch
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engine.make_engine import build_engine
from connectomics.config.schema import Config
from connectomics.volumes.volume import VolumeReader

log = logging.getLogger(__name__)


class Engines:
    """Makes engines from configurations that differ from the run's in how the networks are run.

    Parameters
    ----------
    config
        The configuration.
    first
        What it makes.
    """

    def __init__(self, config: Config, first: Engine) -> None:
        self.config = config
        self.first = first
        self._made: list[tuple[Config, Engine]] = [(config, first)]

    def __iter__(self) -> Iterator[Engine]:
        """All there are by now."""
        return (engine for _, engine in self._made)

    def of(self, config: Config) -> Engine:
        """The engine of a configuration.

        Raises
        ------
        ConfigError, DeviceError
            If what it states is not available.
        """
        for known, engine in self._made:
            if known == config:
                return engine
        engine = build_engine(config, self.first.models[0].checkpoint)
        self._made.append((config, engine))
        return engine

    def suiting(self, reader: VolumeReader) -> Engine:
        """The engine for a volume that nobody has begun: the first, or with one window a batch where that suits better.

        Raises
        ------
        ResourceError, VolumeError
            If the volume cannot be labelled with any.
        """
        if self.config.inference.sliding_window.sw_batch_size is not None:
            return self.first
        reason = against_batch(self.config, self.first, reader.info)
        if reason is None:
            return self.first
        log.info("1 window a forward pass, although connectomics tune measured more to be faster: %s", reason)
        return self.of(with_batch(self.config, 1))
