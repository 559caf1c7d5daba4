"""Runs the command line in forked children of one process that has imported everything, and kills them on demand.

Each child is a real process that runs ``connectomics.cli.main``; forking saves the seconds that importing takes.
As a module: ``ForkServer``. As a script: the server itself, one JSON request a line on stdin, one answer on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NOBODY = 65534
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code or minus the signal that killed it, what it printed, how long it lived."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    touched: tuple[str, ...]  # the path of each file operation in the watched folder


class ForkServer:
    """A context manager around the server process.

    Parameters
    ----------
    model
        Loaded once in the parent so that children find everything imported.
    folder
        Where children's output is kept for a moment.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)

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
        """
        request = {
            "arguments": list(arguments),
            "folder": str(self._folder),
            "signal": int(number),
            "after_s": after_s,
            "watched": str(watched),
            "kill_at": kill_at or ("", 0),
            "file_limit_bytes": file_limit_bytes,
            "unprivileged": unprivileged and os.geteuid() == 0,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        out, err, touched = [(self._folder / name).read_text() for name in ("stdout", "stderr", "touched")]
        return Ended(answer["code"], out, err, answer["seconds"], tuple(touched.splitlines()))


def _child(request: dict[str, Any]) -> None:
    """Become a run of the command line; never returns."""
    folder = Path(request["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    touched = os.open(folder / "touched", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    (text, fatal), count = request["kill_at"], 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        path = str(arguments[0]) if event in FILE_EVENTS else ""
        if not path.startswith(request["watched"]):
            return
        os.write(touched, f"{path}\n".encode())
        count += text in path
        if count == fatal > 0:
            os.kill(os.getpid(), request["signal"])

    sys.addaudithook(hook)
    if request["file_limit_bytes"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit_bytes"], resource.RLIM_INFINITY))
    if request["unprivileged"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    from connectomics.cli import main

    code = 1
    try:
        code = main(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what a process would print, too
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is an exception
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _import_everything(model: Path) -> None:
    """Import what a run imports when it is needed; an unprivileged child may not read this Python's folders."""
    import encodings.ascii
    import encodings.latin_1
    import encodings.utf_8_sig  # noqa: F401

    import pyarrow.parquet  # noqa: F401
    from PIL import Image

    from connectomics import doctor, progress  # noqa: F401
    from connectomics.build.models import load
    from connectomics.config.load import load_config
    from connectomics.io import hdf5, images, phantom, tiff, zarr_volume  # noqa: F401
    from connectomics.lightning import decode  # noqa: F401

    Image.init()
    load(load_config(None, ["system.device=cpu"]), model)


def _serve(model: Path) -> None:
    _import_everything(model)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(request)
        deadline, status, ended = request["after_s"], 0, 0
        while deadline is not None and not ended:
            left = deadline - (time.perf_counter() - began)
            if left <= 0:
                os.kill(child, request["signal"])
                break
            time.sleep(min(left, 0.002))
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - began
        sys.stdout.write(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
