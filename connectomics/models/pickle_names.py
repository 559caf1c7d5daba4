"""Which functions and classes a pickle asks for, found without running it; for ``unpickle``, ``legacy_checkpoint``."""

from __future__ import annotations

import pickletools
from typing import IO, cast

_LONGEST_READ_BYTES = 1 << 20


class BoundedStream:
    """A stream that never gives more at once than a plain checkpoint needs, whatever length a pickle states.

    Parameters
    ----------
    stream
        The file.
    left
        How many bytes may be read of it, all together; None: any number.
    """

    def __init__(self, stream: IO[bytes], left: int | None = None) -> None:
        self._stream, self._left = stream, left

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes, but not more than ``_LONGEST_READ_BYTES``."""
        return self._counted(self._stream.read(min(count, _LONGEST_READ_BYTES)))

    def readline(self) -> bytes:
        """A line, or as much of it as is given at once."""
        return self._counted(self._stream.readline(_LONGEST_READ_BYTES))

    def _counted(self, piece: bytes) -> bytes:
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise ValueError("the pickle is longer than one that torch.save writes")
        return piece


def named_globals(stream: IO[bytes] | BoundedStream) -> list[str]:
    """Names of the functions and classes a pickle asks for, found by reading its instructions only."""
    names: list[str] = []
    strings: list[str] = []
    bounded = stream if isinstance(stream, BoundedStream) else BoundedStream(stream)
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], bounded)):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name in ("GLOBAL", "INST"):
            names.append(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.append(".".join(strings[-2:]))
        elif opcode.name.startswith("EXT"):
            names.append(f"extension {argument}")
    return names
