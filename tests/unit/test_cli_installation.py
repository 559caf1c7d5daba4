"""The names people install: the doctor finds another package of our name, and messages say what works."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

from connectomics.cli.doctor import _installation
from connectomics.core import installation
from connectomics.core.installation import DISTRIBUTION, VERSION, checkout, install_command


def other(folder: Path, *, points: str = "") -> None:
    """As pip leaves another distribution that owns a package called connectomics."""
    info = folder / "connectomics-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: connectomics\nVersion: 9.0\n")
    (info / "top_level.txt").write_text("connectomics\n")
    (info / "entry_points.txt").write_text(points)


def test_the_doctor_finds_another_package_of_our_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _installation().ok
    other(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = _installation()
    assert not found.ok
    assert "connectomics also installs a package connectomics" in found.text
    assert found.mend == f"pip uninstall --yes connectomics connectomics-nnunet && {install_command()}"


def test_an_older_installation_of_ours_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other(tmp_path, points="[console_scripts]\nconnectomics = connectomics.cli:program\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert _installation().ok


def test_what_is_advised_is_the_checkout_or_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout()
    assert folder is not None and (folder / "connectomics").is_dir()
    words = shlex.split(install_command("mrc"))
    assert words == ["cd", str(folder), "&&", "pip", "install", "-e", ".[mrc]", "-c", "constraints.txt"]
    monkeypatch.setattr(installation, "checkout", lambda: None)
    assert shlex.split(install_command("mrc")) == ["pip", "install", "connectomics-nnunet[mrc]"]
    assert install_command() == "pip install connectomics-nnunet"


def test_what_is_installed_is_called_so() -> None:
    try:
        found = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        pytest.skip("this is a source tree that is not installed")
    assert found["Version"] == VERSION
