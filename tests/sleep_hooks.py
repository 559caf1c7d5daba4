"""What a forked child does to itself before it runs: it will stop at a moment, or be one of another machine.

``ForkServer.start`` calls ``prepare`` in the child; ``sleep_storm`` names what it is given.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(
    stops: list[dict[str, Any]] | None = None,
    host: str | None = None,
    traced: tuple[str, list[str]] | None = None,
    unit_bytes: int | None = None,
    call: tuple[str, str, int] | None = None,
    clock: str | None = None,
) -> None:
    """Change this process.

    Parameters
    ----------
    stops
        Moments at which it stops itself, see ``stop_at``.
    host
        Mark of the machine on which it is from now on.
    traced
        A file in which each call of some functions is noted by a line.
    unit_bytes
        Of what chunked formats write at once, so that levels of small volumes have several blocks.
    call
        A function of the C library, a text in the path that it is given, and the number of the call before which this
        process stops itself; needs ``shims/storm.c``.
    clock
        A file of an int64, the seconds by which this process's clock is wrong; needs ``shims/storm.c``.
    """
    if unit_bytes is not None:
        _write_small_units(unit_bytes)
    if host is not None:
        _replace("connectomics.core.process:host_mark", lambda original: lambda: host)
    for stop in stops or []:
        stop_at(**stop)
    if call is not None:
        function, text, number = call
        ctypes.CDLL(None).storm_stop(function.encode(), text.encode(), number)
    if clock is not None and ctypes.CDLL(None).storm_clock(clock.encode()) != 0:
        raise FileNotFoundError(clock)
    if traced is not None:
        file, functions = traced
        for at in functions:
            _trace(at, file)


def _trace(at: str, file: str) -> None:
    def tracing(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*given: Any, **named: Any) -> Any:
            with Path(file).open("a") as stream:
                stream.write(" ".join(f"{at}\t{(given, named)!r}".split("\n")) + "\n")
            return original(*given, **named)

        return call

    _replace(at, tracing)


def stop_at(at: str, number: int = 1, text: str = "", *, after: bool = False) -> None:
    """Stop this process when a function is called.

    Parameters
    ----------
    at
        ``module:function`` or ``module:Class.method``.
    number
        Of the call, from 1 on.
    text
        Calls without it in their arguments do not count.
    after
        Whether the function has done its work then.
    """
    count = 0

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += not text or text in repr((given, named))
            now = count == number and (not text or text in repr((given, named)))
            if now and not after:
                count += 1
                stop()
            result = original(*given, **named)
            if now and after:
                count += 1
                stop()
            return result

        return call

    _replace(at, stopping)


def stop() -> None:
    """Stop this process here: the thread that calls this does nothing more until it is continued."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _write_small_units(unit_bytes: int) -> None:
    from connectomics.stages.output.formats import n5, precomputed, zarr, zarr2
    from connectomics.stages.output.formats.contract import UNIT_BYTES

    for levels in (n5.N5Levels, precomputed.PrecomputedLevels, zarr.Zarr3Levels, zarr2.Zarr2Levels):
        given = levels.__init__.__defaults__ or ()
        levels.__init__.__defaults__ = tuple(unit_bytes if value == UNIT_BYTES else value for value in given)


def _replace(at: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function wherever the package has it, or a method of a class."""
    module_name, _, name = at.partition(":")
    module = importlib.import_module(module_name)
    if "." in name:
        owner_name, _, method = name.partition(".")
        owner = getattr(module, owner_name)
        setattr(owner, method, change(getattr(owner, method)))
        return
    original = getattr(module, name)
    changed = change(original)
    for other in [m for n, m in list(sys.modules.items()) if n.startswith("connectomics.")]:
        if vars(other).get(name) is original:
            setattr(other, name, changed)
