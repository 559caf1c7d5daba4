"""The commands that look ahead, ``plan`` and ``tune``; their words are in ``arguments.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from connectomics.cli.exit import FAILED
from connectomics.cli.usage import named_run, overrides_of, say
from connectomics.core.errors import ConnectomicsError
from connectomics.core.text import visible

if TYPE_CHECKING:
    from connectomics.assembly.engine.engine import Engine
    from connectomics.forecast.tune import Progress
    from connectomics.volumes.listing import VolumeSource


def plan(words: argparse.Namespace) -> int:
    """Print what the volumes of an ``infer-volume`` call would take; the exit code."""
    config, checkpoint = named_run(words)
    from connectomics.assembly.engine.make_engine import build_engine
    from connectomics.assembly.volumes import named_sources, share_of, stated_volumes
    from connectomics.forecast.volumes import plan_volumes
    from connectomics.planning.forecast import require_within

    volumes = stated_volumes(config.inference.volume_mode)
    engine = build_engine(config, checkpoint)
    found = plan_volumes(engine, share_of(config.inference.volume_mode, named_sources(volumes, engine.spec.channels)))
    if words.json:
        say(json.dumps(found.as_dict(), indent=1))
    else:
        say("\n".join(found.lines()))
    require_within(found.forecasts, words.max_hours, words.max_gb)
    return FAILED if found.refused else 0


def check_limits(words: argparse.Namespace, engine: Engine, sources: Sequence[VolumeSource]) -> None:
    """Refuse volumes beyond ``--max-hours`` or ``--max-gb``, where these are stated, before the first is begun."""
    from connectomics.forecast.volumes import plan_volumes
    from connectomics.planning.forecast import require_within

    if words.max_hours is not None or words.max_gb is not None:
        require_within(plan_volumes(engine, sources).forecasts, words.max_hours, words.max_gb)


def tune(words: argparse.Namespace) -> int:
    """Measure, print a table and where the profile is; the exit code."""
    from connectomics.config.load import load_config

    config = load_config(words.config, overrides_of(words))
    from dataclasses import asdict

    from connectomics.forecast import tune as tuning

    with _progress() as progress:
        found = tuning.tune(config, words.model, words.volume, words.seconds, progress=progress)
    if words.json:
        path = None if found.path is None else str(found.path)
        say(json.dumps({"profile": path, "trials": [asdict(t) for t in found.profile.trials]}, indent=1))
    else:
        say("\n".join(tuning.table(found)))
        say("kept nowhere: there is no home; set system.cache_dir" if found.path is None else found.path)
    if not any(trial.window_s for trial in found.profile.trials):
        raise ConnectomicsError("no backend could be measured; the reasons stand above")
    return 0


@contextmanager
def _progress() -> Iterator[Progress]:
    """Draws how far it is, where there is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    with Bars(console=console, disable=not sys.stderr.isatty(), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=visible(what))

        yield show
