"""Put one fault after the other into a copy of the package, and see that the short tests find each: ``make faults``.

The faults stand in ``seeded_faults.toml``: what is replaced in which file, and the tests of the short form that must
turn red. All these tests are run once without a fault first, and must be green.

Exit codes: 0 all found; 1 a fault survived, or the tests are red without any; 2 the table does not fit the package, or
a run ended in a way that says nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("seeded_faults.toml")
SHORT = ("-x", "-q", "-n", "0", "-m", "not long", "-p", "no:cacheprovider", "--timeout", "200")
GREEN, RED = 0, 1
LONGEST_S = 900.0
FIRST_RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class CannotTellError(Exception):
    """The table does not fit the package, or pytest ended in a way that is neither green nor red."""


class RedWithoutFaultError(Exception):
    """A test is red although nothing is wrong; the end of what pytest printed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake somebody could make.

    Parameters
    ----------
    name
        What goes wrong.
    file
        Path in the repository.
    text, faulty
        What stands there once, and what is put there instead.
    tests
        Files or ids of tests that find it.
    """

    name: str
    file: str
    text: str
    faulty: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How tests ended: pytest's exit code, the first test that failed, seconds, what was printed."""

    code: int
    first_red: str
    seconds: float
    output: str


def read_faults(table: Path = TABLE) -> list[Fault]:
    """Read the table of faults."""
    with table.open("rb") as stream:
        rows = tomllib.load(stream)["fault"]
    return [Fault(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def problems(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """Say where the table does not fit the files below ``root``."""
    names = [fault.name for fault in faults]
    found = [f"{name}: stands twice in the table" for name in sorted({n for n in names if names.count(n) > 1})]
    for fault in faults:
        path = root / fault.file
        if not path.is_file():
            found.append(f"{fault.name}: there is no {fault.file}")
            continue
        source = path.read_text()
        if source.count(fault.text) != 1:
            found.append(f"{fault.name}: its text stands {source.count(fault.text)} times in {fault.file}, not once")
        elif fault.text == fault.faulty:
            found.append(f"{fault.name}: changes nothing")
        elif (broken := _broken(source.replace(fault.text, fault.faulty))) is not None:
            found.append(f"{fault.name}: {fault.file} is no Python any more ({broken})")
        files = [test.partition("::")[0] for test in fault.tests]
        found += [f"{fault.name}: there is no {file}" for file in files if not (root / file).is_file()]
        if not fault.tests:
            found.append(f"{fault.name}: names no tests")
    return found


def _broken(source: str) -> str | None:
    try:
        ast.parse(source)
    except SyntaxError as error:
        return str(error)
    return None


def copy_tracked(target: Path) -> None:
    """Copy the files that git tracks, as they stand here now, to a new folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def environment(tree: Path) -> dict[str, str]:
    """Return the variables under which ``tree`` is the package that all processes import."""
    shared = os.environ.get("CONNECTOMICS_SHARED_DATA") or str(ROOT.parent / "shared" / "data")
    changed = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changed, "CONNECTOMICS_SHARED_DATA": shared}


def run_tests(tree: Path, tests: Sequence[str]) -> Verdict:
    """Run tests in a copy of the repository, up to the first that fails.

    Raises
    ------
    CannotTellError
        If pytest ends neither green nor red.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *SHORT, *tests],
        cwd=tree,
        env=environment(tree),
        timeout=LONGEST_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode not in (GREEN, RED):
        raise CannotTellError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    red = FIRST_RED.search(done.stdout)
    return Verdict(done.returncode, red[1] if red else "", time.perf_counter() - began, done.stdout)


def require_own_package(tree: Path) -> None:
    """Make sure that tests in ``tree`` import the package that lies there.

    Raises
    ------
    CannotTellError
        If they import another.
    """
    words = [sys.executable, "-c", "import connectomics; print(connectomics.__file__)"]
    found = subprocess.run(words, cwd=tree, env=environment(tree), check=True, capture_output=True, text=True).stdout
    if not Path(found.strip()).is_relative_to(tree.resolve()):
        raise CannotTellError(f"tests in {tree} import {found.strip()}")


@contextmanager
def seeded(tree: Path, fault: Fault) -> Iterator[None]:
    """While open, the fault stands in ``tree``."""
    path = tree / fault.file
    source = path.read_text()
    if source.count(fault.text) != 1:
        raise CannotTellError(f"{fault.name}: its text does not stand once in {fault.file}")
    _write(path, source.replace(fault.text, fault.faulty))
    try:
        yield
    finally:
        _write(path, source)


def _write(path: Path, source: str) -> None:
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()  # one of the same second and length would be taken for up to date


def judge(faults: Sequence[Fault], jobs: int) -> list[str]:
    """Try each fault, ``jobs`` at a time, each in a copy of its own; print a line for each.

    Returns
    -------
    survived
        Names of those that no test found.

    Raises
    ------
    RedWithoutFaultError
        If a test is red without any fault, so that it tells nothing.
    """
    with tempfile.TemporaryDirectory(prefix="seeded_faults_") as folder:
        Path(folder).chmod(0o755)  # some tests give up their rights and import what lies there
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            tree = Path(folder, f"copy_{i}")
            copy_tracked(tree)
            require_own_package(tree)
            trees.put(tree)
        every = sorted({test for fault in faults for test in fault.tests})
        clean = run_tests(tree, every)
        print(
            f"{'without a fault':<46} {'green' if clean.code == GREEN else 'RED':<72} {clean.seconds:6.1f} s",
            flush=True,
        )
        if clean.code == RED:
            raise RedWithoutFaultError(clean.output[-3000:])

        def tried(fault: Fault) -> bool:
            tree = trees.get()
            try:
                with seeded(tree, fault):
                    verdict = run_tests(tree, fault.tests)
            finally:
                trees.put(tree)
            found = verdict.first_red.removeprefix("tests/") if verdict.code == RED else "SURVIVED"
            print(f"{fault.name:<46} {found:<72.72} {verdict.seconds:6.1f} s", flush=True)
            return verdict.code == RED

        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(tried, faults))
    return [fault.name for fault, red in zip(faults, found, strict=True) if not red]


def chosen(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """Return the faults of these names, all where there are none.

    Raises
    ------
    CannotTellError
        If there is no such fault.
    """
    unknown = sorted(set(names) - {fault.name for fault in faults})
    if unknown:
        raise CannotTellError(f"no fault is called {', '.join(unknown)}; see --list")
    return [fault for fault in faults if not names or fault.name in names]


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="print names and files, run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    arguments = parser.parse_args(words)
    try:
        faults = read_faults()
        if wrong := problems(faults):
            raise CannotTellError("\n".join(wrong))
        faults = chosen(faults, arguments.only)
        if arguments.list:
            for fault in faults:
                print(f"{fault.name:<46} {fault.file}")
            return 0
        survived = judge(faults, max(1, arguments.jobs))
    except RedWithoutFaultError as error:
        print(f"{error}\nthese tests are red without a fault, so they cannot tell one")
        return 1
    except (CannotTellError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(faults) - len(survived)} of {len(faults)} faults were found")
    if survived:
        print(f"not found: {', '.join(survived)}")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
