"""Another package adds features through entry points, and runs the suites that are shipped on them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "example_plugin"


def installed(folder: Path, project: str, points: dict[str, dict[str, str]]) -> dict[str, str]:
    """The environment of a process in which a package is installed: its metadata in a folder, its modules beside."""
    metadata = folder / f"{project.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    here = [str(folder), str(EXAMPLE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, here))}


def test_the_example_package_passes_the_suites(tmp_path: Path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    environment = installed(tmp_path, project["name"], project["entry-points"])
    # other packages' plugins of pytest take seconds to import
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin,pytest_timeout"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--basetemp"]
    command += [str(tmp_path / "of_the_suites"), str(EXAMPLE / "example_suites.py")]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=EXAMPLE.parents[1]
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.parametrize(("value", "why"), [("no_such_module:X", "No module named"), ("math:no_such", "no_such")])
def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, value: str, why: str) -> None:
    environment = installed(tmp_path, "broken-example", {"connectomics.readers": {"broken": value}})
    code = (
        "import sys; from connectomics import ConnectomicsError, open_volume\n"
        "try: open_volume(sys.argv[1])\n"
        "except ConnectomicsError as error: print(error)"
    )
    (tmp_path / "a.unknown").write_text("?")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.unknown")], capture_output=True, text=True, env=environment
    )
    assert "the reader 'broken' cannot be imported" in result.stdout and why in result.stdout, result.stderr
    assert "uninstall broken-example" in result.stdout
