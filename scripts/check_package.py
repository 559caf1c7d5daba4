"""Build wheel and sdist, install them where there is nothing else, and do what a user would: ``make package-test``.

It takes some minutes, since torch and nnU-Net are installed anew; everything is in a temporary folder.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "connectomics"
DATA = ("connectomics/py.typed", "connectomics/example/")
PUBLIC = (
    "import connectomics; from connectomics import open_volume, Box, ConnectomicsError; print(connectomics.__file__)"
)
OPEN_MRC = """
import sys, numpy, mrcfile
with mrcfile.new("cell.mrc", numpy.arange(24, dtype=numpy.int8).reshape(2, 3, 4)): pass
from connectomics import Box, open_volume
assert open_volume("cell.mrc").read(Box.of_shape((2, 3, 4))).sum() == 276
"""


class Failure(Exception):
    """Something is not as a user needs it."""


class Place:
    """A virtual environment with nothing in it, and an empty folder to work in."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.bin = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        self.folder = folder / "elsewhere"
        self.folder.mkdir()
        venv.create(folder / "environment", with_pip=True)
        links = f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip()
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        self.environment = kept | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PIP_FIND_LINKS": links}

    def run(self, command: str, *, codes: tuple[int, ...] = (0,)) -> str:
        """Run a line of the shell as a user of the environment would; its outputs."""
        print(f"$ {command}", flush=True)
        ended = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if ended.returncode not in codes:
            raise Failure(f"exit code {ended.returncode} of {command}\n{ended.stdout}")
        return ended.stdout


def expected_data() -> set[str]:
    """Return the names of the files beside the code that belong to the package."""
    found = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {name for path in found if (name := path.relative_to(REPOSITORY).as_posix()).startswith(DATA)}


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist of the checkout, and the wheel from the sdist alone."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)], check=True, stdout=subprocess.DEVNULL
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_files(wheel: Path, sdist: Path) -> None:
    """Compare what is in both with the checkout: all code and data, and nothing beside the package in the wheel."""
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = expected_data() | {path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py")}
    for what, found in ((wheel.name, in_wheel), (sdist.name, in_sdist)):
        if missing := wanted - found:
            raise Failure(f"{what} lacks {', '.join(sorted(missing)[:5])}")
    if foreign := {name for name in in_wheel if not name.startswith(("connectomics/", "connectomics_nnunet-"))}:
        raise Failure(f"{wheel.name} holds {', '.join(sorted(foreign)[:5])}")
    print(f"{wheel.name} and {sdist.name}: {len(wanted)} files of code and data in both")


def namesake(folder: Path) -> Path:
    """Write a wheel of another package that is called connectomics and imported so."""
    files = {
        "connectomics/__init__.py": '"""Another package."""\n',
        "connectomics-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: connectomics\nVersion: 9.9\n",
        "connectomics-9.9.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "connectomics-9.9.dist-info/RECORD"
    lines = [f"{name},sha256={_digest(text)},{len(text)}" for name, text in files.items()]
    path = folder / "connectomics-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name, text in (files | {record: "\n".join([*lines, f"{record},,"]) + "\n"}).items():
            opened.writestr(name, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def check_use(place: Place, output: str) -> None:
    """Import, type marker, demo and doctor, outside the checkout."""
    imported = Path(place.run(f'python -c "{PUBLIC}"').strip())
    if not imported.is_relative_to(place.bin.parent) or not (imported.parent / "py.typed").is_file():
        raise Failure(f"connectomics was imported from {imported}, expected below {place.bin.parent} with py.typed")
    print(place.run(f"connectomics demo --output {output}"))
    if not list((place.folder / output).rglob("*.h5")):
        raise Failure("the demo left no labels")
    place.run("connectomics doctor", codes=(0, 3))  # a machine may be short of memory or disk


def follow_remedies(place: Place, folder: Path) -> None:
    """Do what the messages advise: about an extra that is absent, and about another package of our name."""
    absent = place.run(
        "echo MAP > cell.mrc && python -c \"import connectomics; connectomics.open_volume('cell.mrc')\"", codes=(1,)
    )
    place.run(_remedy(r"package mrcfile: (pip install '.*')", absent))
    place.run(f"rm cell.mrc && python -c '{OPEN_MRC}'")
    place.run(f"pip install --quiet --no-deps {namesake(folder)}")
    place.run(_remedy(r"→ (pip uninstall .*)", place.run("connectomics doctor", codes=(3,))))
    if "also installs a package" in place.run("connectomics doctor", codes=(0, 3)):
        raise Failure("doctor's advice about another package called connectomics does not help")
    place.run(f'python -c "{PUBLIC}"')


def _remedy(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise Failure(f"no advice like {pattern} in\n{text}")
    return found[1]


def main() -> None:
    """Do everything in a temporary folder, which is removed at the end."""
    folder, began = Path(tempfile.mkdtemp(prefix="connectomics_package_")), time.monotonic()
    try:
        wheel, sdist = build(folder / "dist")
        check_files(wheel, sdist)
        place = Place(folder, wheel.parent)
        constraints = REPOSITORY / "constraints.txt"
        place.run(f"pip install --quiet -c '{constraints}' '{wheel}'")
        check_use(place, "from_wheel")
        follow_remedies(place, folder)
        place.run(f"pip install --quiet --no-deps --force-reinstall '{sdist}'")
        check_use(place, "from_sdist")
    except Failure as failure:
        sys.exit(f"error: {failure}")
    finally:
        shutil.rmtree(folder)
    print(f"wheel and sdist install into an empty environment and run the demo ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
