"""The names and the version by which this program is installed, and the command that installs what is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

VERSION = "0.1.0"
"""The only place of the version: pyproject.toml reads it from here, so a source tree that is not installed knows it."""
DISTRIBUTION = "connectomics-nnunet"
"""What pip calls this program; on the Python index ``connectomics`` is another one."""


def checkout() -> Path | None:
    """Return the folder of the repository that this package is imported from, or None where it was installed."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "constraints.txt").is_file() else None


def install_command(extra: str = "") -> str:
    """Return the shell command that installs this program, with an extra: ``pip install 'connectomics-nnunet[mrc]'``.

    In a checkout it is ``cd FOLDER && pip install -e '.[mrc]' -c constraints.txt``.
    """
    chosen = f"[{extra}]" if extra else ""
    folder = checkout()
    if folder is None:
        return f"pip install {shlex.quote(DISTRIBUTION + chosen)}"
    return f"cd {shlex.quote(str(folder))} && pip install -e {shlex.quote('.' + chosen)} -c constraints.txt"
