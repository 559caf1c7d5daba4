"""Unfinished work is continued in the numeric class it was begun in, where the configuration leaves that open."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from connectomics.build.backends import as_begun
from connectomics.build.engine import Engine
from connectomics.build.plan import plan_volume
from connectomics.build.volumes import first_stage_of, outputs_of, run_folder, segmenter_of
from connectomics.config.schema import Config
from connectomics.errors import DeviceError, ResourceError
from connectomics.io.listing import VolumeSource
from connectomics.io.volume import VolumeReader
from connectomics.lightning.engines import Engines
from connectomics.pipeline.run import begun_class

log = logging.getLogger(__name__)


class Continuation:
    """Finds the engine for each volume: the one there is, or one as an earlier run of that volume had.

    Parameters
    ----------
    config
        The configuration.
    engine
        What this run would choose; used for volumes that nobody has begun.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config = config
        self._engines = Engines(config, engine)

    def engine(self, source: VolumeSource, reader: VolumeReader) -> Engine:
        """The engine that begins or continues a volume.

        With ``system.backend=auto`` the backend, without ``num_cpus`` the threads, and without ``sw_batch_size`` the
        batch are those in the ledger. Whatever else differs is left to the ledger, which refuses another numeric class.

        Raises
        ------
        DeviceError
            If the backend that began the volume is not available any more and mixing is not allowed.
        """
        first = self._engines.first
        begun = self._begun(self._config, first, source, reader)
        if begun is not None:
            return self._like(begun, source, reader)
        if first.previous is None:
            return self._engines.suiting(reader)
        begun = self._begun(*first_stage_of(self._config, first, source), source, reader)
        return self._engines.suiting(reader) if begun is None else self._like(begun, source, reader, previous=True)

    @staticmethod
    def _begun(
        config: Config, engine: Engine, source: VolumeSource, reader: VolumeReader
    ) -> Mapping[str, object] | None:
        outputs = outputs_of(config, engine, source, reader)
        return begun_class(run_folder(config, source), outputs, engine.settings.program)

    def _like(
        self, begun: Mapping[str, object], source: VolumeSource, reader: VolumeReader, *, previous: bool = False
    ) -> Engine:
        """An engine that works in a numeric class, or whose previous stage does, as far as the configuration lets."""
        for engine in self._engines:
            stage = engine.previous if previous else engine
            if stage is not None and stage.settings.numeric_class == begun:
                return engine
        config = as_begun(self._config, begun)
        if config == self._config:
            return self._engines.first
        try:
            log.info("continuing with %s, as it was begun", dict(begun))
            engine = self._engines.of(config)
            plan_volume(config, engine, segmenter_of(config, engine, reader.info.spacing), reader.info)
        except (DeviceError, ResourceError) as error:
            if self._config.system.allow_mixed_devices:
                log.warning("%s: cannot be continued as it was begun: %s", source.name, error)
                return self._engines.suiting(reader)
            raise DeviceError(
                f"{source.name}: was begun with {dict(begun)}, and that cannot be had now ({error}); make it available "
                "again, state system.allow_mixed_devices=true to go on without the promise of equal bytes, or remove "
                f"{run_folder(self._config, source)} to start this volume over"
            ) from error
        return engine
