"""What people install: one command in messages and pages, one version, a whole wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer

from connectomics.assembly.engine.identity import program_version, versions
from connectomics.core import installation

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PLACES = (
    "*.md",
    "docs/**/*.md",
    "connectomics/**/*",
    "scripts/**/*",
    "tutorials/*",
    "benchmarks/*",
    "Makefile",
    ".ci/run",
)
IN_A_CHECKOUT = re.compile(r"pip install -e (?:\.|'\.\[(?P<extra>[a-z]+)\]') -c constraints\.txt")
MADE_BY = ("connectomics/core/installation.py", "scripts/check_package.py")  # the sentence itself, and its trial


def texts() -> Iterator[tuple[str, str]]:
    """The files that people read or run, by name."""
    for place in PLACES:
        for path in REPOSITORY.glob(place):
            if path.is_file() and path.suffix in (".md", ".py", ".sh", ".yaml", ""):
                yield path.relative_to(REPOSITORY).as_posix(), path.read_text()


def installed_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package lie in this folder instead of the checkout."""
    monkeypatch.setattr(installation, "__file__", str(folder / "connectomics" / "core" / "installation.py"))


def test_every_page_and_script_installs_from_a_checkout_with_its_constraints() -> None:
    extras = PROJECT["optional-dependencies"]
    seen = 0
    for name, text in texts():
        if name in MADE_BY:
            continue
        for line in text.splitlines():
            if "pip install" in line and "$(PY)" not in line:  # make installs what it says into its own environment
                found = IN_A_CHECKOUT.search(line)
                assert found is not None, f"{name}: {line}"
                assert found["extra"] is None or found["extra"] in extras, f"{name}: {line}"
                seen += 1
        assert not re.search(r"connectomics\[[a-z]+\]", text), name
    assert seen >= 8


def test_every_extra_that_the_package_advises_exists() -> None:
    advised = {extra for _, text in texts() for extra in re.findall(r"install_command\([\"'](\w+)[\"']\)", text)}
    extras = PROJECT["optional-dependencies"].keys() - {"dev", "realfiles"}  # for those who work on the package
    assert advised == {"dm", "hdf5", "monai", "mrc", "openvino", "tables", "wkw", "zarr"} == extras


def test_the_command_in_a_checkout_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.install_command() == f"cd {REPOSITORY} && pip install -e . -c constraints.txt"
    other = tmp_path / "my files"
    other.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, other)
    installed_at(other, monkeypatch)
    command = installation.install_command("mrc")
    assert command == f"cd '{other}' && pip install -e '.[mrc]' -c constraints.txt"
    said = subprocess.run(
        command.replace("pip install", "printf '%s|' \"$PWD\""), shell=True, check=True, capture_output=True, text=True
    )
    assert said.stdout == f"{other}|-e|.[mrc]|-c|constraints.txt|"


def test_version_and_names_have_one_home() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert PROJECT["name"] == installation.DISTRIBUTION == "connectomics-nnunet"
    assert versions()["connectomics"] == "0.1.0"
    assert program_version() == "connectomics 0.1.0"


def test_a_source_tree_that_is_not_installed_knows_its_version(tmp_path: Path) -> None:
    """Every module is imported again, in a process in which no distribution of the package is found."""
    (tmp_path / "connectomics").symlink_to(REPOSITORY / "connectomics")
    code = (
        "import importlib.metadata as m, sys; sys.path.insert(0, sys.argv[1]); found = m.Distribution.from_name\n"
        "def absent(name):\n"
        "    if name.startswith('connectomics'): raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.Distribution.from_name = absent\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'connectomics']:\n"
        "    del sys.modules[name]\n"
        "from connectomics.assembly.engine.identity import program_version, versions\n"
        "print(program_version(), versions()['connectomics'])"
    )
    with ForkServer(tmp_path) as server:
        told = server.run_code(code, str(tmp_path))
    assert (told.code, told.stdout) == (0, "connectomics 0.1.0 0.1.0\n"), told.stderr


def test_make_leaves_an_environment_alone_that_it_did_not_make(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    for goal in ("demo", "test"):
        ended = subprocess.run([make, f"PYTHON={sys.executable}", goal], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2 and f"make VENV=.venv-make {goal}" in ended.stdout
    subprocess.run([make, "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["pyvenv.cfg"]
    (tmp_path / ".venv" / ".made-by-make").touch()
    subprocess.run([make, "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / ".venv").exists()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_wheel_and_sdist_install_into_an_empty_environment_and_run_the_demo() -> None:
    pytest.importorskip("build")
    script = REPOSITORY / "scripts" / "check_package.py"
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_type_checkers_follow_an_editable_installation(tmp_path: Path) -> None:
    """Pyright reads .pth files that hold a path, and no import hooks."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("__init__.py", "py.typed", "core/__init__.py", "core/installation.py"):
        (tmp_path / "connectomics" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "connectomics" / name, tmp_path / "connectomics" / name)
    code = "from setuptools.build_meta import build_editable; print(build_editable('.'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(path).decode().split() == [str(tmp_path)]
        assert not any(name.endswith("_finder.py") for name in wheel.namelist())
