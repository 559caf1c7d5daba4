"""Hold the lowest and the newest nnunetv2 and torch that pyproject.toml admits against nnU-Net itself, on Python 3.11.

Each pair gets a throw-away environment with this checkout, in which a quick part of the parity tests runs: nnU-Net of
that release beside this program. It takes many minutes and some GB, most of it torch; ``--only lowest`` does one pair,
and ``--keep FOLDER`` leaves the environments there for a second run. Nothing runs on Python 3.12 and 3.13: of them only
the metadata of what is installed here and the types are looked at (``--only metadata``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/parity/test_as_nnunet_takes_it.py",
    "tests/parity/test_single_sections.py",
    "tests/parity/test_label_kinds.py",
    "tests/parity/test_verify.py::test_resenc_models_of_old_plans_need_no_torchvision",
    "tests/parity/test_verify.py::test_rounding_in_nnunets_sums_is_told_from_disagreement",
)
NEEDED_BY_TESTS = ("pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.112")
NOT_RUN = ("3.12", "3.13")
PACKAGES = ("nnunetv2", "torch", "dynamic-network-architectures", "batchgenerators", "numpy")
TELL = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES!r}}}))"


def lowest() -> list[str]:
    """Requirements that pin nnunetv2 and torch to the lowest releases that pyproject.toml admits."""
    stated = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [word for word in stated if word.startswith(("torch>=", "nnunetv2>="))]
    return [f"{word.partition('>=')[0]}=={word.partition('>=')[2].partition(',')[0]}" for word in found]


def check(name: str, pins: list[str], folder: Path) -> bool:
    """Make the environment of a pair and run the tests in it; whether all passed."""
    place = folder / name
    python = place / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    # older releases of nnunetv2 read these when it is imported, and the trainer that makes the tests' models needs them
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        environment[variable] = str(folder / variable)
    if not python.exists():
        venv.create(place, with_pip=True)
    words = [str(python), "-m", "pip", "install", "--quiet", *pins, "-e", str(REPOSITORY), *NEEDED_BY_TESTS]
    print(f"{name}: installing {' '.join(pins) or 'the newest that is admitted'}", flush=True)
    if subprocess.run(words, env=environment, check=False).returncode:
        print(f"{name}: these releases cannot be installed together")
        return False
    told = subprocess.run([str(python), "-c", TELL], env=environment, check=True, capture_output=True, text=True)
    versions = ", ".join(f"{package} {version}" for package, version in json.loads(told.stdout).items())
    print(f"{name}: {versions}", flush=True)
    words = [str(python), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *TESTS]
    code = subprocess.run(words, cwd=REPOSITORY, env=environment, check=False).returncode
    print(f"{name}: {'passed' if code == 0 else 'FAILED'} with {versions}", flush=True)
    return code == 0


def admits(python: str) -> bool:
    """Whether this program and all that it needs state that they admit a Python, and mypy finds no fault for it."""
    refused = []
    names, seen = ["connectomics-nnunet"], set()
    while names:
        name = names.pop()
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if python not in SpecifierSet(package.metadata.get("Requires-Python", "") or ""):
            refused.append(f"{name} ({package.metadata['Requires-Python']})")
        needed = [Requirement(text) for text in package.requires or []]
        wanted = [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
        names += [each for each in wanted if each not in seen]
    words = [sys.executable, "-m", "mypy", "--python-version", python]
    typed = subprocess.run(words, cwd=REPOSITORY, check=False).returncode == 0
    said = f"refused by {', '.join(refused)}" if refused else f"admitted by all {len(seen)} packages"
    print(f"Python {python}: {said}; types {'right' if typed else 'WRONG'}; nothing was run on it", flush=True)
    return not refused and typed


def main() -> int:
    """Check the pairs; 0 where all pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lowest", "newest", "metadata"], help="one of them")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the environments stay")
    words = parser.parse_args()
    pairs = {"lowest": lowest(), "newest": []}
    chosen = {name: pins for name, pins in pairs.items() if words.only in (None, name)}
    with tempfile.TemporaryDirectory(prefix="versions_") as temporary:
        folder = words.keep or Path(temporary)
        passed = [check(name, pins, folder) for name, pins in chosen.items()]
    if words.only in (None, "metadata"):
        passed += [admits(python) for python in NOT_RUN]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
