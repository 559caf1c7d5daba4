"""SLURM for tests: stand-ins for what a job script calls, and a throw-away cluster on this host where there can be one.

The cluster's programs come from the packages slurm-wlm and munge; its launcher is a folder with ``slurm_up.sh``
(prints ``export SLURM_CONF=...``) and ``slurm_down.sh --purge``, named by CONNECTOMICS_SLURM_SANDBOX.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue")
START, STEP = "inference.volume_mode.start_index", "inference.volume_mode.step"
SHORT_S = 20.0
COMMAND_S = 30  # no SLURM command may hang for longer


def until(holds: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until ``holds()`` is true; fail, saying ``what`` was awaited, after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)


# In python's place: notes its path and words in one file a process, then ends with the exit code stated for its
# share, or waits for a signal, as connectomics does, and takes a moment to end.
PYTHON = f"""#!/bin/sh
for word in "$@"; do case $word in {START}=*) share=${{word#*=}};; esac; done
trap 'sleep 0.1; : > "$NOTES/gone.$$"; exit 138' USR1
trap 'sleep 0.1; : > "$NOTES/gone.$$"; exit 143' TERM
printf '%s\\n' "$0" "$@" > "$NOTES/part.$$" && mv "$NOTES/part.$$" "$NOTES/words.$share.$$"
eval "code=\\${{EXIT_$share:-0}}"
[ "$code" = wait ] || exit "$code"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$NOTES/scontrol"
exit "${SCONTROL_EXIT:-0}"
"""


def program(path: Path, text: str) -> Path:
    """Write a script that can be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder with stand-ins for python and scontrol, and the scripts copied away, as SLURM does."""

    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        base = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "NOTES": str(self.folder / "notes")}
        return base | {"CONNECTOMICS_PYTHON": str(self.folder / "bin" / "python")} | variables

    def start(self, script: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        copy = program(self.folder / "spool" / "job00012" / "slurm_script", script.read_text())
        environment = {k: v for k, v in self.environment(**variables).items() if v}
        return subprocess.Popen(
            ["bash", copy, *words],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: Path, *words: str, **variables: str) -> tuple[int, str]:
        """Exit code and stderr."""
        return self.end(self.start(script, *words, **variables))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        _, stderr = process.communicate(timeout=SHORT_S)
        return process.returncode, stderr

    def notes(self) -> list[list[str]]:
        """Path and words of every process so far, by share."""
        notes = sorted((self.folder / "notes").glob("words.*"), key=lambda p: int(p.name.split(".")[1]))
        return [p.read_text().splitlines() for p in notes]

    def words(self) -> list[list[str]]:
        """The words of every process so far, by share."""
        return [note[1:] for note in self.notes()]

    def stated(self) -> list[dict[str, str]]:
        """The key=value words of every process so far, by share."""
        return [dict(w.split("=", 1) for w in words if "=" in w) for words in self.words()]

    def scontrol(self) -> list[str]:
        path = self.folder / "notes" / "scontrol"
        return path.read_text().splitlines() if path.exists() else []

    def signalled(self, number: signal.Signals, script: Path, processes: int, **variables: str) -> tuple[int, str]:
        """Start ``script``, signal it once all of its processes wait, see it wait for them; exit code and stderr."""
        waiting = {f"EXIT_{i}": "wait" for i in range(processes)}
        process = self.start(script, **waiting | variables)
        until(lambda: len(self.words()) == processes, "the processes to start", SHORT_S)
        process.send_signal(number)
        process.wait(SHORT_S)
        assert len(list((self.folder / "notes").glob("gone.*"))) == processes
        return self.end(process)


def bench_in(folder: Path) -> Bench:
    """A bench in an empty folder."""
    program(folder / "bin" / "python", PYTHON)
    program(folder / "bin" / "scontrol", SCONTROL)
    (folder / "notes").mkdir()
    return Bench(folder)


def array(ids: list[int], task: int) -> dict[str, str]:
    """What SLURM 22.05 tells task ``task`` of an array (its STEP is 1 for a list of ids, so it is left out)."""
    return {
        "SLURM_JOB_ID": "81",
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(min(ids)),
        "SLURM_ARRAY_TASK_MAX": str(max(ids)),
        "SLURM_ARRAY_TASK_COUNT": str(len(ids)),
    }


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A running cluster; ``environment`` lets SLURM's commands find it."""

    environment: Mapping[str, str]

    def command(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a SLURM command and return what it prints."""
        ended = subprocess.run(
            words,
            env={**self.environment, **environment},
            cwd=cwd,
            timeout=COMMAND_S,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, f"{words[0]}: {ended.stderr}"
        return ended.stdout

    def submit(self, cwd: Path, *words: str, **environment: str) -> str:
        """Submit a job from ``cwd`` and return its number."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **environment).strip()

    def fact(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``, for example ExitCode or Restarts; ``job`` may be ``12_3``."""
        found = re.search(rf"\b{name}=(\S+)", self.command("scontrol", "show", "job", job))
        assert found, name
        return found[1]

    def wait(self, job: str, seconds: float) -> None:
        """Wait until a job and all its tasks have left the queue."""
        until(lambda: not self.command("squeue", "-h", "-j", job).strip(), f"job {job} to end", seconds)


@contextmanager
def slurm_sandbox() -> Iterator[Sandbox]:
    """A cluster of three nodes with two CPUs and two pretended GPUs each, gone when the context ends."""
    stated = os.environ.get("CONNECTOMICS_SLURM_SANDBOX")
    launcher = Path(stated) if stated else REPOSITORY.parent / "shared" / "infra"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no SLURM on this machine: {', '.join(missing)} missing (Debian: apt install slurm-wlm munge)")
    if not (launcher / "slurm_up.sh").is_file():
        pytest.skip(f"no slurm_up.sh in {launcher} (set CONNECTOMICS_SLURM_SANDBOX to its folder)")
    if os.geteuid() != 0:
        pytest.skip("the sandbox's daemons run jobs as root, so only root can start them")
    folder = tempfile.mkdtemp(prefix="slurm", dir="/tmp")  # socket paths are short
    port = 20000 + os.getpid() % 500 * 20
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environment |= {"SLURM_SANDBOX": folder, "SLURM_GPUS": "2", "SLURM_PORT": str(port)}
    try:
        up = subprocess.run(
            ["bash", launcher / "slurm_up.sh"],
            env=environment,
            timeout=120,
            stdout=subprocess.PIPE,
            text=True,
        )
        if up.returncode != 0:
            pytest.skip("the SLURM sandbox did not start; its reason stands above")
        configuration = up.stdout.strip().removeprefix("export SLURM_CONF=")
        yield Sandbox(environment | {"SLURM_CONF": configuration})
    finally:
        subprocess.run(["bash", launcher / "slurm_down.sh", "--purge"], env=environment, timeout=120, check=False)
