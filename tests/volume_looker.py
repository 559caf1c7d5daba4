"""Opens volumes and reads their corners; only this program's errors may come. As a script: in little memory and time.

As a script it reads paths from stdin and prints each before it looks, so that a crash of a native library is named.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from connectomics.core.errors import ConnectomicsError
from connectomics.core.geometry import Box
from connectomics.volumes.opening import open_volume

LONGEST = 2000  # characters of a sentence
MEMORY_BYTES = 8 << 30  # of addresses: TensorStore's threads take most
SECONDS = 200


def look_at(uri: str) -> None:
    """Open a volume, read the first and the last voxel."""
    try:
        reader = open_volume(uri)
    except ConnectomicsError as error:
        assert len(str(error)) < LONGEST
        return
    try:
        assert reader.identity
        z, y, x = (n - 1 for n in reader.info.extent)
        reader.read(Box((0, 0, 0), (1, 1, 1)))
        reader.read(Box((z, y, x), reader.info.extent))
    except ConnectomicsError as error:
        assert len(str(error)) < LONGEST
    finally:
        reader.close()


def look_from_outside(paths: Sequence[Path]) -> None:
    """Look at volumes in a process of its own, which must end well."""
    ended = subprocess.run(
        [sys.executable, __file__],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    last = ended.stdout.splitlines()[-1:]
    assert ended.returncode == 0, f"ended with {ended.returncode} at {last}: {ended.stderr[-2000:]}"
    assert len(ended.stdout.splitlines()) == len(paths)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.read().splitlines():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        look_at(line)
