"""Kills this process when it opens a file in whose path the pattern is found that the variable KILLER holds.

Python runs this file when it starts, where its folder is in PYTHONPATH; ``fork_server`` does so in its children.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

PATTERN = os.environ.get("KILLER", "")


def look(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and re.search(PATTERN, str(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)


if PATTERN:
    sys.addaudithook(look)
