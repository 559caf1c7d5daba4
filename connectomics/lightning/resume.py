"""Unfinished work is continued in the numeric class it was begun in, where the configuration leaves that open."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from connectomics.build.backends import as_begun
from connectomics.build.engine import Engine, build_engine
from connectomics.build.volumes import first_stage_of, outputs_of, run_folder
from connectomics.config.schema import Config
from connectomics.errors import DeviceError
from connectomics.fingerprint import key_of
from connectomics.io.listing import VolumeSource
from connectomics.io.volume import VolumeReader
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
        self._engine = engine
        self._others: dict[str, Engine] = {}

    def engine(self, source: VolumeSource, reader: VolumeReader) -> Engine:
        """The engine that begins or continues a volume.

        With ``system.backend=auto`` the backend, and without ``num_cpus`` the threads, are those in the ledger.
        Whatever else differs is left to the ledger, which refuses another numeric class.

        Raises
        ------
        DeviceError
            If the backend that began the volume is not available any more and mixing is not allowed.
        """
        begun = self._begun(self._config, self._engine, source, reader)
        if begun is None and self._engine.previous is not None:
            begun = self._begun(*first_stage_of(self._config, self._engine, source), source, reader)
        if begun is None or begun == self._engine.settings.numeric_class:
            return self._engine
        config = as_begun(self._config, begun)
        if config == self._config:
            return self._engine
        try:
            return self._like(config, begun)
        except DeviceError as error:
            if self._config.system.allow_mixed_devices:
                log.warning("%s: cannot be continued as it was begun: %s", source.name, error)
                return self._engine
            raise DeviceError(
                f"{source.name}: was begun with {dict(begun)}, and that cannot be had now ({error}); make it available "
                "again, state system.allow_mixed_devices=true to go on without the promise of equal bytes, or remove "
                f"{run_folder(self._config, source)} to start this volume over"
            ) from error

    @staticmethod
    def _begun(
        config: Config, engine: Engine, source: VolumeSource, reader: VolumeReader
    ) -> Mapping[str, object] | None:
        outputs = outputs_of(config, engine, source, reader)
        return begun_class(run_folder(config, source), outputs, engine.settings.program)

    def _like(self, config: Config, begun: Mapping[str, object]) -> Engine:
        key = key_of(begun)
        if key not in self._others:
            log.info("continuing with %s, as it was begun", dict(begun))
            self._others[key] = build_engine(config, self._engine.models[0].checkpoint)
        return self._others[key]
