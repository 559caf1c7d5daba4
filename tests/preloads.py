"""Libraries of ``tests/shims`` that stand between a process and the C library, and processes that are run with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

SHIMS = Path(__file__).parent / "shims"
COMMAND = "import sys; from connectomics.cli import main; sys.exit(main(sys.argv[1:]))"


def compiled(name: str, folder: Path) -> Path:
    """Compile a library; the test is skipped where that cannot be done."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler, which makes a library that stands before the C library")
    library = folder / f"{name}.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIMS / f"{name}.c"), "-ldl", "-lpthread"]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"the C compiler cannot make {name}.so: {made.stderr.strip()[-200:]}")
    return library


def run_with(
    library: Path, arguments: Sequence[str], stated: Mapping[str, str], code: str = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run the command line, or other code, in a process with a library; ``stated`` are variables of its environment."""
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"} | stated
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
