"""Runs the command line in forked children of one process that has imported everything, and kills them on demand.

Each child is a real process that runs ``connectomics.cli.main``; forking saves the seconds that importing takes.
As a module: ``ForkServer``. As a script: the server itself, one JSON request a line on stdin, one answer on stdout.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NOBODY = 65534
FILE_EVENTS = {
    "open": 0,
    "os.rename": 0,
    "os.remove": 0,
    "os.mkdir": 0,
    "shutil.rmtree": 0,
    "os.link": 1,
    "os.symlink": 1,
}
"""Of Python's audit events, and which of their arguments is the path; opening a folder, to flush it, is none."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code or minus the signal that killed it, what it printed, how long it lived.

    ``peak_bytes`` is the most memory that it had, with what it shares with the server.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    touched: tuple[str, ...]  # the path of each file operation in the watched folder


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the server process: one for all files that a worker of the tests runs; ``end`` ends it."""
    return _started({})


def _started(stated: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | stated,
    )


def end() -> None:
    """End the server process, if there is one."""
    if _server.cache_info().currsize:
        _server().communicate(timeout=60)
        _server.cache_clear()


class ForkServer:
    """A context manager around the server process, which outlives it: starting one takes seconds.

    Parameters
    ----------
    folder
        Where children's output is kept for a moment.
    preloaded
        A library that stands before the C library, see ``preloads``; the server is one of its own then, and ends with
        the context.
    """

    def __init__(self, folder: Path, preloaded: Path | None = None) -> None:
        self._folder = folder
        self._own = preloaded is not None
        self._process = _started({"LD_PRELOAD": str(preloaded)}) if self._own else _server()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the process to the next one, unless it is one of its own."""
        if self._own:
            self._process.communicate(timeout=60)

    def run(
        self,
        arguments: Sequence[str],
        *,
        number: int = signal.SIGKILL,
        after_s: float | None = None,
        watched: Path | None = None,
        kill_at: tuple[str, int] | None = None,
        file_limit_bytes: int | None = None,
        unprivileged: bool = False,
        memory_bytes: int | None = None,
        working_folder: Path | None = None,
    ) -> Ended:
        """Run the command line in a child.

        Parameters
        ----------
        arguments
            Of ``connectomics.cli.main``.
        number, after_s
            Signal, and when it is sent by the clock; None: never.
        watched
            Folder whose file operations (Python's own: open, rename, remove, make) are noted.
        kill_at
            The signal is sent before the n-th of them (from 1 on) whose path contains the text.
        file_limit_bytes
            No file may grow larger, as on a full disk.
        unprivileged
            As user "nobody", where this process may become that; root may read and write everything.
        memory_bytes
            How much more memory than the server holds already the child may ask for.
        working_folder
            Where the command is called.
        """
        request = self._request(arguments, watched) | {
            "signal": int(number),
            "after_s": after_s,
            "kill_at": kill_at or ("", 0),
            "file_limit_bytes": file_limit_bytes,
            "unprivileged": unprivileged and os.geteuid() == 0,
            "memory_bytes": memory_bytes,
            "working_folder": str(working_folder or Path.cwd()),
        }
        (ended,) = self._answers([request])
        return ended

    def run_code(self, code: str, *arguments: str) -> Ended:
        """Run Python code in a child, with ``sys.argv`` as ``python -c`` has it."""
        (ended,) = self._answers([self._request(arguments) | {"code": code}])
        return ended

    def run_together(
        self,
        arguments: Sequence[str],
        count: int,
        *,
        watched: Path,
        kill_first_at: tuple[str, int] | None = None,
        number: int = signal.SIGKILL,
    ) -> list[Ended]:
        """Run the command line in several children at once; the first may be killed, as in ``run``."""
        request = self._request(arguments, watched) | {"signal": int(number)}
        return self._answers([request | {"kill_at": kill_first_at or ("", 0)}, *[request] * (count - 1)])

    @staticmethod
    def _request(arguments: Sequence[str], watched: Path | None = None) -> dict[str, Any]:
        """What the server is asked for where nothing else is stated."""
        return {
            "arguments": list(arguments),
            "code": None,
            "signal": int(signal.SIGKILL),
            "after_s": None,
            "watched": str(watched),
            "kill_at": ("", 0),
            "file_limit_bytes": None,
            "unprivileged": False,
            "memory_bytes": None,
            "working_folder": str(Path.cwd()),
        }

    def start(
        self,
        arguments: Sequence[str],
        name: str,
        *,
        prepared: tuple[str, dict[str, Any]] | None = None,
        watched: Path | None = None,
        signal_at: tuple[int, str, int] | None = None,
        file_limit_bytes: int | None = None,
    ) -> Running:
        """Run the command line in a child that goes on while this process does other things.

        Parameters
        ----------
        arguments
            Of ``connectomics.cli.main``.
        name
            Of the child, under which its output is kept.
        prepared
            Module and arguments of its ``prepare``, which is called in the child first.
        watched, file_limit_bytes
            As of ``run``.
        signal_at
            A signal that the child sends to itself, and before which file operation, as ``kill_at`` of ``run``.
        """
        number, *place = signal_at or (signal.SIGKILL, "", 0)
        request = {
            "arguments": list(arguments),
            "signal": int(number),
            "after_s": None,
            "watched": str(watched),
            "kill_at": place,
            "file_limit_bytes": file_limit_bytes,
            "unprivileged": False,
            "memory_bytes": None,
            "working_folder": str(Path.cwd()),
            "prepared": prepared,
        }
        named = request | {"environment": os.environ | {"OMP_NUM_THREADS": "1"}, "output": str(self._folder / name)}
        return Running(self, self._told({"start": named}), Path(named["output"]))

    def states(self, children: Sequence[Running]) -> list[str | int]:
        """What children do now: ``running``, ``stopped``, or the exit code or minus the signal of one that ended."""
        states: list[str | int] = self._told({"poll": [child.pid for child in children]})
        return states

    def _answers(self, requests: list[dict[str, Any]]) -> list[Ended]:
        given = {"environment": os.environ | {"OMP_NUM_THREADS": "1"}}
        named = [request | given | {"output": str(self._folder / f"child{i}_")} for i, request in enumerate(requests)]
        answers = self._told({"run": named})
        ended = []
        for request, answer in zip(named, answers, strict=True):
            out, err, touched = (Path(request["output"] + name).read_text() for name in ("stdout", "stderr", "touched"))
            measured = (answer["seconds"], answer["peak_bytes"])
            ended.append(Ended(answer["code"], out, err, *measured, tuple(touched.splitlines())))
        return ended

    def _told(self, request: dict[str, Any]) -> Any:
        """What the server answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server has ended with {self._process.wait()}")
        return json.loads(line)


@dataclass(frozen=True)
class Running:
    """A child that was started, and where its output goes."""

    server: ForkServer
    pid: int
    output: Path

    @property
    def state(self) -> str | int:
        """What it does now, as ``states`` tells it."""
        return self.server.states([self])[0]

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if isinstance(self.state, str):
            os.kill(self.pid, number)

    def printed(self, stream: str = "stderr") -> str:
        """What it has printed to ``stdout`` or ``stderr``, or which paths it ``touched``."""
        return Path(f"{self.output}{stream}").read_text()


def _child(request: dict[str, Any]) -> None:
    """Become a run of the command line; never returns."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request["output"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    touched = os.open(request["output"] + "touched", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    (text, fatal), count = request["kill_at"], 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        path = str(arguments[FILE_EVENTS[event]]) if event in FILE_EVENTS else ""
        if not path.startswith(request["watched"]) or (event == "open" and Path(path).is_dir()):
            return
        os.write(touched, f"{path}\n".encode())
        count += text in path
        if count == fatal > 0:
            signal.pthread_kill(threading.get_ident(), request["signal"])  # this thread does nothing more

    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # that of the environment, as in any other process
    sys.addaudithook(hook)
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if Path(folder, "sitecustomize.py").is_file():
            runpy.run_path(str(Path(folder, "sitecustomize.py")))  # as a process does that is started so
    os.chdir(request["working_folder"])
    if request["memory_bytes"] is not None:
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + request["memory_bytes"],) * 2)
    if request["file_limit_bytes"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit_bytes"], resource.RLIM_INFINITY))
    if request["unprivileged"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    code = 1
    try:
        if request.get("prepared"):
            module, given = request["prepared"]
            importlib.import_module(module).prepare(**given)
        if request.get("code") is None:
            from connectomics.cli import main

            code = main(request["arguments"])
        else:
            sys.argv = ["-c", *request["arguments"]]
            exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})  # noqa: S102
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what a process would print, too
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is an exception
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _import_everything() -> None:
    """Import what a run imports when it is needed; an unprivileged child may not read this Python's folders."""
    import encodings.ascii
    import encodings.latin_1
    import encodings.utf_8_sig  # noqa: F401
    from importlib.resources import as_file, files

    import imagecodecs  # noqa: F401
    import pandas  # noqa: F401 - pyarrow looks for it when it makes a table
    import pyarrow.parquet  # noqa: F401
    from PIL import Image

    from connectomics.assembly.engine.models import load
    from connectomics.assembly.settings import model_settings
    from connectomics.cli import doctor, program, progress  # noqa: F401
    from connectomics.commands import decode  # noqa: F401
    from connectomics.config.load import load_config
    from connectomics.core.features import DECODING_STEPS
    from connectomics.lightning import inference  # noqa: F401
    from connectomics.volumes.formats import hdf5, images, tiff, zarr  # noqa: F401
    from connectomics.volumes.phantom import volume  # noqa: F401

    Image.init()
    for name in DECODING_STEPS.built_in:
        DECODING_STEPS.load(name)
    with as_file(files("connectomics") / "example" / "phantom_mito_2d") as model:
        config = load_config(None, ["system.device=cpu"])  # Hydra is imported for words only
        load(model_settings(config.model, config.data, model))


def _serve() -> None:
    """Answer requests: children that are run at once, one that is started, or what those that were started do."""
    _import_everything()
    gc.collect()
    gc.freeze()  # children share these objects and do not look at them
    states: dict[int, str | int] = {}
    for line in sys.stdin:
        ((verb, given),) = json.loads(line).items()
        if verb == "run":
            began = time.perf_counter()
            children = [(_forked(request), request) for request in given]
            answer: Any = [_awaited(child, request, began) for child, request in children]
        elif verb == "start":
            answer = _forked(given)
            states[answer] = "running"
        else:
            for child in given:
                _look(child, states)
            answer = [states[child] for child in given]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _look(child: int, states: dict[int, str | int]) -> None:
    """Take over what a child that was started does now."""
    while isinstance(states[child], str):
        found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if found == 0:
            return
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            states[child] = "stopped" if os.WIFSTOPPED(status) else "running"
        else:
            states[child] = os.waitstatus_to_exitcode(status)


def _forked(request: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        _child(request)
    return child


def _awaited(child: int, request: dict[str, Any], began: float) -> dict[str, Any]:
    """Wait for a child, which may be signalled by the clock; its exit code, seconds and memory."""
    deadline, ended = request["after_s"], False
    while deadline is not None and not ended:
        left = deadline - (time.perf_counter() - began)
        if left <= 0:
            os.kill(child, request["signal"])
            break
        time.sleep(min(left, 0.002))
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    _, status, used = os.wait4(child, 0)
    seconds = time.perf_counter() - began
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "peak_bytes": used.ru_maxrss * 1024}


if __name__ == "__main__":
    _serve()
