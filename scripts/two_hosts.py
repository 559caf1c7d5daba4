"""Share one run among hosts that see the folder late, or that look alike: ``python scripts/two_hosts.py``.

It proves that processes of several machines make the bytes of one process from one volume, also if one of them is
killed in the middle. A host is a process in namespaces of its own (``unshare``): all hosts are called the same, their
processes have the same number, and none can see whether another one's process lives. With ``mounts`` each host sees the
folder through a ``bindfs`` of its own, which remembers attributes, names and absent names for 3, 60 and 120 s; with
``namespaces`` two and three hosts see it at once. Both are done where neither is named.

Printed is a table: how each process ended, blocks that were recorded twice, seconds. The exit code is 1 if bytes
differ, if a process that was not killed did not end with 0, or if the one to be killed was not. It is 2 if this machine
cannot do it: it needs Linux, root and ``unshare``, and for mounts ``bindfs`` and /dev/fuse.

All of it takes about half an hour, a quarter with ``--at-once 4``, most of which is waiting: a host that is killed is
missed after ``system.stale_after_s``, which is three times the caches' seconds and 30, as ``connectomics doctor``
recommends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import connectomics

PACKAGE = Path(connectomics.__file__).parent
MODEL = PACKAGE / "example" / "phantom_mito_2d"
VOLUME = "phantom:16x256x256?seed=7&what=image"
SETTINGS = (
    "inference.block_shape=[1,128,128]",
    "inference.output.formats=[h5,zarr]",
    "inference.test_time_augmentation.enabled=false",
    "inference.postprocessing.binary.enabled=true",
    "inference.postprocessing.binary.remove_small_objects=6",
    "system.device=cpu",
    "system.num_cpus=1",
)
CACHES_S = (3, 60, 120)
QUICK_LIMIT_S = 2  # where all hosts see everything at once
HOST = 'mount --bind "$1" "$2" && hostname twin && shift 2 && exec "$@"'
UNSHARE = ("unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
KILLED = -9
DEADLINE_S = 3600.0
POLL_S = 0.2
BLOCKS = 64  # of the volume


@dataclass(frozen=True)
class Trial:
    """What is tried: how many hosts, which caches they have, when a silent one counts as gone, whether one is killed.

    Times are in seconds; without ``cache_s`` all hosts see everything at once.
    """

    hosts: int
    limit_s: int
    cache_s: int | None = None
    kill: bool = False

    @property
    def name(self) -> str:
        """What a folder for it may be called."""
        return f"{self.hosts}_hosts_{self.cache_s or 0}_s{'_killed' if self.kill else ''}"


@dataclass(frozen=True)
class Outcome:
    """How the processes ended, whether the finals are as they should be, and who recorded how many blocks.

    ``twice`` are blocks that were recorded more than once. What the processes printed is in ``printed``.
    """

    trial: Trial
    exits: tuple[int, ...]
    same: bool
    shares: tuple[int, ...]
    twice: int
    seconds: float
    printed: tuple[Path, ...] = field(repr=False, default=())

    @property
    def good(self) -> bool:
        """Whether the promise was kept."""
        first, *others = self.exits
        return self.same and not any(others) and first == (KILLED if self.trial.kill else 0)

    @property
    def row(self) -> str:
        """A line of the table."""
        trial = self.trial
        caches = "none" if trial.cache_s is None else f"{trial.cache_s} s"
        cells = [str(trial.hosts), caches, f"{trial.limit_s} s", "one" if trial.kill else "none"]
        cells += [", ".join(map(str, self.exits)), "same" if self.same else "DIFFER"]
        cells += ["+".join(map(str, self.shares)), str(self.twice), f"{self.seconds:.0f}"]
        return f"| {' | '.join(cells)} |"


HEAD = """\
| hosts | caches | `stale_after_s` | killed | exits | bytes | blocks of each | recorded twice | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def obstacle(*, mounts: bool) -> str | None:
    """Why this machine cannot do it, in a sentence; None where it can."""
    for name in ("unshare", "hostname", *(("bindfs", "fusermount") if mounts else ())):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no namespaces can be made here: {tried.stderr.strip()}"
    if mounts:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with mounted(Path(folder), 1, 1):
                    pass
            except subprocess.CalledProcessError as error:
                return f"bindfs cannot mount here: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def mounted(base: Path, count: int, cache_s: int) -> Iterator[list[Path]]:
    """``base/data`` seen through as many mounts of their own, each with caches for so many seconds."""
    data, views = base / "data", [base / f"view_{number}" for number in range(count)]
    options = ",".join(f"{kind}_timeout={cache_s}" for kind in ("attr", "entry", "negative"))
    with contextlib.ExitStack() as stack:
        for view in (data, *views):
            view.mkdir(exist_ok=True)
        for view in views:
            subprocess.run(["bindfs", "-o", options, data, view], check=True, capture_output=True, text=True)
            stack.callback(subprocess.run, ["fusermount", "-u", "-z", view], check=True)
        yield views


def try_it(trial: Trial, base: Path, reference: dict[str, bytes]) -> Outcome:
    """Run the command on all hosts of a trial at the same time, in a new folder below ``base``.

    One that is to be killed begins first; the others come when it has recorded a block.
    """
    folder = base / trial.name
    (folder / "data").mkdir(parents=True)
    (folder / "here").mkdir()
    seen = (
        contextlib.nullcontext([folder / "data"] * trial.hosts)
        if trial.cache_s is None
        else mounted(folder, trial.hosts, trial.cache_s)
    )
    began = time.monotonic()
    output = folder / "data" / "out"
    with seen as views:
        printed = tuple(folder / f"host_{number}.txt" for number in range(trial.hosts))
        hosts = list[subprocess.Popen[bytes]]()
        try:
            for view, path in zip(views, printed, strict=True):
                hosts.append(_started(trial, view, folder / "here", printed=path))
                while trial.kill and not any(recorded(output)[0]) and hosts[0].poll() is None:
                    time.sleep(POLL_S)  # the one that is to be killed must be at work
            exits = _ends(hosts, output, kill=trial.kill)
        finally:
            for host in hosts:
                host.kill()
                host.wait()
    seconds = time.monotonic() - began
    shares, twice = recorded(output)
    return Outcome(trial, exits, finals(output) == reference, shares, twice=twice, seconds=seconds, printed=printed)


def _started(trial: Trial, view: Path, here: Path, printed: Path) -> subprocess.Popen[bytes]:
    """Start the command on a host that sees ``view`` under the name ``here``."""
    words = command(here / "out", f"system.stale_after_s={trial.limit_s}")
    with printed.open("wb") as stream:
        return subprocess.Popen(
            [*UNSHARE, "sh", "-c", HOST, "sh", view, here, *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(),
        )


def _ends(hosts: Sequence[subprocess.Popen[bytes]], output: Path, *, kill: bool) -> tuple[int, ...]:
    """Exit codes, of those killed less than zero.

    The first host is killed when a third of the blocks are recorded and all hosts are here, or two thirds are recorded.
    """
    deadline = time.monotonic() + DEADLINE_S
    while any(host.poll() is None for host in hosts):
        if kill:
            here, done = len(list(output.glob("*.run/*/coordination/session-*.0"))), sum(recorded(output)[0])
            if 3 * done >= (1 if here >= len(hosts) else 2) * BLOCKS:
                hosts[0].kill()  # what it started goes with it
                kill = False
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return tuple(KILLED if host.returncode is None else host.returncode for host in hosts)


def command(output: Path, *more: str) -> list[str]:
    """The command that all hosts run."""
    words = ["--checkpoint", str(MODEL), f"inference.volume_mode.file_pattern='{VOLUME}'"]
    words += [f"inference.data.output_path='{output}'", *SETTINGS, *more]
    return [sys.executable, "-m", "connectomics.cli", "infer-volume", *words]


def environment() -> dict[str, str]:
    """Of the processes: one thread each, and the package that this script belongs to."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def finals(output: Path) -> dict[str, bytes]:
    """Every file under a final name, by its path in the output folder."""
    tops = [top for top in output.iterdir() if top.suffix != ".run" and not top.name.startswith(".")]
    files = (file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file())
    return {file.relative_to(output).as_posix(): file.read_bytes() for file in files}


def recorded(output: Path) -> tuple[tuple[int, ...], int]:
    """How many blocks of the network's stage each process recorded, and how many records are of blocks done before."""
    shares, blocks = list[int](), set[str]()
    for file in sorted(output.glob("*.run/*/ledger/*.jsonl")):
        lines = (json.loads(line) for line in file.read_bytes().split(b"\n")[1:-1])
        keys = [str(line["block"]) for line in lines if "void" not in line]
        shares.append(len(keys))
        blocks.update(keys)
    return tuple(shares), sum(shares) - len(blocks)


def reference_in(folder: Path) -> dict[str, bytes]:
    """The final files that one undisturbed process makes."""
    output = folder / "undisturbed"
    with (folder / "undisturbed.txt").open("wb") as stream:
        subprocess.run(command(output), check=True, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
    return finals(output)


def trials(what: str | None, caches_s: Sequence[int], limit_s: int | None = None) -> list[Trial]:
    """All that is tried; without a limit it is as short as it may be."""
    found = []
    if what in (None, "namespaces"):
        found += [Trial(hosts, limit_s or QUICK_LIMIT_S, kill=kill) for hosts in (2, 3) for kill in (False, True)]
    if what in (None, "mounts"):
        found += [Trial(2, limit_s or 3 * cache + 30, cache, kill=kill) for cache in caches_s for kill in (False, True)]
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Try what the words say, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("mounts", "namespaces"), help="one of the two; without it both")
    parser.add_argument("--caches", nargs="+", type=int, default=CACHES_S, metavar="S", help="seconds; 3 60 120")
    parser.add_argument("--limit", type=int, metavar="S", help="system.stale_after_s, also one that is too short")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="trials, most of which wait; 1")
    parser.add_argument("--folder", type=Path, help="work in a new folder there and keep it; else in a temporary one")
    given = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was begun ends first, nothing stays mounted
    why_not = obstacle(mounts=given.what != "namespaces")
    if why_not is not None:
        print(f"nothing was tried: {why_not}", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="two_hosts_", dir=given.folder))
    reference = reference_in(base)
    print(HEAD, flush=True)
    good = True
    with ThreadPoolExecutor(given.at_once) as pool:
        tried = trials(given.what, given.caches, given.limit)
        for outcome in pool.map(lambda trial: try_it(trial, base, reference), tried):
            print(outcome.row, flush=True)
            good = good and outcome.good
    if given.folder is None and good:
        shutil.rmtree(base)
    else:
        print(f"what was made and printed is in {base}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
