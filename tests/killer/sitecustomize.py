"""Kills this process when it opens a file whose path ends as the variable KILLER says.

Python runs this file when it starts, where its folder is in PYTHONPATH; ``fork_server`` does so in its children.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

ENDING = os.environ.get("KILLER", "")


def look(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(ENDING):
        os.kill(os.getpid(), signal.SIGKILL)


if ENDING:
    sys.addaudithook(look)
