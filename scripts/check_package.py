"""Build wheel and sdist, install the wheel in a clean environment, and run the demo there: ``make package-test``.

Takes some minutes, most of them to install PyTorch. Nothing of the checkout is on the path of what is run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = ("connectomics/py.typed", "connectomics/example/phantom_mito_2d/plans.json")


def run(words: Sequence[object], folder: Path) -> str:
    """Run a command away from the checkout, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist; both hold the package's data, under the distribution's name."""
    run([sys.executable, "-m", "build", "--outdir", folder, REPOSITORY], folder)
    (wheel,), (source,) = folder.glob("connectomics_nnunet-*.whl"), folder.glob("connectomics_nnunet-*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(source) as unpacked:
        in_source = {name.partition("/")[2] for name in unpacked.getnames()}
        for name in DATA:
            if name not in archive.namelist() or name not in in_source:
                sys.exit(f"{name} is missing in {wheel.name} or {source.name}")
    return wheel, source


def main() -> int:
    """Check both; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-only", action="store_true", help="do not install")
    build_only = parser.parse_args().build_only
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel, source = built(folder)
        print(f"built {wheel.name} and {source.name}")
        if build_only:
            return 0
        venv.create(folder / "clean", with_pip=True)
        python = folder / "clean" / "bin" / "python"
        run([python, "-m", "pip", "install", "--quiet", "-c", REPOSITORY / "constraints.txt", wheel], folder)
        where = run([python, "-c", "import connectomics; print(connectomics.__file__)"], folder).strip()
        if not where.startswith(str(folder)):
            sys.exit(f"imported {where}, not what was installed")
        program = folder / "clean" / "bin" / "connectomics"
        print(run([program, "demo", "--output", folder / "demo"], folder))
        print(run([program, "config", "keys", "inference.output"], folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
