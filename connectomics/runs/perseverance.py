"""A process that lost its lease, because it slept or others were faster, ends with what is true."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from connectomics.core.errors import ConnectomicsError, MissingShardError
from connectomics.execution.lease import LeaseLostError

ATTEMPTS = 3  # where a working store lacks what was recorded: its record is undone, and the block done again
T = TypeVar("T")
log = logging.getLogger(__name__)


def until_it_stands(attempt: Callable[[], T], standing: Callable[[], T | None]) -> T:
    """What an attempt gives that ends without having lost its lease.

    Parameters
    ----------
    attempt
        Goes on from what is on the disk.
    standing
        What is told where all that is wanted is there, else None. An error is no error then: another process finished
        while this one stood still, and took away what it still looked for.
    """
    for number in itertools.count(1):
        try:
            return attempt()
        except (LeaseLostError, ConnectomicsError, OSError) as error:
            told = standing()
            again = isinstance(error, LeaseLostError) or (isinstance(error, MissingShardError) and number < ATTEMPTS)
            if told is None and not again:
                raise
            log.info("another process went on meanwhile (%s)", error)
            if told is not None:
                return told
    raise AssertionError
