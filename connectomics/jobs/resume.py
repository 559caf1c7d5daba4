"""Unfinished work is continued in the numeric class it was begun in, where the configuration leaves that open."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from connectomics.assembly.engine.backends import as_begun
from connectomics.assembly.engine.engine import Engine
from connectomics.assembly.engines import Engines
from connectomics.assembly.memory import plan_volume
from connectomics.assembly.volumes import first_stage_of, outputs_of, run_folder, segmenter_of
from connectomics.core.errors import DeviceError, ResourceError
from connectomics.runs.volume import begun_class
from connectomics.volumes.listing import VolumeSource
from connectomics.volumes.volume import VolumeReader

log = logging.getLogger(__name__)


class ResumedEngines:
    """Finds the engine for each volume: this run's own where nobody has begun it, or one as an earlier run had."""

    def __init__(self, engine: Engine) -> None:
        self._engines = Engines(engine)
        self._first_stages = None if engine.previous is None else Engines(engine.previous)

    def engine(self, source: VolumeSource, reader: VolumeReader) -> Engine:
        """The engine that begins or continues a volume.

        With ``system.backend=auto`` the backend, without ``num_cpus`` the threads, and without ``sw_batch_size`` the
        batch are those in the ledger. Whatever else differs is left to the ledger, which refuses another numeric class.

        Raises
        ------
        DeviceError
            If the backend that began the volume is not available any more, or memory does not hold its batch, and
            mixing is not allowed.
        """
        first = self._engines.first
        like = self._like(self._engines, self._begun(first, source, reader), source, reader)
        if like is not None:
            return like
        engine = self._engines.suiting(reader)
        if self._first_stages is None:
            return engine
        begun = self._begun(first_stage_of(first, source), source, reader)
        like = self._like(self._first_stages, begun, source, reader)
        return engine if like is None else replace(engine, previous=like)

    @staticmethod
    def _begun(engine: Engine, source: VolumeSource, reader: VolumeReader) -> Mapping[str, object] | None:
        outputs = outputs_of(engine, source, reader)
        return begun_class(run_folder(engine.inference.outputs, source), outputs, engine.settings.program)

    def _like(
        self, engines: Engines, begun: Mapping[str, object] | None, source: VolumeSource, reader: VolumeReader
    ) -> Engine | None:
        """One that works in a numeric class as far as the configuration lets; None where it is to be chosen anew."""
        if begun is None:
            return None
        for engine in engines:
            if engine.settings.numeric_class == begun:
                return engine
        own = engines.first.inference.networks
        networks = as_begun(own, begun)
        if networks == own:
            return engines.first
        try:
            log.info("continuing with %s, as it was begun", dict(begun))
            engine = engines.of(networks)
            plan_volume(engine, segmenter_of(engine, reader.info.spacing), reader.info)
        except (DeviceError, ResourceError) as error:
            if engines.first.inference.call.allow_mixed:
                log.warning("%s: cannot be continued as it was begun: %s", source.name, error)
                return None
            raise DeviceError(
                f"{source.name}: was begun with {dict(begun)}, and that cannot be had now ({error}); make it available "
                "again, state system.allow_mixed_devices=true to go on without the promise of equal bytes, or remove "
                f"{run_folder(self._engines.first.inference.outputs, source)} to start this volume over"
            ) from error
        return engine
